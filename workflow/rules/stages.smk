# Cached stages on the unedited model, each run once for all runs that read it.


wildcard_constraints:
    model=one_of(config["models"]),
    dataset=one_of(grid.datasets(config)),
    method=one_of(config["methods"]),
    variant=VARIANT,
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
        gpu=inputs.gpus,
        mem_mb=inputs.memory,
        runtime=MINUTES,
        models=1,
    params:
        load=inputs.load,
        on_bad_record=inputs.on_bad_record,
        evaluation=config["evaluation"],
    message:
        "Asking the unedited {wildcards.model} about {wildcards.dataset}"
    script:
        "../scripts/predict_original.py"


rule neutral_text:
    "Have the unedited model write neutral text, on which edited states are measured."
    input:
        model="<results>/models/{model}",
        code=code("neutral_text"),
    output:
        text="<results>/original/{model}/neutral.safetensors",
    log:
        "<logs>/neutral_text/{model}.log",
    conda:
        "../../envs/edit.yaml"
    threads: config["threads"]
    resources:
        gpu=inputs.gpus,
        mem_mb=inputs.memory,
        runtime=MINUTES,
        models=1,
    params:
        load=inputs.load,
        settings=config["health"],
        batch_size=config["evaluation"]["batch_size"],
    message:
        "Neutral text of {wildcards.model}"
    script:
        "../scripts/neutral_text.py"


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
        gpu=inputs.gpus,
        mem_mb=inputs.tracing_memory,
        runtime=MINUTES,
        models=1,
    params:
        load=inputs.load,
        asked=inputs.askable,
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
        settings=inputs.paths,
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
        # Not removed before the job, whose parameter is what layers it holds.
        covariance=update("<results>/covariance/{model}.safetensors"),
        origin="<results>/covariance/{model}.origin.json",
    log:
        "<logs>/covariance/{model}.log",
    conda:
        "../../envs/edit.yaml"
    threads: config["threads"]
    resources:
        gpu=inputs.gpus,
        mem_mb=inputs.covariance_memory,
        runtime=MINUTES,
        models=1,
    params:
        load=inputs.load,
        layers=inputs.covariance_layers,
        settings=config["covariance"],
        content=inputs.text_content,
    message:
        "Covariance of {wildcards.model}"
    script:
        "../scripts/covariance.py"


rule factorise_covariance:
    "Invert the covariance of one layer, or find its eigenvectors, once for all runs that read it."
    input:
        covariance="<results>/covariance/{model}.safetensors",
        code=code("factorise_covariance"),
    output:
        factor="<results>/covariance/{model}/{factor}/{layer}.safetensors",
    log:
        "<logs>/factorise_covariance/{model}.{factor}.{layer}.log",
    wildcard_constraints:
        factor=r"inverse(\+damping=[^/]+)?|spectrum",
        layer=r"\d+",
    conda:
        "../../envs/edit.yaml"
    threads: config["threads"]
    resources:
        gpu=inputs.gpus,
        mem_mb=inputs.factor_memory,
        runtime=MINUTES,
        models=1,
    params:
        device=inputs.device,
    message:
        "The {wildcards.factor} of the covariance of layer {wildcards.layer} of {wildcards.model}"
    script:
        "../scripts/factorise_covariance.py"


rule neutral_metric:
    "Measure what a change of the FFN would cost on text that the model writes."
    input:
        model="<results>/models/{model}",
        code=code("neutral_metric"),
    output:
        metric="<results>/metric/{model}/{metric}.safetensors",
    log:
        "<logs>/neutral_metric/{model}.{metric}.log",
    wildcard_constraints:
        metric=METRIC,
    conda:
        "../../envs/edit.yaml"
    threads: config["threads"]
    resources:
        gpu=inputs.gpus,
        mem_mb=inputs.metric_memory,
        runtime=MINUTES,
        models=1,
    params:
        load=inputs.load,
    message:
        "Neutral metric of {wildcards.model} ({wildcards.metric})"
    script:
        "../scripts/neutral_metric.py"


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
        target=TARGET,
    conda:
        "../../envs/edit.yaml"
    threads: config["threads"]
    resources:
        gpu=inputs.gpus,
        mem_mb=inputs.target_memory,
        runtime=MINUTES,
        models=1,
    params:
        load=inputs.load,
        asked=inputs.askable,
        settings=inputs.targets,
    message:
        "Targets of {wildcards.dataset} for {wildcards.model} ({wildcards.target})"
    script:
        "../scripts/optimise_targets.py"


rule train_stage:
    "Train what an editor learns from the development split, once for all runs of a model."
    input:
        unpack(inputs.stage),
    output:
        trained="<results>/trained/{model}/{dataset}/{trained}.safetensors",
    log:
        "<logs>/train_stage/{model}.{dataset}.{trained}.log",
    wildcard_constraints:
        dataset=one_of(config["datasets"]),
        trained=r"[^/]+",
    conda:
        "../../envs/edit.yaml"
    threads: config["threads"]
    resources:
        gpu=inputs.gpus,
        mem_mb=inputs.training_memory,
        runtime=MINUTES,
        models=1,
    params:
        load=inputs.load,
        asked=inputs.askable,
        stage=inputs.trained,
    message:
        "Training {wildcards.trained} for {wildcards.model} on {wildcards.dataset}"
    script:
        "../scripts/train_stage.py"


rule hypernetwork:
    "Train the network of an editor on the training split, once for all runs of a model."
    input:
        unpack(inputs.training_split),
    output:
        network="<results>/hypernetwork/{model}/{dataset}/{editor}/{settings}.safetensors",
        history="<results>/hypernetwork/{model}/{dataset}/{editor}/{settings}.json",
    log:
        "<logs>/hypernetwork/{model}/{dataset}/{editor}/{settings}.log",
    wildcard_constraints:
        dataset=one_of(config["datasets"]),
        editor=r"[^/]+",
        settings=r"[^/]+",
    conda:
        "../../envs/edit.yaml"
    threads: config["threads"]
    resources:
        gpu=inputs.gpus,
        mem_mb=inputs.hypernetwork_memory,
        runtime=MINUTES,
        models=1,
    params:
        load=inputs.load,
        asked=inputs.askable,
        need=inputs.hypernetwork,
    message:
        "Training the network of {wildcards.editor} for {wildcards.model} on {wildcards.dataset}"
    script:
        "../scripts/hypernetwork.py"
