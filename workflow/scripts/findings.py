"""Test the paper's claims on finished runs (kmebench.reporting)."""

from kmebench.io.files import atomic_path, write_text
from kmebench.io.logs import script_log
from kmebench.planning.claims import read_claims
from kmebench.reporting.findings import Runs, findings, findings_markdown
from kmebench.reporting.html import page

with script_log(snakemake):
    params = snakemake.params
    claims = read_claims(snakemake.input.claims)
    table = findings(claims, params.cells, Runs(params.results, params.statistics))
    with atomic_path(snakemake.output.csv) as path:
        table.to_csv(path, index=False)
    text = findings_markdown(table)
    write_text(snakemake.output.md, text)
    write_text(snakemake.output.html, page("Findings", text))
