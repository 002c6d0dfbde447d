"""Whatever a config says, it is taken or refused in one sentence; nothing else happens."""

import copy
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from snakemake.utils import update_config

from kmebench.errors import ConfigError
from kmebench.planning import grid
from kmebench.planning.config import check_config, read_config
from kmebench.planning.overlays import read_overlay

CONFIG = read_config(Path("config.yaml"))

#: What people, editors of YAML and attackers write.
scalars = (
    st.none()
    | st.booleans()
    | st.dates()
    | st.integers(-3, 3)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        ["", "..", "/etc/passwd", "$(reboot)", "; rm -rf .", "a b", "a,b", "x\ny", "é"]
    )
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=6) | st.integers(0, 9), inner, max_size=3)
    ),
    max_leaves=5,
)


def paths_of(node, path=()):
    """Every place in a config."""
    yield path
    if isinstance(node, dict):
        for key, child in node.items():
            yield from paths_of(child, (*path, key))
    elif isinstance(node, list):
        for index, child in enumerate(node):
            yield from paths_of(child, (*path, index))


def refusal(check):
    """The sentence that refuses; empty where nothing is."""
    try:
        check()
    except ConfigError as error:
        return str(error) or "nothing is said"
    return ""


PLACES = [path for path in paths_of(CONFIG) if path]


def changed(path, value, key):
    """The config with another value at a place, or with one more entry beside it."""
    config = copy.deepcopy(CONFIG)
    node = config
    for step in path[:-1]:
        node = node[step]
    if isinstance(node, dict) and key is not None:
        node[key] = value
    else:
        node[path[-1]] = value
    return config


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(PLACES), values, st.none() | st.integers() | st.text(max_size=8))
def test_any_config_is_taken_or_refused_in_one_sentence(path, value, key):
    config = changed(path, value, key)
    complaint = refusal(lambda: check_config(config))
    assert "\n" not in complaint
    if complaint:
        return
    for run in grid.all_runs(config):  # what is taken names files below results and nothing else
        folder = run.folder()
        assert not {"..", ""} & set(folder.split("/"))
        assert not set(folder) & set(" \n$;,'\"&|<>*?(){}[]\\`")


@pytest.mark.parametrize("section", ["models", "datasets", "methods", "experiments", "tables"])
@given(name=st.text(min_size=1, max_size=12))
@example(name="0\n")  # Python's $ also matches before a last newline
@settings(max_examples=30, deadline=None)
def test_a_name_is_small_letters_digits_points_and_hyphens(section, name):
    config = copy.deepcopy(CONFIG)
    assume(name not in config[section])
    entry = copy.deepcopy(next(iter(config[section].values())))
    config[section][name] = entry | ({"editor": "pac"} if section == "methods" else {})
    plain = name[0].isalnum() and all(c in "abcdefghijklmnopqrstuvwxyz0123456789.-" for c in name)
    if plain and name.isascii():
        check_config(config)
    else:
        with pytest.raises(ConfigError):
            check_config(config)


#: Real overlays, and what a slip of the hand, another editor or another encoding puts into one.
NAMES = ("ci", "real", "reference/audit", "searches/first")
OVERLAYS = [Path(f"config/{name}.yaml").read_bytes() for name in NAMES]
SLIPS = [
    b"\t",
    b"\n",
    b" ",
    b":",
    b"-",
    b"{",
    b"[",
    b"]",
    b"}",
    b",",
    b'"',
    b"'",
    b"#",
    b"&a ",
    b"*a",
    b"|",
]
SLIPS += [
    b"!!int ",
    b"? ",
    b"<<: ",
    b"\xe9",
    b"\xff\xfe",
    b"\x00",
    b"---\n",
    b"null",
    b"2024-13-45",
    b"",
]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(OVERLAYS),
    st.lists(st.tuples(st.floats(0, 1), st.sampled_from(SLIPS), st.integers(0, 9)), max_size=3),
)
def test_any_overlay_is_taken_or_refused_in_one_sentence(overlay, slips):
    for where, slip, lost in slips:
        place = int(where * len(overlay))
        overlay = overlay[:place] + slip + overlay[place + lost :]
    config = copy.deepcopy(CONFIG)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "overlay.yaml")
        path.write_bytes(overlay)

        def read():
            update_config(config, read_overlay(path))
            check_config(config)

        assert "\n" not in refusal(read)
