"""Average the impact of every node of the critical paths (kmebench.reporting)."""

from kmebench.io.files import atomic_path
from kmebench.io.logs import script_log
from kmebench.reporting.figure_tables import importance

with script_log(snakemake):
    nodes = importance(snakemake.input.paths, **snakemake.params.statistics)
    with atomic_path(snakemake.output.nodes) as path:
        nodes.to_parquet(path, index=False, write_page_checksum=True)
