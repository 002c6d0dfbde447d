"""What is reported: inputs and parameters of metrics, tables, figures and pages. Holds no rule."""

from kmebench.planning import claims

CLAIMS = "resources/paper/findings.yaml"


def experiment_files(name):
    """An input function: one file of every run of an experiment."""

    def files(wildcards):
        runs = grid.runs_of(config, wildcards.experiment)
        return [f"<results>/{run.folder()}/{name}" for run in runs]

    return files


def experiment_originals(wildcards):
    """(model, data set) of every unedited model that an experiment compares with."""
    runs = grid.runs_of(config, wildcards.experiment)
    return sorted({(run.model, run.dataset) for run in runs})


def comparison_folders(comparison):
    """The run folders that a comparison reads, each once."""
    sides = [run for _, *sides in grid.pairs_of(config, comparison) for run in sides]
    return sorted({run.folder() for run in sides})


def comparison_pairs(wildcards):
    """The pairs of a comparison, with the names that its table shows."""
    spec = config["comparisons"][wildcards.comparison]["pairs"]
    return [
        {
            "name": name,
            "question": spec[name]["question"],
            "model": labels("models", a.model)["label"],
            "dataset": labels("datasets", a.dataset)["label"],
            "a": a.folder(),
            "b": b.folder(),
        }
        for name, a, b in grid.pairs_of(config, wildcards.comparison)
    ]


def tuning_candidates(wildcards):
    """Every run of a sweep with the values it tries."""
    runs = grid.swept_runs(config, wildcards.experiment)
    return [asdict(run) | {"values": values} for run, values in runs]


def tuned_mode(wildcards):
    """The mode that a sweep tunes alone; None where its values hold in all."""
    spec = config["experiments"][wildcards.experiment]
    return spec["mode"] if spec["tunes"] == "mode" else None


def labels(section, name):
    """The names of a model, data set or method in tables: {label, paper_name}.

    A development split is not what the paper reports on, so it has no name there.
    """
    reported = name.removesuffix(grid.DEVELOPMENT)
    spec = config[section][reported]
    label = spec.get("label", reported)
    if reported != name:
        return {"label": f"{label}, development split", "paper_name": None}
    return {"label": label, "paper_name": spec.get("paper_name")}


def table_params(wildcards):
    """What a table shows."""
    experiment = config["tables"][wildcards.table]["experiment"]
    spec = config["experiments"][experiment]

    def chosen(section):
        return {name: labels(section, name) for name in spec[section]}

    return {
        "title": config["tables"][wildcards.table]["title"],
        "protocol": config["tables"][wildcards.table]["protocol"],
        "mode": spec["mode"],
        "models": chosen("models"),
        "datasets": chosen("datasets"),
        "methods": chosen("methods"),
    }


def figure_runs(figure):
    """The runs that a figure shows, each with the value of the swept parameter."""
    spec = config["figures"][figure]
    parameter = spec.get("parameter")
    runs = []
    for run, values in grid.swept_runs(config, spec["experiment"]):
        known = {"seed": run.seed} | values
        runs.append((run, known[parameter] if parameter else grid.DEFAULT))
    # The nodes of a data set are the same whichever run asks for them.
    if spec["kind"] == "nodes":
        runs = [(run, value) for run, value in runs if grid.needed(config, run, Paths)]
    return runs


def figure_files(wildcards):
    """The files that a figure is drawn from, in the order of its runs where it needs each."""
    spec = config["figures"][wildcards.figure]
    if spec["kind"] == "paper":
        return [f"<results>/tables/{table}.csv" for table in spec["tables"]]
    if spec["kind"] in ("sweep", "edits"):
        return [f"<results>/metrics/{spec['experiment']}.parquet"]
    runs = [run for run, _ in figure_runs(wildcards.figure)]
    if spec["kind"] == "nodes":
        return [
            f"<results>/trace/{run.model}/{run.dataset}/nodes/"
            f"{grid.needed(config, run, Paths).name}.parquet"
            for run in runs
        ]
    name = {"time": "timing.json", "norms": "run.json"}[spec["kind"]]
    return [f"<results>/{run.folder()}/{name}" for run in runs]


def figure_params(wildcards):
    """What a figure shows."""
    spec = config["figures"][wildcards.figure]
    runs = [] if spec["kind"] == "paper" else figure_runs(wildcards.figure)
    return {
        **spec,
        "tables": [config["tables"][name]["title"] for name in spec.get("tables", [])],
        "protocol": spec.get("protocol", "token"),
        "runs": [asdict(run) | {"value": value} for run, value in runs],
        "labels": {
            section: {name: labels(section, name)["label"] for name in names}
            for section, names in (
                ("models", config["models"]),
                ("datasets", grid.datasets(config)),
                ("methods", config["methods"]),
            )
        },
    }


def finding_cells():
    """Where each claim of the paper can be tested, with the run folder (or path file) by role."""
    cells = []
    for claim in claims.read_claims(CLAIMS):
        for model, dataset, sides in claims.cells_of(config, claim):
            if claim.test["kind"] == "layers":
                files = {
                    role: grid.needed(config, run, Paths).path(model, dataset)
                    for role, run in sides.items()
                }
            else:
                files = {role: run.folder() for role, run in sides.items()}
            cells.append(
                {
                    "claim": claim.id,
                    "model": labels("models", model)["label"],
                    "dataset": labels("datasets", dataset)["label"],
                    "sides": files,
                    "names": {role: side_name(run) for role, run in sides.items()},
                }
            )
    return cells


def side_name(run):
    """What readers see of a run that a claim is tested on."""
    name = labels("methods", run.method)["label"]
    return name if run.variant == grid.DEFAULT else f"{name}, {run.variant}"


def finding_files(name):
    """An input function: the files called ``name`` in the folders that claims are tested on."""

    def files(wildcards):
        paths = {side for cell in finding_cells() for side in cell["sides"].values()}
        return sorted(
            (
                f"<results>/{path}/{name}"
                if path.startswith("runs/")
                else f"<results>/{path}"
            )
            for path in paths
            if path.startswith("runs/") or name == "predictions.parquet"
        )

    return files


def default_runs():
    """The runs of the configured hyper-parameters and seed."""
    return [r for r in RUNS if (r.variant, r.seed) == (grid.DEFAULT, config["seed"])]


def run_labels(run):
    """What readers see of a run."""
    return {
        "model": labels("models", run.model)["label"],
        "dataset": labels("datasets", run.dataset)["label"],
        "mode": run.mode,
        "editor": labels("methods", run.method)["label"],
    }


def table_paths():
    """Every table and comparison but the findings, as a path below results without its ending."""
    paths = [f"tables/{name}" for name in [*config["tables"], "costs"]]
    return paths + [f"comparisons/{name}" for name in config["comparisons"]]


def print_tables():
    """Show the finished tables of the paper on the terminal, and say where the rest is."""
    results = Path(results_folder())
    papers = [name for name, spec in config["tables"].items() if "paper" in spec]
    made = [results / "tables" / f"{name}.md" for name in papers]
    made += [results / "comparisons" / f"{name}.md" for name in config["comparisons"]]
    for path in made:
        if path.is_file():
            print(f"\n{path.read_text(encoding='utf-8')}\n[{path}]")
    page = results / "index.html"
    if page.is_file():
        print(f"\nAll tables, figures and findings on one page: {page}")
