# Runs: edit a model, in one of the pipelines, and predict with it.


rule edit_batch:
    "Edit batch by batch, each from the original model; predict; roll back."
    input:
        unpack(edit_inputs("batch")),
    output:
        predictions="<results>/runs/{model}/{dataset}/batch/{method}/{variant}/seed{seed}/predictions.parquet",
        timing="<results>/runs/{model}/{dataset}/batch/{method}/{variant}/seed{seed}/timing.json",
        run="<results>/runs/{model}/{dataset}/batch/{method}/{variant}/seed{seed}/run.json",
    log:
        "<logs>/edit_batch/{model}.{dataset}.{method}.{variant}.seed{seed}.log",
    benchmark:
        "<logs>/edit_batch/{model}.{dataset}.{method}.{variant}.seed{seed}.benchmark.tsv"
    conda:
        "../../envs/edit.yaml"
    threads: config["threads"]
    resources:
        gpu=gpus,
        mem_mb=memory,
        runtime=minutes,
        models=1,
    params:
        run=edit_params("batch"),
    message:
        "Editing {wildcards.model} with {wildcards.method} on {wildcards.dataset}, in batches ({wildcards.variant})"
    script:
        "../scripts/edit.py"


use rule edit_batch as edit_consecutive with:
    input:
        unpack(edit_inputs("consecutive")),
    output:
        predictions="<results>/runs/{model}/{dataset}/consecutive/{method}/{variant}/seed{seed}/predictions.parquet",
        timing="<results>/runs/{model}/{dataset}/consecutive/{method}/{variant}/seed{seed}/timing.json",
        run="<results>/runs/{model}/{dataset}/consecutive/{method}/{variant}/seed{seed}/run.json",
        delta="<results>/runs/{model}/{dataset}/consecutive/{method}/{variant}/seed{seed}/delta.safetensors",
        health="<results>/runs/{model}/{dataset}/consecutive/{method}/{variant}/seed{seed}/health.json",
    log:
        "<logs>/edit_consecutive/{model}.{dataset}.{method}.{variant}.seed{seed}.log",
    benchmark:
        "<logs>/edit_consecutive/{model}.{dataset}.{method}.{variant}.seed{seed}.benchmark.tsv"
    params:
        run=edit_params("consecutive"),
    message:
        "Editing {wildcards.model} with {wildcards.method} on {wildcards.dataset}, one by one ({wildcards.variant})"


use rule edit_batch as edit_breadth_first with:
    input:
        unpack(edit_inputs("breadth_first")),
    output:
        predictions="<results>/runs/{model}/{dataset}/breadth_first/{method}/{variant}/seed{seed}/predictions.parquet",
        timing="<results>/runs/{model}/{dataset}/breadth_first/{method}/{variant}/seed{seed}/timing.json",
        run="<results>/runs/{model}/{dataset}/breadth_first/{method}/{variant}/seed{seed}/run.json",
        delta="<results>/runs/{model}/{dataset}/breadth_first/{method}/{variant}/seed{seed}/delta.safetensors",
        health="<results>/runs/{model}/{dataset}/breadth_first/{method}/{variant}/seed{seed}/health.json",
    log:
        "<logs>/edit_breadth_first/{model}.{dataset}.{method}.{variant}.seed{seed}.log",
    benchmark:
        "<logs>/edit_breadth_first/{model}.{dataset}.{method}.{variant}.seed{seed}.benchmark.tsv"
    params:
        run=edit_params("breadth_first"),
    message:
        "Editing {wildcards.model} with {wildcards.method} on {wildcards.dataset}, breadth first ({wildcards.variant})"
