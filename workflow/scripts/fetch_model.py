"""Bring one model to a Hugging Face folder of safetensors (kmebench.models.sources)."""

from pathlib import Path

from kmebench.io import origins
from kmebench.io.logs import script_log
from kmebench.models.sources import fetch_model

with script_log(snakemake):
    folder, content = Path(snakemake.output.folder), snakemake.params.content
    fetch_model(snakemake.params.source, folder)
    origins.write_note(folder / origins.NOTE, content, content)
