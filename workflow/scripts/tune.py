"""Choose hyper-parameters from a sweep on development splits (kmebench.planning.tuning)."""

from kmebench.io.checked_files import read_parquet
from kmebench.io.files import write_text
from kmebench.io.logs import script_log
from kmebench.planning.tuning import search_table, tuned_config

with script_log(snakemake):
    metrics = read_parquet(snakemake.input.metrics)
    table = search_table(metrics, snakemake.params.candidates)
    write_text(snakemake.output.config, tuned_config(table, snakemake.params.mode))
