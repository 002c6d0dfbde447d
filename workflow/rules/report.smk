# From predictions to the paper's tables. Nothing here imports torch.


rule score:
    "Compute the metrics of all protocols for every run of one experiment."
    input:
        predictions=reported.run_files("predictions.parquet"),
        timing=reported.run_files("timing.json"),
        health=reported.health_files,
        original=reported.original_files,
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
        runs=reported.runs,
        originals=reported.originals,
        controls=grid.controls(config),
        statistics=config["statistics"],
    message:
        "Scoring {wildcards.experiment}"
    script:
        "../scripts/score.py"


rule table:
    "Lay one experiment out as the paper's table, beside the paper's own numbers."
    input:
        metrics=reported.table_metrics,
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
        table=reported.table,
    message:
        "Writing {wildcards.table}"
    script:
        "../scripts/table.py"


rule compare:
    "Compare runs in pairs on the same requests."
    input:
        predictions=reported.comparison_files,
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
        pairs=reported.comparison_pairs,
        folders=reported.comparison_folders,
        statistics=config["statistics"],
    message:
        "Comparing {wildcards.comparison}"
    script:
        "../scripts/compare.py"


rule costs:
    "Lay out what the edits took: seconds by stage, steps, memory."
    input:
        timing=[
            f"<results>/{run.folder()}/timing.json" for run in reported.default_runs
        ],
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
        runs=reported.default_labels,
    message:
        "Laying out time and memory"
    script:
        "../scripts/costs.py"


rule index:
    "Put findings, tables, figures and how they were made on one page."
    input:
        findings="<results>/tables/findings.csv",
        tables=[f"<results>/{path}.md" for path in reported.table_paths],
        figures=expand("<results>/figures/{figure}.png", figure=config["figures"]),
        metrics=expand(
            "<results>/metrics/{experiment}.parquet", experiment=config["experiments"]
        ),
        predictions=page.predictions,
        paths=page.paths,
        runs=[f"<results>/{run.folder()}/run.json" for run in inputs.runs],
        timing=[f"<results>/{run.folder()}/timing.json" for run in inputs.runs],
        code=code("index"),
    output:
        html="<results>/index.html",
    log:
        "<logs>/index/index.log",
    conda:
        "../../envs/report.yaml"
    params:
        title="KME-Bench: what editing single facts does to language models",
        results=lambda w: RESULTS,
        tables=reported.table_paths,
        notebooks=sorted(config["notebooks"]),
        page=page.shown(),
    message:
        "Writing the summary page"
    script:
        "../scripts/index.py"


rule findings:
    "Test the paper's claims on the runs that can."
    input:
        claims=CLAIMS,
        predictions=reported.finding_files("predictions.parquet"),
        timing=reported.finding_files("timing.json"),
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
        results=lambda w: RESULTS,
        cells=reported.finding_cells,
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
        files=reported.figure_files,
        code=code("figure"),
    output:
        pdf="<results>/figures/{figure}.pdf",
        svg="<results>/figures/{figure}.svg",
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
        figure=reported.figure,
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
        candidates=reported.candidates,
        mode=reported.tuned_mode,
    message:
        "Choosing hyper-parameters from {wildcards.experiment}"
    script:
        "../scripts/tune.py"


rule runs:
    "All runs of all experiments."
    input:
        [f"<results>/{run.folder()}/predictions.parquet" for run in inputs.runs],
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
        [f"<results>/{path}.md" for path in [*reported.table_paths, "tables/findings"]],
    localrule: True
