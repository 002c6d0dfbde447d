# Runs: edit a model by one of the pipelines, and predict with it.


rule edit:
    "Edit batch by batch from the original model, turn after turn, or breadth first; predict."
    input:
        unpack(inputs.edit),
    output:
        predictions="<results>/runs/{model}/{dataset}/{mode}/{method}/{variant}/seed{seed}/predictions.parquet",
        timing="<results>/runs/{model}/{dataset}/{mode}/{method}/{variant}/seed{seed}/timing.json",
        run="<results>/runs/{model}/{dataset}/{mode}/{method}/{variant}/seed{seed}/run.json",
        # Of what every call of the editor changed.
        norms="<results>/runs/{model}/{dataset}/{mode}/{method}/{variant}/seed{seed}/norms.parquet",
        # What the model carries at the end: nothing where every batch was rolled back.
        delta="<results>/runs/{model}/{dataset}/{mode}/{method}/{variant}/seed{seed}/delta.safetensors",
        # Measurements of the models that it left: none in batches.
        health="<results>/runs/{model}/{dataset}/{mode}/{method}/{variant}/seed{seed}/health.json",
    log:
        "<logs>/edit/{model}.{dataset}.{mode}.{method}.{variant}.seed{seed}.log",
    wildcard_constraints:
        mode=MODE,
    conda:
        "../../envs/edit.yaml"
    threads: config["threads"]
    resources:
        gpu=inputs.gpus,
        mem_mb=inputs.editing_memory,
        runtime=MINUTES,
        models=1,
        # No parameters: they do not change the bytes of a run that has finished.
        checkpoint_every=config["checkpoint_every"],
        on_failed_edit=config["on_failed_edit"],
    params:
        run=inputs.settings,
    message:
        "Editing {wildcards.model} with {wildcards.method} on {wildcards.dataset}, {wildcards.mode} ({wildcards.variant})"
    script:
        "../scripts/edit.py"
