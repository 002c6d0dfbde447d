"""Figures and the tables behind them."""

import json

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file

from kmebench.errors import KMEBenchError
from kmebench.evaluation.frames import write_frame
from kmebench.evaluation.schema import NORMS
from kmebench.pipelines.checkpoints import Outcome, norms_frame
from kmebench.planning.appearance import Style
from kmebench.reporting import figure_tables, figures, panels
from kmebench.reporting.paper import COLUMNS
from tests.conftest import RUN

LABELS = {
    "models": {"m": "Model"},
    "datasets": {"d": "Data"},
    "methods": {"full-c": "Full-C", "pac": "PAC"},
}

STYLES = {"Full-C": Style("#009E73", "o"), "PAC": Style("#D55E00", "o")}

LINES = ["Efficacy", "Generality", "Locality", "Score"]


def metric(name="efficacy", value=0.5, **other):
    row = RUN | {"protocol": "token", "when": "final", "edits_done": 10, "metric": name}
    return row | {"n": 10, "value": value, "low": value - 0.1, "high": value + 0.1} | other


def write(path, content):
    path.write_text(json.dumps(content))
    return str(path)


def norms_file(folder, calls):
    """The file of a run whose calls changed parameters by these norms, two requests in each."""
    times = [{"requests": 2} for _ in calls]
    path = folder / "norms.parquet"
    write_frame(norms_frame(Outcome(times=times, norms=calls)), NORMS, path)
    return str(path)


def test_times_are_seconds_per_request_of_every_call(tmp_path):
    calls = [
        {"requests": 1, "seconds": {"trace": 0.5, "optimise": 1.0}},
        {"requests": 2, "seconds": {"optimise": 3.0}},
    ]
    file = write(tmp_path / "timing.json", {"calls": calls})
    table = figure_tables.times([file], [RUN], LABELS)
    assert table["seconds"].tolist() == [1.5, 1.5]
    assert set(table["editor"]) == {"PAC"}


def test_norms_of_one_layer_are_added_as_squares(tmp_path):
    norms = [{"model.layers.3.up.weight": 3.0, "model.layers.3.down.weight": 4.0}, {}]
    norms[1]["lm_head.weight"] = 5.0  # in no layer
    file = norms_file(tmp_path, norms)
    table = figure_tables.norms([file], [RUN], LABELS)
    assert table[["layer", "norm", "n"]].to_numpy().tolist() == [[3, 5.0, 2]]


def test_layers_of_edits_share_the_square_of_its_norm(tmp_path):
    norms = [
        {"model.layers.1.up.weight": 3.0, "model.layers.1.down.weight": 4.0},
        {"model.layers.0.down.weight": 1.0, "model.layers.2.down.weight": 2.0},
        {"model.layers.0.down.weight": 0.0},
        {},
    ]
    file = norms_file(tmp_path, norms)
    table = figure_tables.edit_layers([file], [RUN], LABELS)
    shares = table.pivot(index="record", columns="layer", values="share").to_numpy()
    assert shares.tolist() == [[0, 100, 0], [20, 0, 80]]
    figure = figures.by_layer(table, "‖ΔW‖²")
    assert figure.axes[0].get_ylabel() == "2 records"
    assert figure.axes[-1].get_ylabel() == "Share of ‖ΔW‖² (%)"
    file = norms_file(tmp_path, [{}])
    for table_of in (figure_tables.edit_layers, figure_tables.norms):
        with pytest.raises(KMEBenchError, match="set the figure to null"):
            table_of([file], [RUN], LABELS)


def test_a_sweep_takes_the_final_values_of_its_own_runs():
    metrics = pd.DataFrame(
        [
            metric(value=0.4, variant="paths=5"),
            metric(value=0.9, variant="paths=5", when="write"),
            metric(value=0.8, variant="paths=5", protocol="exact"),
            metric(value=0.1, method="original"),
            metric(value=0.6),
        ]
    )
    runs = [RUN | {"variant": "paths=5", "value": 5}, RUN | {"value": 15}]
    table = figure_tables.swept(metrics, runs, LABELS, "token")
    assert table["value"].tolist() == [5, 15]
    assert table["mean"].tolist() == pytest.approx([40, 60])
    assert table["high"].tolist() == pytest.approx([50, 70])
    assert table["metric"].tolist() == ["Efficacy"] * 2


def test_survival_joins_checkpoints_and_the_end_in_the_order_of_the_methods():
    metrics = pd.DataFrame(
        [
            metric(edits_done=1, when="milestone"),
            metric(edits_done=1, when="write"),
            metric(),
            metric(method="full-c"),
            metric(method="original"),
        ]
    )
    table = figure_tables.survival(metrics, LABELS, "token")
    assert table["editor"].tolist() == ["Full-C", "PAC", "PAC"]
    assert table["edits_done"].tolist() == [10, 1, 10]


def test_survival_shows_what_was_written_last_behind_all_so_far():
    metrics = pd.DataFrame(
        [
            metric(edits_done=300),
            metric("locality", edits_done=300),
            metric(value=0.9, edits_done=300, when="newest"),
            metric("locality", edits_done=300, when="newest"),
            metric("kl", 0.25, edits_done=300, protocol="health"),
        ]
    )
    table = figure_tables.survival(metrics, LABELS, "token")
    assert table["metric"].tolist() == ["Efficacy", "Locality", "Efficacy, newest 100", "KL"]
    assert table["mean"].tolist() == [50, 50, 90, 0.25]
    newest = figures.along_edits(table, STYLES).axes[2]
    assert newest.get_ylim() == (-4, 104)


def test_the_papers_ends_are_hollow_marks_at_its_number_of_edits():
    metrics = pd.DataFrame([metric(), metric(method="full-c"), metric("locality")])
    paper = pd.DataFrame(
        [
            {"model": m, "editor": "Ours", "dataset": "ZsRE", "efficacy": x, "locality": y}
            for m, x, y in (("A (6B)", 90.0, 80.0), ("B (7B)", 96.0, float("nan")))
        ]
    ).reindex(columns=COLUMNS)
    words = {"datasets": {"d": "ZsRE"}, "methods": {"pac": "Ours", "full-c": None}}
    ends = figure_tables.published_ends(paper, metrics, LABELS, words)
    columns = ["editor", "edits_done", "metric", "mean", "low", "high", "source"]
    assert ends[columns].to_numpy().tolist() == [
        ["PAC", 3000, "Efficacy", 93, 90, 96, "paper"],
        ["PAC", 3000, "Locality", 80, 80, 80, "paper"],
    ]
    ours = figure_tables.survival(metrics, LABELS, "token")
    figure = figures.along_edits(pd.concat([ours, ends], ignore_index=True), STYLES)
    hollow = [
        line.get_xydata().tolist()
        for line in figure.axes[0].lines
        if line.get_markerfacecolor() == "white"
    ]
    assert hollow == [[[3000, 93]]]
    assert {text.get_text() for text in figure.axes[0].texts} == {"Full-C", "PAC"}
    nothing = figure_tables.published_ends(paper, metrics, LABELS, words | {"methods": {}})
    assert nothing.empty


def test_survival_ends_with_the_health_of_the_model_in_its_own_units():
    def state(name, value, **other):
        nan = float("nan")
        return metric(name, value, protocol="health", **{"low": nan, "high": nan} | other)

    metrics = pd.DataFrame(
        [
            state("perplexity_ratio", 2.5),
            state("perplexity_ratio", 1.0, edits_done=1, when="milestone"),
            state("kl", 0.25),
            state("perplexity", 30.0),
            metric(method="full-c"),
        ]
    )
    table = figure_tables.survival(metrics, LABELS, "token")
    wanted = [["Efficacy", 50.0], ["Perplexity ×", 2.5], ["Perplexity ×", 1.0], ["KL", 0.25]]
    assert table[["metric", "mean"]].to_numpy().tolist() == wanted
    figure = figures.along_edits(table, STYLES)
    by_title = {axes.get_title(loc="left").split(" · ")[0]: axes for axes in figure.axes}
    assert list(by_title) == ["Efficacy", "Perplexity ×", "KL"]
    assert [axes.get_ylabel() for axes in figure.axes] == ["Percent", "Ratio", "Nats"]
    assert [axes.get_yscale() for axes in figure.axes] == ["linear", "log", "linear"]
    assert figure.axes[0].get_ylim() == (-4, 104)
    (line,) = [c for c in by_title["Perplexity ×"].containers if c.get_label() == "PAC"]
    assert line.lines[0].get_xydata().tolist() == [[1, 1.0], [10, 2.5]]
    assert {text.get_text() for axes in figure.axes for text in axes.texts} == {"Full-C", "PAC"}


def test_places_without_a_panel_are_empty():
    metrics = pd.DataFrame({"metric": LINES, "cell": "ZsRE"})
    figure, drawn = panels.in_lines(metrics, "metric", "cell")
    assert [axes.axison for axes in figure.axes] == [True] * 4 + [False] * 2
    assert [axes for axes, _ in drawn] == figure.axes[:4]


def test_only_cells_with_two_numbers_are_compared_with_the_paper():
    row = {"model": "m", "dataset": "d", "editor": "pac", "n": 50}
    for name, ours, paper in (
        ("efficacy", 90.0, 88.0),
        ("generality", 50.0, np.nan),
        ("locality", np.nan, 3.0),
        ("score", 60.0, 61.0),
    ):
        row |= {name: ours, f"{name}_low": ours, f"{name}_high": ours, f"{name}_paper": paper}
    wide = pd.DataFrame([row, row | {"editor": "original"}])
    table = figure_tables.against_paper({"Table 2": wide}, LABELS)
    assert table[["metric", "mean", "paper"]].to_numpy().tolist() == [
        ["Efficacy", 90.0, 88.0],
        ["Score", 60.0, 61.0],
    ]


def test_importance_is_a_share_within_each_request(tmp_path):
    scores = np.random.default_rng(0).random((20, 3, 2, 4)).astype(np.float32)
    scores[0] *= 1000  # a loud request counts as much as any other
    save_file({"positive_scores": scores}, tmp_path / "paths.safetensors")
    table = figure_tables.importance(tmp_path / "paths.safetensors", resamples=500, seed=0)
    assert table["importance"].sum() == pytest.approx(100)
    shares = scores / scores.sum(axis=(1, 2, 3), keepdims=True)
    wanted = table[(table["layer"] == 2) & (table["matrix"] == "value") & (table["rank"] == 4)]
    values = 100 * shares[:, 2, 1, 3].astype(np.float64)
    assert wanted["importance"].item() == pytest.approx(values.mean(), rel=1e-5)
    error = values.std() / len(values) ** 0.5
    assert wanted["high"].item() - wanted["low"].item() == pytest.approx(2 * 1.96 * error, rel=0.15)


def series(**columns):
    return pd.DataFrame(columns).assign(mean=50.0, low=40.0, high=60.0)


def lines(figure, panel=0):
    return figure.axes[panel].get_lines()


def test_a_sweep_has_a_line_for_every_metric_with_the_values_in_order():
    table = pd.concat(
        [series(metric=LINES).assign(model="M", dataset="D", value=v) for v in (20, 5, 15)]
    )
    figure = figures.sweep(table, "paths")
    axes = figure.axes[0]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["5", "15", "20"]
    assert len(axes.containers) == 4
    assert [t.get_text() for t in figure.legends[0].get_texts()] == LINES


def test_lines_along_edits_are_named_at_their_ends_without_overlaps():
    editors = [f"E{k}" for k in range(12)]
    table = pd.concat(
        [
            series(edits_done=[1, 3, 10]).assign(cell="D", metric=m, editor=editor, source="here")
            for editor in editors
            for m in ("Efficacy", "Locality")
        ]
    )
    figure = figures.along_edits(table, dict.fromkeys(editors, Style("#000000", "o")))
    assert len(figure.axes) == 2
    notes = figure.axes[0].texts
    assert [note.get_text() for note in notes] == editors
    heights = sorted(note.xyann[1] for note in notes)  # all lines end on one place
    assert np.diff(heights).min() >= 7  # points, the size of the letters
    assert {note.xy for note in notes} == {(10, 50.0)}


def test_time_is_drawn_as_mean_with_its_interval():
    seconds = [1.0, 2.0, 3.0, 10.0]
    table = pd.DataFrame({"model": "M", "dataset": "D", "editor": "PAC", "seconds": seconds})
    figure = figures.time_per_edit(table.assign(n=4), {"PAC": Style("#D55E00", "o")})
    assert figure.axes[0].get_xscale() == "log"
    points = np.concatenate([line.get_xdata() for line in figure.axes[0].get_lines()])
    assert 4.0 in points
    assert figure.axes[0].get_title(loc="left") == "D · 4 edits"
    bar = figure.axes[0].containers[0].lines[2][0].get_segments()[0][:, 0]
    assert bar[0] < 4.0 < bar[1]


def test_norms_are_a_map_of_editors_and_layers():
    table = pd.DataFrame(
        {"model": "M", "dataset": "D", "editor": ["A", "A", "B"], "layer": [0, 0, 2]}
    ).assign(norm=[1.0, 3.0, 8.0])
    figure = figures.weight_norms(table)
    grid = figure.axes[0].collections[0].get_array().reshape(2, 3)
    assert grid.filled(0).tolist() == [[2.0, 0, 0], [0, 0, 8.0]]


def test_records_of_the_layer_map_are_sorted_and_their_mean_stands_above():
    shares = np.array([[10.0, 10.0, 80.0], [70.0, 20.0, 10.0]])
    record, layer = (index.ravel() for index in np.indices(shares.shape))
    table = pd.DataFrame({"record": record, "layer": layer, "share": shares.ravel()})
    figure = figures.by_layer(table.assign(model="M", dataset="D", n=2), "the impact of T+")
    (image,) = figure.axes[0].images
    assert image.get_array().tolist() == shares[::-1].tolist()
    (above,) = figure.axes[0].child_axes
    assert [bar.get_height() for bar in above.patches] == [40.0, 15.0, 45.0]
    assert above.get_title(loc="left") == "D · 2 edits"


def test_only_differences_that_are_more_than_chance_have_a_colour():
    pairs = [("A", "B", 30.0), ("A", "C", -8.0), ("B", "C", -40.0)]
    table = pd.DataFrame(pairs, columns=["a", "b", "difference"])
    table = table.assign(low=table["difference"] - 10, high=table["difference"] + 10)
    figure = figures.paired_matrix(table.assign(model="M", dataset="D"))
    axes = figure.axes[0]
    grid = axes.collections[0].get_array().reshape(2, 2)
    assert grid.filled(np.nan)[0].tolist() == [30.0, 0.0]
    assert grid.mask.tolist() == [[False, False], [True, False]]
    assert grid[1, 1] == -40.0
    notes = [text.get_text() for text in axes.texts]
    assert notes == ["+30.0\n[+20.0, +40.0]", "-8.0\n[-18.0, +2.0]", "-40.0\n[-50.0, -30.0]"]


def test_the_same_figure_is_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        figure = figures.draw_layers(np.ones((3, 2)), "shares")
        panels.save(figure, *(tmp_path / f"{name}.{kind}" for kind in ("pdf", "svg", "png")))
    for kind in ("pdf", "svg", "png"):
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()


def test_a_table_without_rows_is_said_so():
    with pytest.raises(KMEBenchError, match="nothing to draw"):
        figures.paper_scatter(figure_tables.against_paper({}, LABELS))


@pytest.mark.parametrize("table", [figure_tables.nodes, figure_tables.layers])
def test_a_figure_of_paths_without_runs_that_have_them_says_what_to_do(table):
    with pytest.raises(KMEBenchError, match="set the figure to null"):
        table([], [], {})


def test_titles_of_panels_end_inside_the_figure():
    dataset, modes = "OpenFacts (CounterFact form)", ("Batch editing", "Consecutive editing")
    rows = [{"dataset": d, "mode": m, "n": 4} for d in (dataset, "ZsRE") for m in modes]
    figure, found = panels.panels(pd.DataFrame(rows), "dataset", "mode")
    figure.canvas.draw()
    for axes, _ in found:
        title = axes.title if axes.get_title() else axes._left_title
        assert title.get_window_extent().x1 <= figure.bbox.x1
    assert found[0][0].get_title(loc="left").splitlines() == [f"{dataset} · {modes[0]}", "4 edits"]
    assert found[2][0].get_title(loc="left") == "ZsRE · Batch editing · 4 edits"
