"""Bring one data set here: mirror folder, URL, or OpenFacts (kmebench.data)."""

from pathlib import Path

from kmebench.data.openfacts import counterfact_records, zsre_records
from kmebench.data.sources import Source, fetch
from kmebench.io import origins
from kmebench.io.files import write_json
from kmebench.io.logs import script_log

with script_log(snakemake):
    spec, digest = dict(snakemake.params.source), None
    if spec.pop("source") == "openfacts":
        emit = {"counterfact": counterfact_records, "zsre": zsre_records}[spec["kind"]]
        folder = Path(snakemake.input.relations).parent
        write_json(snakemake.output.raw, emit(folder, spec.get("seed", 0)))
    else:
        digest = fetch(Source(**spec), snakemake.output.raw, snakemake.resources.mirror)
    origins.write_note(snakemake.output.origin, snakemake.params.content, digest)
