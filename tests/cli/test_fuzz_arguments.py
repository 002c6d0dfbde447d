"""Whatever stands on a command line, it is taken or refused in one sentence."""

import contextlib
import copy
import io
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kmebench.cli import inputs
from kmebench.cli import main as cli
from kmebench.cli.parser import COMMANDS
from kmebench.planning import by_hand
from kmebench.planning.config import read_checked_config

TEXTS = [
    "",
    " ",
    "France",
    "{}",
    "The capital of {} is",
    "{} {}",
    "é",
    "\ud800",
    "[/b]",
    "\0",
    "a\nb",
]
PATHS = [
    "",
    ".",
    "/",
    "docs",
    "README.md",
    "none",
    "none/none",
    "README.md/x",
    "/proc/1/mem",
    "x" * 300,
]
PATHS += ["a.png", "a.jpg", "a.PDF", "~", "\0", "-", "config/ci.yaml", "LICENSE", "config.yaml"]
NUMBERS = ["0", "1", "-1", "15", "1.5", "nan", "", "1e3", "9" * 30, "\u0663", "0x10", "+2"]
SETTINGS = [
    "steps=3",
    "steps",
    "=3",
    "steps=",
    "layers=[0,1]",
    "layers=[0",
    "layers=:",
    "x=1",
    "steps=null",
]
SETTINGS += [
    "steps={a: 1}",
    "steps=!!int ",
    "steps=*a",
    "learning_rate=1e+0",
    "steps=2024-13-45",
    "a=\t",
]
VALUES = {
    "--model": ["tiny-gptj", "smollm2-135m", "Tiny", "", "docs", "\0", "x" * 300],
    "--method": ["pac", "PAC", "memit", "rome", "", "full-c-epochs", "\0"],
    "--device": ["auto", "cpu", "gpu", "cuda:1", "cuda:", "cuda:x", "", "balanced", "CPU"],
    "--dtype": ["float32", "fp16", "", "bfloat16", "int8", "torch.float32"],
    "--score": ["l2", "l3", ""],
    **dict.fromkeys(["--subject", "--prompt", "--target", "--neighbour"], TEXTS),
    **dict.fromkeys(["--paths", "--devices"], NUMBERS),
    **dict.fromkeys(["--out", "--plot", "--save-delta", "--covariance", "--measured"], PATHS),
    **dict.fromkeys(["--configfile", "--config"], PATHS),
    "--set": SETTINGS,
    "--zzz": ["", "x"],
    "--tasks": ["piqa", "", "\0"],
    "--include": PATHS,
    **dict.fromkeys(["--limit", "--batch-size"], NUMBERS),
}
MODEL = ["--model", "tiny-gptj"]
FACT = ["--subject", "France", "--prompt", "{} is", "--target", "Rome"]
#: What makes a command complete.
COMPLETE = {
    "edit": [*MODEL, *FACT],
    "trace": [*MODEL, *FACT],
    "apply": ["README.md", *MODEL, "--out", "none"],
    "evaluate": ["MODEL", "--tasks", "piqa"],
}

options = st.sampled_from(sorted(VALUES)).flatmap(
    lambda name: st.sampled_from(VALUES[name]).map(lambda value: [name, value])
)
vectors = st.tuples(
    st.sampled_from([*(command.name for command in COMMANDS), "edits", ""]),
    st.booleans(),
    st.lists(options, max_size=4),
    st.lists(st.sampled_from(PATHS), max_size=1),
)


@pytest.fixture
def model_folder(monkeypatch, tmp_path):
    """A folder; commands stop where the model would be loaded, or the workflow be planned."""
    known = read_checked_config(Path("config.yaml"))

    def read(path, overlays):
        return read_checked_config(path, overlays) if overlays else copy.deepcopy(known)

    def imported(place):
        return getattr(inputs, place.partition(":")[2]) if "inputs:" in place else lambda *_: None

    monkeypatch.setattr(by_hand, "read_checked_config", read)
    monkeypatch.setattr(inputs, "read_checked_config", read)
    monkeypatch.setattr(inputs, "check_installed", lambda: None)
    monkeypatch.setattr(cli, "_imported", imported)
    (tmp_path / "config.json").touch()
    return tmp_path


@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(vectors)
@example(("edit", True, [["--configfile", "\0"]], []))
def test_any_arguments_are_taken_or_refused_in_one_sentence(model_folder, vector):
    command, complete, chosen, loose = vector
    arguments = [command, *(COMPLETE.get(command, []) if complete else [])]
    arguments += [word for option in chosen for word in option] + loose
    arguments = [str(model_folder) if word == "MODEL" else word for word in arguments]
    status, said = ended(arguments)
    if status == 2:  # argparse's own, which shows the usage too
        assert "error: " in said
    elif status == 1:
        assert said.startswith("kmebench: ")
        assert said.count("\n") == 1
    else:
        assert (status, said) == (0, "")


def ended(arguments):
    """The exit status and what stands on the error stream."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            status = cli.main(arguments)
        except SystemExit as end:
            status = end.code
    return status, said.getvalue()
