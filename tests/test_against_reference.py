"""The comparison with public reference code, on small folders that stand for a user's clones."""

import dataclasses
import importlib
import json
import math
import os
import sys
from collections import OrderedDict
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig

from kmebench.errors import KMEBenchError
from tests.reference_clones import ALPHAEDIT, EASYEDIT, PAC

FILES = {
    "EasyEdit": ["easyeditor/models/memit/memit_main.py", "easyeditor/util/nethook.py"],
    "AlphaEditCode": ["AlphaEdit/AlphaEdit_main.py", "globals.yml"],
    "PACCode": ["plms/gptj.py", "pac.py"],
}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend("benchmarks")
    yield importlib.import_module("against_reference")
    for name in list(sys.modules):
        if name.partition(".")[0] in ("against_reference", "common", "toolkits"):
            del sys.modules[name]


def clone(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def known(script, monkeypatch, kind: str, folder: Path) -> type:
    """Make the code of ``folder`` the known one."""
    cls = getattr(script, kind)
    release = dataclasses.replace(cls.release, digest=cls.release.digest_of(folder))
    monkeypatch.setattr(cls, "release", release)
    return cls


# -- which toolkit a folder is ------------------------------------------------------------------


@pytest.mark.parametrize("kind", FILES)
def test_a_toolkit_is_told_by_its_content(kind, script, monkeypatch, tmp_path):
    folder = clone(tmp_path / "a clone", dict.fromkeys(FILES[kind], "x = 1\n"))
    cls = known(script, monkeypatch, kind, folder)
    assert script.find_toolkit(folder) is cls


@pytest.mark.parametrize("kind", FILES)
def test_another_commit_is_one_sentence_that_names_the_right_one(kind, script, tmp_path):
    folder = clone(tmp_path, dict.fromkeys(FILES[kind], "x = 1\n"))
    with pytest.raises(KMEBenchError, match=r"checkout (14cea824|f5248d3d|12401021)$") as error:
        script.find_toolkit(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_without_a_toolkit_is_one_sentence(script, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["x", "--toolkit", str(tmp_path)])
    with pytest.raises(SystemExit) as error:
        script.main()
    assert "EasyEdit (14cea824), AlphaEdit (f5248d3d), PAC (12401021)" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_digest_sees_content_and_names_but_not_line_ends(script, tmp_path):
    release = script.EasyEdit.release
    files = {"easyeditor/util/a.py": "x = 1\ny = 2\n", "easyeditor/util/b.py": "z = 3\n"}
    digest = release.digest_of(clone(tmp_path / "a", files))
    changed = {**files, "easyeditor/util/b.py": "z = 4\n"}
    assert release.digest_of(clone(tmp_path / "b", changed)) != digest
    renamed = {
        "easyeditor/util/a.py": files["easyeditor/util/a.py"],
        "easyeditor/util/c.py": "z = 3\n",
    }
    assert release.digest_of(clone(tmp_path / "c", renamed)) != digest
    windows = clone(tmp_path / "d", files)
    for name, content in files.items():
        (windows / name).write_bytes(content.replace("\n", "\r\n").encode())
    assert release.digest_of(windows) == digest


def test_records_come_from_the_mirror_without_those_that_a_toolkit_would_fill(script, tmp_path):
    questions = ["What is A made of?", "What is {A} made of?", "Who made A?"]
    raw = [{"subject": "A", "src": text, "alt": "tin", "answers": ["zinc"]} for text in questions]
    for record in raw:
        record |= {"rephrase": "A is made of", "loc": "B is made of", "loc_ans": "iron"}
    raw[2]["alt"] = "{x}"
    (tmp_path / "own.json").write_text(json.dumps(raw))
    config = {"own": {"source": {"source": "file", "filenames": ["own.json"]}, "schema": "mend"}}
    (tmp_path / "scratch").mkdir()
    found = script.records("own", config, str(tmp_path), tmp_path / "scratch")
    assert [(r.prompt, r.target_new) for r in found] == [("What is {} made of?", "tin")]


# -- cosine and norm ratio ----------------------------------------------------------------------


def tensors(**values: list[float]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


@pytest.mark.parametrize(
    ("ours", "theirs", "cosine", "ratio"),
    [
        (tensors(a=[3.0, 4.0]), tensors(a=[3.0, 4.0]), 1.0, 1.0),
        (tensors(a=[3.0, 4.0]), tensors(a=[6.0, 8.0]), 1.0, 0.5),
        (tensors(a=[3.0, 4.0]), tensors(a=[-3.0, -4.0]), -1.0, 1.0),
        (tensors(a=[1.0, 0.0]), tensors(a=[0.0, 2.0]), 0.0, 0.5),
        # (1, 2, 2) and (2, 1, 2): 8 / 9, over two weights together.
        (tensors(a=[1.0, 2.0], b=[2.0]), tensors(a=[2.0, 1.0], b=[2.0]), 8 / 9, 1.0),
        # A weight that one side alone changes: (3, 4) and (3, 0).
        (tensors(a=[3.0], b=[4.0]), tensors(a=[3.0]), 0.6, 5 / 3),
    ],
)
def test_cosine_and_norm_ratio(ours, theirs, cosine, ratio, script):
    assert script.compare(ours, theirs) == pytest.approx((cosine, ratio), abs=1e-12)


def test_no_change_has_no_direction(script):
    assert all(map(math.isnan, script.compare(tensors(a=[0.0]), tensors(a=[1.0]))))
    assert all(map(math.isnan, script.compare(tensors(a=[1.0]), {})))


entries = st.lists(st.floats(-1e3, 1e3).filter(lambda x: abs(x) > 1e-3), min_size=4, max_size=4)


@settings(max_examples=100, deadline=None)
@given(a=entries, b=entries, scale=st.floats(0.01, 100))
def test_a_scale_moves_the_ratio_alone(a, b, scale):
    sys.path.insert(0, "benchmarks")
    try:
        compare = importlib.import_module("against_reference").compare
    finally:
        sys.path.remove("benchmarks")
    cosine, ratio = compare(tensors(a=a), tensors(a=b))
    again = compare(tensors(a=[scale * x for x in a]), tensors(a=b))
    assert again == pytest.approx((cosine, scale * ratio), rel=1e-9, abs=1e-9)
    assert abs(cosine) <= 1 + 1e-12
    assert compare(tensors(a=b), tensors(a=a))[1] == pytest.approx(1 / ratio)


# -- stand-ins ----------------------------------------------------------------------------------

CODE = {
    "kit/__init__.py": "raise RuntimeError('would import everything')\n",
    "kit/part/__init__.py": "",
    "kit/part/work.py": (
        "import os, sys\nfrom absent.deep import Thing, load\nfrom kit.part import other\n"
        "os.environ['KIT'] = '1'\nsys.path.append('./')\nmade = load('x').half()\n"
    ),
    "kit/part/other.py": "value = 7\n",
}


def standins():
    return importlib.import_module("toolkits.standins")


def interpreter() -> tuple:
    return (
        {name: id(module) for name, module in sys.modules.items()},
        list(sys.path),
        list(sys.meta_path),
        dict(os.environ),
        sys.dont_write_bytecode,
        os.getcwd(),
    )


def content(folder: Path) -> dict[str, bytes | None]:
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
    }


@pytest.mark.parametrize("failure", [False, True])
def test_stand_ins_leave_interpreter_and_clone_as_they_were(failure, script, monkeypatch, tmp_path):
    folder = clone(tmp_path, CODE)
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    monkeypatch.setitem(sys.modules, "kit", ModuleType("kit"))  # of somebody else
    monkeypatch.setitem(sys.modules, "absent", ModuleType("absent"))
    before, files = interpreter(), content(folder)
    block = standins().standing_in(folder, ["kit"], empty=["kit"], unused=["absent"])
    try:
        with block:
            work = importlib.import_module("kit.part.work")
            assert work.other.value == 7
            assert work.__file__ == str(folder / "kit/part/work.py")
            if failure:
                raise KeyError
    except KeyError:
        assert failure
    assert interpreter() == before
    assert content(folder) == files


def test_what_is_unused_cannot_be_used(script, tmp_path):
    with standins().standing_in(clone(tmp_path, CODE), ["kit"], empty=["kit"], unused=["absent"]):
        work = importlib.import_module("kit.part.work")
        with pytest.raises(TypeError):
            work.made + 1
        with pytest.raises(TypeError):
            torch.zeros(1) @ work.Thing
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("absent")


def test_what_is_sent_to_cuda_goes_to_the_device_of_the_comparison(script):
    with standins().OnDevice(torch.device("cpu")):
        made = torch.zeros(2, device="cuda")
        moved = [
            made.cuda(),
            made.to("cuda"),
            made.to(device="cuda"),
            torch.tensor(1, device="cuda"),
        ]
        half = made.to(torch.float16)
    assert {t.device.type for t in (made, *moved)} == {"cpu"}
    assert half.dtype == torch.float16


def test_quietly_in_hides_prints_and_comes_back(script, tmp_path, capsys):
    start = os.getcwd()
    with standins().quietly_in(tmp_path):
        print("loud")
        assert Path.cwd() == tmp_path.resolve()
    assert os.getcwd() == start
    assert capsys.readouterr().out == ""


# -- both sides, end to end ---------------------------------------------------------------------


@pytest.fixture
def compared(script, monkeypatch, tmp_path):
    """Run the script on a small random model; return its rows and the changes it compared."""
    common = importlib.import_module("common")
    shape = {"hidden_size": 16, "intermediate_size": 64, "num_attention_heads": 2}
    config = LlamaConfig(**shape, num_hidden_layers=9, num_key_value_heads=1)
    monkeypatch.setattr(common, "ARCHITECTURES", {"small": lambda: config})
    changes = []
    compare = script.compare

    def remember(ours, theirs):
        changes.append((ours, theirs))
        return compare(ours, theirs)

    monkeypatch.setattr(script, "compare", remember)

    def run(kind: str, code: dict[str, str], *arguments: str):
        folder = clone(tmp_path / "clone", code)
        known(script, monkeypatch, kind, folder)
        before, files = interpreter(), content(folder)
        options = ["--toolkit", str(folder), "--architecture", "small", "--device", "cpu"]
        options += ["--data", "openfacts-zsre", "--out", str(tmp_path / "out.json")]
        monkeypatch.setattr(sys, "argv", ["x", *options, *arguments])
        script.main()
        assert content(folder) == files
        after = interpreter()
        assert after[1:] == before[1:]
        assert not {"easyeditor", "memit", "experiments", "pac"} & after[0].keys()
        return json.loads((tmp_path / "out.json").read_text()), changes

    return run


def test_both_sides_get_the_same_and_a_doubled_change_is_seen(compared, capsys):
    arguments = ("--editors", "memit", "--records", "2", "--steps", "3")
    written, _ = compared("EasyEdit", EASYEDIT, *arguments)
    runs = written["runs"]
    assert written["toolkit"] == "EasyEdit"
    assert [(run["pipeline"], run["edits"]) for run in runs] == [
        ("single", 1),
        ("single", 1),
        ("batch", 2),
    ]
    for run in runs:
        assert run["cosine"] == pytest.approx(1, abs=1e-5)
        assert run["norm_ratio"] == pytest.approx(0.5, abs=1e-4)
        assert run["seconds"] > 0
        assert run["reference_seconds"] > 0
    out = capsys.readouterr().out
    assert "what toolkits print" not in out
    lines = [line.split("|")[1:4] for line in out.splitlines() if line.startswith("| memit")]
    assert [[cell.strip() for cell in line] for line in lines] == [
        ["memit", "openfacts-zsre", "2 single"],
        ["memit", "openfacts-zsre", "2 batch"],
    ]


def test_the_main_of_alphaedit_is_fed_and_what_prune_adds_on_top_is_taken_alone(compared):
    arguments = ("--editors", "memit", "prune", "--records", "2", "--steps", "3")
    written, changes = compared("AlphaEditCode", ALPHAEDIT, *arguments)
    pipelines = [(run["editor"], run["pipeline"]) for run in written["runs"]]
    assert pipelines == [
        ("memit", "single"),
        ("memit", "single"),
        ("memit", "batch"),
        ("prune", "consecutive"),
    ]
    single, again, batch, prune = (theirs for _, theirs in changes)
    assert list(single) == [f"model.layers.{i}.mlp.down_proj.weight" for i in range(4, 9)]
    assert list(prune) == ["model.layers.5.mlp.down_proj.weight"]
    for name, moment in single.items():
        assert moment.norm() > 0
        torch.testing.assert_close(again[name], moment)
        torch.testing.assert_close(batch[name], moment)
    for name, added in prune.items():
        torch.testing.assert_close(added, 5 * single[name], rtol=1e-4, atol=1e-6)


def test_pac_is_driven_in_the_order_of_our_mini_batches(compared, monkeypatch, tmp_path, script):
    monkeypatch.setenv("KIT_LOG", str(tmp_path / "log"))
    code = {"pac.py": PAC, "plms/gptj.py": "raise RuntimeError('needs other versions')\n"}
    _, changes = compared("PACCode", code, "--records", "3", "--steps", "2")
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    requests = script.openfacts_requests(3)
    prompts = [r.filled_prompt for r in requests]
    torch.manual_seed(0)
    expected = []
    for epoch in range(2):
        expected.append(["assess", epoch, 3, [prompts[:2], prompts[2:]]])
        for chunk in torch.randperm(3).split(2):
            inputs = [f"{prompts[i]} {requests[i].target_new}" for i in chunk]
            expected.append(["edit", inputs, [prompts[i] for i in chunk]])
    assert lines == expected
    ((ours, theirs),) = changes
    assert ours
    assert len(theirs) == 9
    for change in theirs.values():  # four steps
        torch.testing.assert_close(change, torch.full_like(change, 0.04), rtol=1e-5, atol=1e-7)


def test_an_editor_that_the_toolkit_lacks_and_a_file_of_another_kind_are_sentences(
    script, monkeypatch, tmp_path
):
    folder = clone(tmp_path, EASYEDIT)
    known(script, monkeypatch, "EasyEdit", folder)
    wrong = {("--editors", "rect"): "EasyEdit has no rect", ("--out", "x.txt"): "neither .csv"}
    wrong |= {("--data", "zsri"): "no data set 'zsri'"}
    for arguments, sentence in wrong.items():
        monkeypatch.setattr(sys, "argv", ["x", "--toolkit", str(folder), *arguments])
        with pytest.raises(SystemExit, match=sentence):
            script.main()


def test_layers_that_say_tensors_are_seen_as_the_tuples_a_toolkit_expects(script):
    class Trace:
        def __init__(self, layer, edit_output):
            self.handle = layer.register_forward_hook(self.hook)
            self.edit_output = edit_output

        def hook(self, _module, _inputs, output):
            self.output = self.edit_output(output, "x")
            return self.output

        def close(self):
            self.handle.remove()

    class TraceDict(OrderedDict):
        def __init__(self, layer, edit_output):
            self["x"] = Trace(layer, edit_output)

        def close(self):
            for _, trace in self.items():
                trace.close()

    def edit(output, layer):
        output[0][0, 1] += 10  # row 0, position 1 of [B, S, D]
        return output

    layer = nn.Identity()
    nethook = SimpleNamespace(TraceDict=TraceDict)
    traces = importlib.import_module("toolkits.alphaedit").tuple_traces(nethook)(
        layer, edit_output=edit
    )
    said = layer(torch.zeros(2, 3, 4))
    assert said.shape == (2, 3, 4)
    assert said[0, 1].tolist() == [10.0] * 4
    assert float(said.sum()) == 40
    assert traces["x"].output[0] is said
    traces.close()
    assert float(layer(torch.zeros(2, 3, 4)).sum()) == 0
