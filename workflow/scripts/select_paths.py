"""Select transmission paths from cached impact scores (kmebench.editors.pac.paths)."""

from kmebench.forkserver import hand_over

hand_over("kmebench.editors.pac.cache")

from kmebench.editors.needs import Paths
from kmebench.editors.pac.cache import GradientCache, select_groups, write_paths
from kmebench.io.logs import script_log

with script_log(snakemake):
    need = Paths(**snakemake.params.settings)
    cache = GradientCache.open(snakemake.input.gradients)
    paths = select_groups(cache, need)
    write_paths(snakemake.output.paths, paths, cache, need)
