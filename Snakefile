# KME-Bench: knowledge model editing, from data to the paper's tables.
#
# Outputs, all below results/ (what each holds: results/README.md):
#   data/{dataset}.jsonl                    edit requests          fetch_dataset, prepare_dataset
#   models/{model}/                         Hugging Face folder    fetch_model, train_model
#   original/{model}/{dataset}.parquet      the unedited model     predict_original
#   original/{model}/neutral.safetensors    neutral text           neutral_text
#   trace/{model}/{dataset}/                impact scores, paths   cache_gradients, select_paths
#   covariance/{model}.safetensors          E[k kᵀ] of W2's keys   covariance
#   covariance/{model}/                     inverses, spectra      factorise_covariance
#   metric/{model}/                         what changes cost      neutral_metric
#   targets/{model}/{dataset}/              targets z*             optimise_targets
#   trained/{model}/{dataset}/              what editors learn     train_stage
#   runs/{model}/{dataset}/{mode}/{method}/{variant}/seed{seed}/   edit
#   metrics/{experiment}.parquet            all protocols          score
#   tables/{table}.csv, .md, .tex, .html    the paper's tables     table, costs, findings
#   comparisons/{comparison}.csv, .md       pairs of runs          compare
#   figures/{figure}.pdf, .svg, .png, .csv  the paper's figures    node_importance, figure
#   index.html                              all of it on one page  index
#   tuning/{experiment}.yaml                chosen values          tune
#   notebooks/{notebook}.ipynb, .html       executed notebooks     notebook, model_notebook

from pathlib import Path

from snakemake.utils import min_version

min_version("9.27")


configfile: "config.yaml"


# Tuned hyper-parameters, one file per search; --configfile goes before them.
for tuned in sorted(Path("config/tuned").glob("*.yaml")):

    configfile: tuned


report: "workflow/report/workflow.rst"


include: "workflow/common.smk"
include: "workflow/rules/data.smk"
include: "workflow/rules/models.smk"
include: "workflow/rules/stages.smk"
include: "workflow/rules/edit.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/notebooks.smk"


rule all:
    default_target: True
    input:
        rules.metrics.input,
        rules.tables.input,
        rules.figures.input,
        rules.index.output,
        rules.notebooks.input,


onstart:
    for name in ("results", "logs"):
        folder = Path(workflow.pathvars.get(name))
        check_writable(f"pathvars.{name}", folder, folder)
    print(grid.describe(config))
    if workflow.local_exec:
        forkserver.start(inputs.devices, config["threads"])


onsuccess:
    reported.print_tables()
