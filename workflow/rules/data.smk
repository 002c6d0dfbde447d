# Data sets: the raw file, then checked and selected edit requests.
#
# The wildcard is not called {dataset} as everywhere else: where a rule and the rule that makes its
# input share a wildcard, Snakemake 9.27 tries the same value first, without looking at constraints,
# and {dataset} may be the name of a development split.


rule fetch_dataset:
    "Bring one data set here: from the mirror folder, its URL, or the facts of this repository."
    input:
        unpack(inputs.openfacts),
        code=code("fetch_dataset", "kmebench.data.openfacts"),
    output:
        raw="<results>/data/raw/{data}.json",
        origin="<results>/data/raw/{data}.origin.json",
    log:
        "<logs>/fetch_dataset/{data}.log",
    wildcard_constraints:
        data=one_of(config["datasets"]),
    retries: 0
    localrule: True
    conda:
        "../../envs/report.yaml"
    resources:
        # Not a parameter: data do not change with the place they are taken from.
        mirror=MIRROR,
    params:
        source=lambda w: config["datasets"][w.data]["source"],
        content=inputs.data_content,
    message:
        "Fetching the data set {wildcards.data}"
    script:
        "../scripts/fetch_dataset.py"


rule prepare_dataset:
    "Check the records, select those to edit, and hold those out to tune and to train on."
    input:
        raw="<results>/data/raw/{data}.json",
        left_out=inputs.left_out,
        code=code("prepare_dataset"),
    output:
        requests="<results>/data/{data}.jsonl",
        development="<results>/data/{data}.development.jsonl",
        training="<results>/data/{data}.training.jsonl",
        report="<results>/data/{data}.report.json",
    log:
        "<logs>/prepare_dataset/{data}.log",
    wildcard_constraints:
        data=one_of(config["datasets"]),
    localrule: True
    conda:
        "../../envs/report.yaml"
    resources:
        # What messages call the file, for the user mends his own and not our copy of it.
        origin=lambda w: str(inputs.users_data_file(w.data) or ""),
    params:
        selection=inputs.selection,
    message:
        "Preparing the data set {wildcards.data}"
    script:
        "../scripts/prepare_dataset.py"
