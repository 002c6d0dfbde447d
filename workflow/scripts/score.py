"""Score all runs of one experiment by all protocols (kmebench.evaluation)."""

from kmebench.forkserver import hand_over

hand_over("kmebench.evaluation.score")

from kmebench.evaluation.score import score_experiment
from kmebench.io.files import atomic_path
from kmebench.io.logs import script_log

with script_log(snakemake):
    metrics = score_experiment(
        snakemake.params.experiment,
        snakemake.params.runs,
        snakemake.input.predictions,
        snakemake.input.timing,
        snakemake.params.originals,
        snakemake.input.original,
        snakemake.params.statistics,
        snakemake.input.health,
        snakemake.params.controls,
    )
    with atomic_path(snakemake.output.metrics) as path:
        metrics.to_parquet(path, index=False, write_page_checksum=True)
