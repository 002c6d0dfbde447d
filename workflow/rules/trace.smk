# What the unedited model says, and which paths through it matter for each request.


wildcard_constraints:
    model=one_of(config["models"]),
    dataset=one_of(grid.datasets(config)),
    method=one_of(config["methods"]),
    variant=r"default|[a-z_]+=[^/]+",
    seed=r"\d+",


rule predict_original:
    "Predict every prompt with the unedited model."
    input:
        model="<results>/models/{model}",
        requests="<results>/data/{dataset}.jsonl",
        code=code("predict_original"),
    output:
        predictions="<results>/original/{model}/{dataset}.parquet",
    log:
        "<logs>/predict_original/{model}.{dataset}.log",
    conda:
        "../../envs/edit.yaml"
    threads: config["threads"]
    resources:
        gpu=gpus,
        mem_mb=memory,
        runtime=minutes,
        models=1,
    params:
        load=lambda w: load_params(w.model),
        on_bad_record=on_bad_record,
        evaluation=config["evaluation"],
    message:
        "Asking the unedited {wildcards.model} about {wildcards.dataset}"
    script:
        "../scripts/predict_original.py"


rule cache_gradients:
    "Score every FFN segment for every request: one forward and one backward pass each."
    input:
        model="<results>/models/{model}",
        requests="<results>/data/{dataset}.jsonl",
        code=code("cache_gradients"),
    output:
        gradients="<results>/trace/{model}/{dataset}/gradients.safetensors",
    log:
        "<logs>/cache_gradients/{model}.{dataset}.log",
    conda:
        "../../envs/edit.yaml"
    threads: config["threads"]
    resources:
        gpu=gpus,
        mem_mb=memory,
        runtime=minutes,
        models=1,
    params:
        load=lambda w: load_params(w.model),
        asked=asked_params,
    message:
        "Tracing {wildcards.model} on {wildcards.dataset}"
    script:
        "../scripts/cache_gradients.py"


rule select_paths:
    "Select critical and insignificant transmission paths from the cached scores."
    input:
        gradients="<results>/trace/{model}/{dataset}/gradients.safetensors",
        code=code("select_paths"),
    output:
        paths="<results>/trace/{model}/{dataset}/paths/{selection}.safetensors",
    log:
        "<logs>/select_paths/{model}.{dataset}.{selection}.log",
    wildcard_constraints:
        selection=SELECTION,
    conda:
        "../../envs/edit.yaml"
    params:
        settings=lambda w: asdict(Paths.parse(w.selection)),
    message:
        "Selecting paths {wildcards.selection} of {wildcards.model} on {wildcards.dataset}"
    script:
        "../scripts/select_paths.py"


rule covariance:
    "Average k kᵀ of the inputs of W2 over generic text, for all layers that runs ask for."
    input:
        model="<results>/models/{model}",
        code=code("covariance"),
    output:
        covariance="<results>/covariance/{model}.safetensors",
        origin="<results>/covariance/{model}.origin.json",
    log:
        "<logs>/covariance/{model}.log",
    conda:
        "../../envs/edit.yaml"
    threads: config["threads"]
    resources:
        gpu=gpus,
        mem_mb=memory,
        runtime=minutes,
        models=1,
    params:
        load=lambda w: load_params(w.model),
        layers=lambda w: grid.covariance_layers(config, w.model),
        settings=config["covariance"],
        content=text_content,
    message:
        "Covariance of {wildcards.model}"
    script:
        "../scripts/covariance.py"


rule optimise_targets:
    "Optimise what MEMIT's family wants the last edited layer to say, for every request."
    input:
        model="<results>/models/{model}",
        requests="<results>/data/{dataset}.jsonl",
        code=code("optimise_targets"),
    output:
        targets="<results>/targets/{model}/{dataset}/{target}.safetensors",
    log:
        "<logs>/optimise_targets/{model}.{dataset}.{target}.log",
    wildcard_constraints:
        target=r"site=[\w-]+\+layer=\d+\+[^/]+",
    conda:
        "../../envs/edit.yaml"
    threads: config["threads"]
    resources:
        gpu=gpus,
        mem_mb=memory,
        runtime=minutes,
        models=1,
    params:
        load=lambda w: load_params(w.model),
        asked=asked_params,
        settings=lambda w: asdict(Targets.parse(w.target)),
    message:
        "Targets of {wildcards.dataset} for {wildcards.model} ({wildcards.target})"
    script:
        "../scripts/optimise_targets.py"
