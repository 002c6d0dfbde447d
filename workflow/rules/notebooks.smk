# Notebooks, executed on the results: stripped of outputs in notebooks/, kept with them here.


rule notebook:
    "Execute a notebook that reads tables; keep it with its outputs, and as a page."
    input:
        unpack(notebooks.inputs),
    output:
        notebook="<results>/notebooks/{notebook}.ipynb",
        html=report(
            "<results>/notebooks/{notebook}.html",
            category="Notebooks",
            labels={"notebook": "{notebook}"},
        ),
    log:
        "<logs>/notebook/{notebook}.log",
    wildcard_constraints:
        notebook=one_of(TABLE_NOTEBOOKS),
    localrule: True
    conda:
        "../../envs/report.yaml"
    params:
        parameters=notebooks.parameters,
    message:
        "Executing the notebook {wildcards.notebook}"
    script:
        "../scripts/notebook.py"


use rule notebook as model_notebook with:
    log:
        "<logs>/model_notebook/{notebook}.log",
    wildcard_constraints:
        notebook=one_of(MODEL_NOTEBOOKS),
    localrule: False
    conda:
        "../../envs/edit.yaml"
    threads: config["threads"]
    resources:
        gpu=lambda w: inputs.gpus_of(notebooks.model()),
        mem_mb=lambda w, attempt: inputs.memory_of(notebooks.model(), attempt),
        models=1,


rule notebooks:
    "All notebooks."
    input:
        expand("<results>/notebooks/{notebook}.html", notebook=config["notebooks"]),
    localrule: True
