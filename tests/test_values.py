"""Values as parts of a file's name."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kmebench.values import read, read_all, spell, spell_all

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text("abcdefghijklmnopqrstuvwxyzNTF_.-0123456789", min_size=1, max_size=8)
)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ([1], "1:"),
        ([1, 2], "1:2"),
        ([], ":"),
        ([0.5, None], "0.5:None"),
        (1e16, "1e16"),
        (1e-4, "0.0001"),
        ("1e+1", "1e1"),
        (True, "True"),
        ("l2", "l2"),
    ],
)
def test_how_a_value_is_spelled(value, text):
    assert spell(value) == text


@given(scalars | st.lists(scalars, max_size=4))
@example(["1", "e+"])
@example("_")
def test_what_can_be_spelled_reads_back_and_is_part_of_a_files_name(value):
    try:
        text = spell(value)
    except ValueError:
        # Texts that would come back as something else, and nothing else.
        assert any(isinstance(x, str) for x in (value if isinstance(value, list) else [value]))
        return
    assert not set(text) & set(" /+=,;$&|<>*?(){}[]\\`'\"\n")
    assert read(text) == value or _numbers(read(text)) == _numbers(value)


def _numbers(value):
    """Numbers written as text as numbers."""
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


@given(st.dictionaries(st.sampled_from(["layers", "steps", "lambda"]), st.lists(st.integers())))
def test_a_name_of_lists_reads_back(values):
    assert read_all(spell_all(values)) == values
