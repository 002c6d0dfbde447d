"""Execute one notebook with its parameters; keep it with its outputs, and as a page."""

import os
from pathlib import Path

import nbformat
from jinja2 import DictLoader
from nbconvert import HTMLExporter
from papermill import execute_notebook

import kmebench
from kmebench.io.files import write_text
from kmebench.io.logs import script_log

SCRIPTS = ("html_head_js", "html_head_js_mathjax", "html_head_js_mermaidjs")
#: A page that asks no server for anything.
PAGE = ["{% extends 'index.html.j2' %}", *(f"{{% block {b} %}}{{% endblock %}}" for b in SCRIPTS)]

with script_log(snakemake):
    # The kernel is a process of its own and knows nothing of this one's search path.
    path = [str(Path(kmebench.__file__).parents[1]), os.environ.get("PYTHONPATH")]
    os.environ |= {
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "JUPYTER_PREFER_ENV_PATH": "1",  # even where the user has registered another python3
        "PYTHONWARNINGS": "ignore:IProgress not found",  # tqdm's: a page has no moving bars
    }
    executed = execute_notebook(
        snakemake.input.notebook,
        None,  # nothing is written before all cells have run
        snakemake.params.parameters,
        kernel_name="python3",
        progress_bar=False,
    )
    loaders = [DictLoader({"page": "".join(PAGE)})]
    exporter = HTMLExporter(template_file="page", extra_loaders=loaders)
    named = {"metadata": {"name": snakemake.wildcards.notebook}}
    page, _ = exporter.from_notebook_node(executed, named)
    write_text(snakemake.output.notebook, nbformat.writes(executed) + "\n")
    write_text(snakemake.output.html, page)
