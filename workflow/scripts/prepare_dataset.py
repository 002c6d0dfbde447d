"""Check, select and split the records of one data set (kmebench.data.prepare)."""

from kmebench.data.edit_sets import read_records
from kmebench.data.prepare import Selection, prepare
from kmebench.data.records import read_requests, write_requests
from kmebench.io.files import write_json
from kmebench.io.logs import logger, script_log

with script_log(snakemake):
    options = dict(snakemake.params.selection)
    records, bad = read_records(
        snakemake.input.raw,
        options.pop("schema"),
        options.pop("on_bad_record", "error"),
        name=snakemake.resources.origin or None,
    )
    left_out = [r for file in snakemake.input.get("left_out", []) for r in read_requests(file)]
    prepared = prepare(records, bad, Selection(**options), left_out)
    for group in prepared.report["conflicts_among_selected"]:
        logger.info("conflict about %(subject)s: requests %(case_ids)s want %(targets)s", group)
    asked = prepared.report["locality_edited_elsewhere"]["prompts"]
    if asked:
        cases = ", ".join(prompt["case_id"] for prompt in asked)
        logger.info("%d locality prompts are edited by other requests: %s", len(asked), cases)
    write_requests(snakemake.output.requests, prepared.requests)
    write_requests(snakemake.output.development, prepared.development)
    write_requests(snakemake.output.training, prepared.training)
    write_json(snakemake.output.report, prepared.report)
