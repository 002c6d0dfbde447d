# Data sets: the raw file, then checked and selected edit requests.


rule fetch_dataset:
    "Bring one data set here: from the mirror folder, its URL, or the facts of this repository."
    input:
        unpack(openfacts_inputs),
        code=code("fetch_dataset", "kmebench.data.openfacts"),
    output:
        raw="<results>/data/raw/{dataset}.json",
    log:
        "<logs>/fetch_dataset/{dataset}.log",
    wildcard_constraints:
        dataset=one_of(config["datasets"]),
    retries: 0
    localrule: True
    conda:
        "../../envs/report.yaml"
    resources:
        # Not a parameter: data do not change with the place they are taken from.
        mirror=config["data_mirror"] or os.environ.get("KMEBENCH_DATA_MIRROR", ""),
    params:
        source=lambda w: config["datasets"][w.dataset]["source"],
    message:
        "Fetching the data set {wildcards.dataset}"
    script:
        "../scripts/fetch_dataset.py"


rule prepare_dataset:
    "Check the records, select those to edit, and hold a development split out."
    input:
        raw="<results>/data/raw/{dataset}.json",
        code=code("prepare_dataset"),
    output:
        requests="<results>/data/{dataset}.jsonl",
        development="<results>/data/{dataset}.development.jsonl",
        report="<results>/data/{dataset}.report.json",
    log:
        "<logs>/prepare_dataset/{dataset}.log",
    wildcard_constraints:
        dataset=one_of(config["datasets"]),
    localrule: True
    conda:
        "../../envs/report.yaml"
    params:
        selection=lambda w: selection_params(w.dataset),
    message:
        "Preparing the data set {wildcards.dataset}"
    script:
        "../scripts/prepare_dataset.py"
