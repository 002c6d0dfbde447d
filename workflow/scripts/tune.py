"""Choose hyper-parameters from a sweep on development splits (kmebench.experiments.tuning)."""

from kmebench.experiments.tuning import search_table, tuned_config
from kmebench.files import write_text
from kmebench.logs import script_log
from kmebench.reading import read_parquet

with script_log(snakemake):
    metrics = read_parquet(snakemake.input.metrics)
    table = search_table(metrics, snakemake.params.candidates)
    write_text(snakemake.output.config, tuned_config(table, snakemake.params.mode))
