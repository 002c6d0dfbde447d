"""Select transmission paths from cached impact scores (kmebench.tracing.paths)."""

from kmebench.logs import script_log
from kmebench.tracing.cache import GradientCache, select_groups, write_paths

with script_log(snakemake):
    settings = snakemake.params.settings
    cache = GradientCache.open(snakemake.input.gradients)
    paths = select_groups(cache, **settings)
    write_paths(snakemake.output.paths, paths, cache, settings)
