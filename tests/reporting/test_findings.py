"""The paper's claims, judged on runs."""

import copy
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from safetensors.numpy import save_file

from kmebench.data.forms import SCHEMAS
from kmebench.errors import DataError
from kmebench.evaluation.frames import write_frame
from kmebench.evaluation.schema import PREDICTIONS
from kmebench.planning.claims import AMONG_ALL, Claim, absent, cells_of, read_claims
from kmebench.planning.config import check_config, read_config
from kmebench.reporting.findings import Runs, Verdict, findings, findings_markdown, judge

CLAIMS = Path("resources/paper/findings.yaml")
N = 40


def write_run(folder, right, seconds=1.0, n=N):
    """A run whose ``right[kind]`` of the first requests are answered as wanted."""
    rows = []
    for i in range(n):
        for kind in right:
            row = dict.fromkeys(PREDICTIONS.names)
            row |= {"case_id": str(i), "position": i, "kind": kind, "prompt": "p", "target": "t"}
            row |= {"when": "final", "edits_done": n, "batch": 0, "target_ids": [1]}
            row |= {"before_ids": [1], "after_ids": [1 if i < right[kind] else 2]}
            rows.append(row)
    folder.mkdir(parents=True)
    write_frame(pd.DataFrame(rows), PREDICTIONS, folder / "predictions.parquet")
    calls = [{"requests": 1, "seconds": {"optimise": seconds + 0.01 * (i % 3)}} for i in range(n)]
    (folder / "timing.json").write_text(json.dumps({"calls": calls, "steps_per_call": 8 * seconds}))


@pytest.fixture
def runs(tmp_path):
    write_run(tmp_path / "good", {"edit": 40, "paraphrase": 30, "locality": 30}, seconds=2.0)
    write_run(tmp_path / "fair", {"edit": 38, "paraphrase": 29, "locality": 29}, seconds=1.0)
    write_run(tmp_path / "poor", {"edit": 1, "paraphrase": 0, "locality": 2}, seconds=0.5)
    return Runs(tmp_path, {"resamples": 500, "seed": 0})


def claim(edits=0, **test):
    return Claim("id", "A claim.", "Table 1", "1.0", test, edits)


def verdict(runs, sides, edits=0, **test):
    return judge(claim(edits, **test), sides, {k: k.upper() for k in sides}, runs).verdict


@pytest.mark.parametrize(
    "test",
    [
        {"kind": "best", "method": "a"},
        {"kind": "difference"},
        {"kind": "above", "value": 50},
    ],
    ids=lambda test: test["kind"],
)
def test_a_claim_about_prompts_that_there_are_not_is_not_judged(tmp_path, test):
    for side in "ab":
        write_run(tmp_path / side, {"edit": 40, "locality": 30})
    runs, sides = Runs(tmp_path, {"resamples": 50, "seed": 0}), {"a": "a", "b": "b"}
    assert verdict(runs, sides, metric="efficacy", **test) in ("holds", "undecided")
    found = judge(claim(metric="generality", **test), sides, sides, runs)
    assert found == Verdict("no prompts for generality", 0, "not asked")


def test_the_best_must_be_better_beyond_chance(runs):
    sides = {"pac": "good", "a": "fair", "b": "poor"}
    best = {"kind": "best", "metric": "score"}
    assert verdict(runs, {"pac": "good", "b": "poor"}, method="pac", **best) == "holds"
    assert verdict(runs, sides, method="b", **best) == "does not hold"
    assert verdict(runs, {"pac": "fair", "a": "good"}, method="pac", **best) != "holds"
    names = {"pac": "PAC", "a": "Other", "b": "B"}
    found = judge(claim(method="a", **best), sides, names, runs).found
    assert found.startswith("Other 80.0 − PAC 83.3: -3.33 [")


def test_the_least_is_the_best_upside_down(runs):
    least = {"kind": "least", "metric": "locality", "method": "pac"}
    assert verdict(runs, {"pac": "poor", "a": "fair"}, **least) == "holds"
    assert verdict(runs, {"pac": "fair", "a": "poor"}, **least) == "does not hold"


def test_the_best_of_some_is_not_the_best_of_all(runs):
    """Who is beaten by one is not the best; who beats some may be."""
    best = claim(kind="best", metric="score", method="pac", editors=["Ours", "X", "Y"])
    names = {"pac": "PAC", "a": "A"}
    for ours, other, left, wanted in (
        ("good", "poor", [], "holds"),
        ("good", "poor", ["Y"], "not testable without all rivals"),
        ("poor", "good", ["Y"], "does not hold"),
        ("good", "good", ["Y"], "undecided"),
    ):
        assert judge(best, {"pac": ours, "a": other}, names, runs, left).verdict == wanted
    sides = {"pac": "good", "a": "poor"}
    assert judge(best, sides, names, runs, ["X", "Y"]).found.endswith("; rivals: A; without X, Y")
    assert judge(best, sides, names, runs).found.endswith("; rivals: all 1")


def test_a_difference_without_a_sign_stays_open(runs):
    test = {"kind": "difference", "metric": "efficacy", "a": {"method": "x"}, "b": {"method": "x"}}
    assert verdict(runs, {"a": "good", "b": "poor"}, **test) == "holds"
    assert verdict(runs, {"a": "poor", "b": "good"}, **test) == "does not hold"
    assert verdict(runs, {"a": "good", "b": "good"}, **test) == "undecided"


def test_numbers_are_passed_by_whole_intervals(runs):
    above = {"kind": "above", "metric": "efficacy", "value": 91}
    assert verdict(runs, {"a": "good"}, **above) == "holds"
    assert verdict(runs, {"a": "fair"}, **above) == "undecided"
    assert verdict(runs, {"a": "good", "b": "poor"}, **above) == "does not hold"
    below = {"kind": "below", "metric": "score", "value": 10}
    assert verdict(runs, {"a": "poor"}, **below) == "holds"
    assert verdict(runs, {"a": "poor", "b": "good"}, **below) == "does not hold"


def test_forty_of_forty_do_not_show_that_98_percent_are_right(runs):
    """Where 91.2% are right, so many are in 2.5% of draws: 0.025^(1/40)."""
    above = {"kind": "above", "metric": "efficacy"}
    assert verdict(runs, {"a": "good"}, value=98, **above) == "undecided"
    found = judge(claim(value=98, **above), {"a": "good"}, {"a": "PAC"}, runs).found
    assert found == "PAC 100.0 [91.2, 100.0]"


def test_what_many_edits_ruin_is_not_refuted_by_few(runs):
    below = {"kind": "below", "metric": "score", "value": 10}
    assert verdict(runs, {"a": "good"}, edits=3000, **below) == "not testable at this scale"
    assert verdict(runs, {"a": "good"}, edits=N, **below) == "does not hold"
    assert verdict(runs, {"a": "poor"}, edits=3000, **below) == "holds at 40 edits"


@pytest.mark.parametrize(
    ("edits", "scale"), [(3000, " at 40 edits"), (N + 1, " at 40 edits"), (N, ""), (0, "")]
)
def test_a_verdict_on_fewer_edits_than_the_papers_names_them(runs, edits, scale):
    names = ("a", "b")
    for kind, ours, other, wanted in (
        ("best", "good", "poor", "holds"),
        ("best", "poor", "good", "does not hold"),
        ("least", "poor", "good", "holds"),
        ("difference", "poor", "good", "does not hold"),
        ("difference", "good", "good", "undecided"),
        ("above", "good", "good", "holds"),
    ):
        test = {"kind": kind, "metric": "efficacy", "method": "a", "value": 50}
        found = verdict(runs, dict(zip(names, (ours, other), strict=True)), edits=edits, **test)
        assert found == wanted + scale
    assert verdict(runs, {"a": "good", "b": "poor"}, edits=edits, **test) == "does not hold" + scale


def test_time_is_compared_edit_by_edit_and_tests_nothing(runs):
    """A run that had the machine for itself, with fewer steps, takes less time."""
    sides = {"pac": "fair", "full-c": "good", "kn": "poor"}
    names = {"pac": "PAC", "full-c": "Full-C", "kn": "KN"}
    faster = judge(claim(kind="faster", a="pac", b="full-c"), sides, names, runs)
    assert faster.verdict == "not tested"
    assert faster.found == "Full-C − PAC: +1.00 [+1.00, +1.00] s per edit, in 16.0 and 8.0 steps"
    slowest = judge(claim(kind="slowest", method="pac"), sides, names, runs)
    assert slowest.verdict == "not tested"
    assert slowest.found.startswith("PAC − Full-C (the slowest other): -1.00 [")
    assert slowest.found.endswith("in 8.0 and 16.0 steps")


def test_long_runs_are_judged_at_every_milestone(tmp_path):
    """What holds after a hundred edits need not after three hundred."""
    for name, then, at_end in (("a", 40, 1), ("b", 1, 40)):
        kinds = ("edit", "paraphrase", "locality")
        write_run(tmp_path / "then" / name, dict.fromkeys(kinds, then))
        write_run(tmp_path / name, dict.fromkeys(kinds, at_end))
        file = tmp_path / name / "predictions.parquet"
        early = pd.read_parquet(tmp_path / "then" / name / "predictions.parquet")
        asked = [early.assign(when="milestone", edits_done=done) for done in (30, 100)]
        write_frame(pd.concat([*asked, pd.read_parquet(file)]), PREDICTIONS, file)
    runs = Runs(tmp_path, {"resamples": 100, "seed": 0})
    cell = {"claim": "id", "model": "M", "dataset": "D", "sides": {"a": "a", "b": "b"}}
    cell |= {"names": {"a": "A", "b": "B"}, "absent": []}
    best = {"kind": "best", "metric": "score", "method": "a"}
    table = findings([claim(**best, mode="consecutive", edits=3000)], [cell], runs)
    assert table[["edits", "n", "verdict"]].to_numpy().tolist() == [
        [100, 40, "holds at 100 edits"],
        [40, 40, "does not hold at 40 edits"],
    ]
    assert "100, 40 asked (3000)" in findings_markdown(table)
    below = {"kind": "below", "metric": "score", "value": 10, "mode": "consecutive"}
    cell["sides"] = {"a": "a"}
    for edits, wanted in ((3000, "not testable at this scale"), (100, "does not hold")):
        table = findings([claim(**below, edits=edits)], [cell], runs)
        assert table["verdict"].tolist() == [wanted, "holds at 40 edits"]
    assert findings([claim(**best, mode="batch")], [cell | {"sides": {"a": "a", "b": "b"}}], runs)[
        "edits"
    ].tolist() == [40]


@pytest.mark.parametrize(("n", "wanted"), [(19, "too few edits (19)"), (20, "holds")])
def test_a_claim_is_judged_from_twenty_edits_on(n, wanted, tmp_path):
    for name, right in (("good", n), ("poor", 0)):
        kinds = dict.fromkeys(("edit", "paraphrase", "locality"), right)
        write_run(tmp_path / name, kinds, seconds=1.0 + right, n=n)
    runs = Runs(tmp_path, {"resamples": 500, "seed": 0})
    sides = {"a": "good", "b": "poor"}
    assert verdict(runs, sides, kind="best", metric="score", method="a") == wanted
    assert verdict(runs, {"a": "good"}, kind="above", metric="efficacy", value=80) == wanted


def test_middle_layers_are_compared_per_layer(runs, tmp_path):
    generator = np.random.default_rng(0)
    scores = generator.random((N, 8, 2, 3)).astype(np.float32)
    test = {"kind": "layers", "method": "pac", "from": 0.25, "to": 0.5}
    save_file({"positive_scores": scores}, tmp_path / "even.safetensors")
    scores[:, 2:4] += 1
    save_file({"positive_scores": scores}, tmp_path / "middle.safetensors")
    scores[:, 7] += 9
    save_file({"positive_scores": scores}, tmp_path / "late.safetensors")
    wanted = {"even": "undecided", "middle": "holds", "late": "does not hold"}
    for name, expected in wanted.items():
        assert verdict(runs, {"pac": f"{name}.safetensors"}, **test) == expected


@pytest.mark.parametrize(("depth", "first", "last"), [(32, 3, 17), (30, 3, 16), (24, 2, 13)])
def test_the_middle_is_layers_4_to_18_of_32_counted_from_1(depth, first, last, tmp_path):
    """Only those layers have all of the impact; one less or one more would spread it."""
    (middle,) = (c for c in read_claims(CLAIMS) if c.id == "middle-layers")
    scores = np.zeros((N, depth, 2, 3), dtype=np.float32)
    scores[:, first : last + 1] = 1
    save_file({"positive_scores": scores}, tmp_path / "paths.safetensors")
    runs = Runs(tmp_path, {"resamples": 10, "seed": 0})
    gap = runs.middle("paths.safetensors", middle.test["from"], middle.test["to"])
    assert gap[0] == pytest.approx(100 / (last + 1 - first))


def test_a_claim_that_no_run_tests_is_shown_as_such(runs):
    table = findings([claim(kind="best", method="pac", metric="score")], [], runs)
    assert table["verdict"].tolist() == ["not run"]
    assert "| –" in findings_markdown(table)


def test_every_claim_of_the_paper_finds_its_runs_in_the_config_of_the_real_data():
    config = read_config(Path("config.yaml"), [Path("config/real.yaml")])
    check_config(config)
    claims = read_claims(CLAIMS)
    assert len({c.id for c in claims}) == len(claims) >= 12
    for one in claims:
        cells = cells_of(config, one)
        assert ("smollm2-135m", "zsre") in [c[:2] for c in cells] or (
            one.test["dataset"] == "CounterFact" and cells
        ), one.id
    (contrast,) = (c for c in claims if c.id == "contrast")
    sides = cells_of(config, contrast)[0][2]
    assert sides["b"].variant == "lambda=0.0"


def test_without_one_of_its_runs_a_claim_is_not_tested():
    config = read_config(Path("config.yaml"))
    check_config(config)
    fewer = copy.deepcopy(config)
    fewer["experiments"]["ablation-lambda"]["sweep"]["lambda"] = [0.1, 1.0]
    fewer["experiments"]["table1"]["methods"] = ["pac"]
    del fewer["methods"]["rome"]
    for name in ("table2", "table1"):
        methods = fewer["experiments"][name]["methods"]
        fewer["experiments"][name]["methods"] = [m for m in methods if m != "rome"]
    found = {c.id: cells_of(fewer, c) for c in read_claims(CLAIMS)}
    for untested in ("contrast", "r-rome", "score-zsre-batch"):
        assert not found[untested]
    assert found["efficacy-batch"]
    assert found["large-lambda"]


def test_what_runs_on_a_development_split_tests_no_claim():
    config = read_config(Path("config.yaml"))
    check_config(config)
    for experiment in config["experiments"].values():
        experiment["datasets"] = [f"{name}.development" for name in experiment["datasets"]]
    assert not any(cells_of(config, claim) for claim in read_claims(CLAIMS))


def test_the_editors_of_a_claim_are_those_of_the_papers_table():
    for claim in read_claims(CLAIMS):
        if claim.test["kind"] in AMONG_ALL:
            number = 1 if claim.test["mode"] == "batch" else 2
            table = pd.read_csv(f"resources/paper/table{number}.csv")
            editors = set(table.loc[table["dataset"] == claim.test["dataset"], "editor"])
            assert set(claim.test["editors"]) == editors - {"Original Model"}


def cells_among(methods):
    """Cells and what is absent, of the claims about all editors in consecutive editing of ZsRE."""
    config = read_config(Path("config.yaml"))
    config["experiments"]["table2"]["methods"] = methods
    check_config(config)
    (best,) = (c for c in read_claims(CLAIMS) if c.id == "score-zsre-consecutive")
    cells = cells_of(config, best)
    return [(set(sides), set(absent(config, best, sides))) for _, _, sides in cells]


def test_rivals_are_the_papers_editors():
    """No floor, which keeps all of Locality; no method that the paper has not."""
    table = {"full-c", "rome", "r-rome", "kn", "memit", "pmet", "emmet", "alphaedit", "lora", "pac"}
    more = ["none", "npac", "ultraedit", "prune", "rect"]  # PRUNE and RECT: in its Table 1 alone
    assert cells_among([*more, *table]) == [(table, set())]
    assert cells_among(["none", "npac", "ultraedit", "pac"]) == []
    ((sides, left),) = cells_among(["pac", "npac", "pac-released", "full-c-epochs", "rome"])
    assert sides == {"pac", "full-c-epochs", "rome"}  # its own other schedule is no rival
    assert left == {"R-ROME", "KN", "MEMIT", "PMET", "EMMET", "AlphaEdit", "LoRA"}


def test_a_form_that_is_none_of_the_papers_tests_no_claim(monkeypatch):
    config = read_config(Path("config.yaml"))
    check_config(config)
    monkeypatch.setitem(SCHEMAS, "mine", SCHEMAS["mend"]._replace(paper_dataset=None))
    for schema in ("mine", "unheard-of"):
        config["datasets"]["openfacts-zsre"]["schema"] = schema
        found = {place[1] for c in read_claims(CLAIMS) for place in cells_of(config, c)}
        assert found == {"openfacts-counterfact"}


@pytest.mark.parametrize(
    "change", [{"test": {"kind": "worst"}}, {"test": {"kind": "best"}}, {"colour": "red"}]
)
def test_a_wrong_claim_is_named(change, tmp_path):
    records = yaml.safe_load(CLAIMS.read_text(encoding="utf-8"))[:2]
    records[1] |= change
    path = tmp_path / "claims.yaml"
    path.write_text(yaml.safe_dump(records), encoding="utf-8")
    with pytest.raises(DataError, match=r"claims\.yaml, claim"):
        read_claims(path)
