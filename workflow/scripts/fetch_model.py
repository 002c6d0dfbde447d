"""Bring one model to a Hugging Face folder of safetensors (kmebench.models.sources)."""

from pathlib import Path

from kmebench.logs import script_log
from kmebench.models.sources import fetch_model

with script_log(snakemake):
    fetch_model(snakemake.params.source, Path(snakemake.output.folder))
