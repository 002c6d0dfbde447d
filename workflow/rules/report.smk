# From predictions to the paper's tables. Nothing here imports torch.


rule score:
    "Compute the metrics of all protocols for every run of one experiment."
    input:
        predictions=experiment_files("predictions.parquet"),
        timing=experiment_files("timing.json"),
        health=experiment_health,
        original=lambda w: [
            f"<results>/original/{model}/{dataset}.parquet"
            for model, dataset in experiment_originals(w)
        ],
        code=code("score"),
    output:
        metrics="<results>/metrics/{experiment}.parquet",
    log:
        "<logs>/score/{experiment}.log",
    wildcard_constraints:
        experiment=one_of(config["experiments"]),
    conda:
        "../../envs/report.yaml"
    params:
        experiment=lambda w: w.experiment,
        runs=lambda w: [asdict(run) for run in grid.runs_of(config, w.experiment)],
        originals=lambda w: [
            {"model": model, "dataset": dataset}
            for model, dataset in experiment_originals(w)
        ],
        controls=grid.controls(config),
        statistics=config["statistics"],
    message:
        "Scoring {wildcards.experiment}"
    script:
        "../scripts/score.py"


rule table:
    "Lay one experiment out as the paper's table, beside the paper's own numbers."
    input:
        metrics=lambda w: f"<results>/metrics/{config['tables'][w.table]['experiment']}.parquet",
        paper=lambda w: config["tables"][w.table].get("paper", []),
        code=code("table"),
    output:
        csv="<results>/tables/{table}.csv",
        md="<results>/tables/{table}.md",
        tex="<results>/tables/{table}.tex",
        html=report(
            "<results>/tables/{table}.html",
            caption="../report/table.rst",
            category="Tables",
            labels={"table": "{table}"},
        ),
    log:
        "<logs>/table/{table}.log",
    wildcard_constraints:
        table=one_of(config["tables"]),
    localrule: True
    conda:
        "../../envs/report.yaml"
    params:
        table=table_params,
    message:
        "Writing {wildcards.table}"
    script:
        "../scripts/table.py"


rule compare:
    "Compare runs in pairs on the same requests."
    input:
        predictions=lambda w: [
            f"<results>/{folder}/predictions.parquet"
            for folder in comparison_folders(w.comparison)
        ],
        code=code("compare"),
    output:
        csv="<results>/comparisons/{comparison}.csv",
        md="<results>/comparisons/{comparison}.md",
        html=report(
            "<results>/comparisons/{comparison}.html",
            caption="../report/table.rst",
            category="Tables",
            labels={"table": "{comparison}"},
        ),
    log:
        "<logs>/compare/{comparison}.log",
    wildcard_constraints:
        comparison=one_of(config["comparisons"]),
    localrule: True
    conda:
        "../../envs/report.yaml"
    params:
        title=lambda w: config["comparisons"][w.comparison]["title"],
        protocol=lambda w: config["comparisons"][w.comparison]["protocol"],
        pairs=comparison_pairs,
        folders=lambda w: comparison_folders(w.comparison),
        statistics=config["statistics"],
    message:
        "Comparing {wildcards.comparison}"
    script:
        "../scripts/compare.py"


rule costs:
    "Lay out what the edits took: seconds by stage, steps, memory."
    input:
        timing=[f"<results>/{run.folder()}/timing.json" for run in default_runs()],
        code=code("costs"),
    output:
        csv="<results>/tables/costs.csv",
        md="<results>/tables/costs.md",
        html=report(
            "<results>/tables/costs.html",
            caption="../report/table.rst",
            category="Tables",
            labels={"table": "costs"},
        ),
    log:
        "<logs>/costs/costs.log",
    conda:
        "../../envs/report.yaml"
    params:
        runs=[run_labels(run) for run in default_runs()],
    message:
        "Laying out time and memory"
    script:
        "../scripts/costs.py"


rule index:
    "Put findings, tables, figures and how they were made on one page."
    input:
        findings="<results>/tables/findings.md",
        tables=[f"<results>/{path}.md" for path in table_paths()],
        figures=expand("<results>/figures/{figure}.png", figure=config["figures"]),
        runs=[f"<results>/{run.folder()}/run.json" for run in RUNS],
        timing=[f"<results>/{run.folder()}/timing.json" for run in RUNS],
        code=code("index"),
    output:
        html="<results>/index.html",
    log:
        "<logs>/index/index.log",
    conda:
        "../../envs/report.yaml"
    params:
        title="KME-Bench: what editing single facts does to language models",
        tables=table_paths(),
        figures={name: spec["title"] for name, spec in config["figures"].items()},
        notebooks=sorted(config["notebooks"]),
    message:
        "Writing the summary page"
    script:
        "../scripts/index.py"


rule findings:
    "Test the paper's claims on the runs that can."
    input:
        claims=CLAIMS,
        predictions=finding_files("predictions.parquet"),
        timing=finding_files("timing.json"),
        code=code("findings"),
    output:
        csv="<results>/tables/findings.csv",
        md="<results>/tables/findings.md",
        html=report(
            "<results>/tables/findings.html",
            caption="../report/table.rst",
            category="Tables",
            labels={"table": "findings"},
        ),
    log:
        "<logs>/findings/findings.log",
    conda:
        "../../envs/report.yaml"
    params:
        results=lambda w: results_folder(),
        cells=lambda w: finding_cells(),
        statistics=config["statistics"],
    message:
        "Testing what the paper claims"
    script:
        "../scripts/findings.py"


rule node_importance:
    "Average the impact of every node of the critical paths over the requests."
    input:
        paths="<results>/trace/{model}/{dataset}/paths/{selection}.safetensors",
        code=code("node_importance"),
    output:
        nodes="<results>/trace/{model}/{dataset}/nodes/{selection}.parquet",
    log:
        "<logs>/node_importance/{model}.{dataset}.{selection}.log",
    wildcard_constraints:
        selection=SELECTION,
    localrule: True
    conda:
        "../../envs/report.yaml"
    params:
        statistics=config["statistics"],
    message:
        "Importance of the nodes of {wildcards.selection} in {wildcards.model} on {wildcards.dataset}"
    script:
        "../scripts/node_importance.py"


rule figure:
    "Draw one figure, with the numbers behind it."
    input:
        files=figure_files,
        code=code("figure"),
    output:
        pdf="<results>/figures/{figure}.pdf",
        png=report(
            "<results>/figures/{figure}.png",
            caption="../report/figure.rst",
            category="Figures",
            labels={"figure": "{figure}"},
        ),
        csv="<results>/figures/{figure}.csv",
    log:
        "<logs>/figure/{figure}.log",
    wildcard_constraints:
        figure=one_of(config["figures"]),
    localrule: True
    conda:
        "../../envs/report.yaml"
    params:
        figure=figure_params,
    message:
        "Drawing {wildcards.figure}"
    script:
        "../scripts/figure.py"


rule tune:
    "Choose hyper-parameters from a sweep on development splits."
    input:
        metrics="<results>/metrics/{experiment}.parquet",
        code=code("tune"),
    output:
        config="<results>/tuning/{experiment}.yaml",
    log:
        "<logs>/tune/{experiment}.log",
    wildcard_constraints:
        experiment=one_of(config["experiments"]),
    localrule: True
    conda:
        "../../envs/report.yaml"
    params:
        candidates=tuning_candidates,
        mode=tuned_mode,
    message:
        "Choosing hyper-parameters from {wildcards.experiment}"
    script:
        "../scripts/tune.py"


rule runs:
    "All runs of all experiments."
    input:
        [f"<results>/{run.folder()}/predictions.parquet" for run in RUNS],
    localrule: True


rule metrics:
    "The metrics of all experiments."
    input:
        expand(
            "<results>/metrics/{experiment}.parquet", experiment=config["experiments"]
        ),
    localrule: True


rule figures:
    "All figures."
    input:
        expand("<results>/figures/{figure}.pdf", figure=config["figures"]),
    localrule: True


rule tables:
    "All tables and comparisons."
    input:
        [f"<results>/{path}.md" for path in [*table_paths(), "tables/findings"]],
    localrule: True
