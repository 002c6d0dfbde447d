"""Edit requests: what is cleaned and refused, the slot, and the JSON lines between stages."""

import unicodedata
from dataclasses import asdict

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kmebench.data.records import SLOT, EditRequest, read_requests, write_requests
from kmebench.io.checked_files import DamagedFileError
from tests.data.strategies import texts

PLAIN = {"case_id": "a", "subject": "Ada", "prompt": "{} speaks", "target_new": "French"}


@pytest.mark.parametrize("field", ["case_id", "subject", "prompt", "target_new", "target_true"])
def test_blanks_around_a_text_are_taken_off(field):
    clean = PLAIN | {"target_true": "English"}
    padded = clean | {field: f" \n\u00a0\u200b {clean[field]}\t\u2028\ufeff"}
    assert EditRequest(**padded) == EditRequest(**clean)


def test_blanks_around_listed_texts_are_taken_off():
    request = EditRequest(
        **PLAIN,
        paraphrases=[" Ada says "],
        locality=[(" Bob speaks", "Dutch ")],
        portability=[("Where\n", "\u3000Paris")],
        relation=" P103",
    )
    assert request.paraphrases == ("Ada says",)
    assert request.locality == (("Bob speaks", "Dutch"),)
    assert request.portability == (("Where", "Paris"),)
    assert request.relation == "P103"


def test_accents_are_the_same_however_they_are_typed():
    composed = EditRequest("a", "Zo\u00eb", "Caf\u00e9 of {} is", "\u00c5rhus")
    decomposed = EditRequest("a", "Zoe\u0308", "Cafe\u0301 of {} is", "A\u030arhus")
    assert composed == decomposed
    assert decomposed.filled_prompt == "Caf\u00e9 of Zo\u00eb is"


REFUSED = {
    "blank": (" \n", "is empty"),
    "nothing": ("", "is empty"),
    "invisible": ("\u200b\u2060", "is empty"),
    "half an emoji": ("x \ud83d y", r"holds half a surrogate pair \(U\+D83D\)"),
    "null": ("x\0y", r"holds a control character \(U\+0000\)"),
    "escape": ("x\x1b[0m", r"holds a control character \(U\+001B\)"),
    "number": (1902, "is no text but a int"),
    "none": (None, "is no text but a NoneType"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("field", ["case_id", "subject", "prompt", "target_new"])
def test_a_text_that_no_editor_could_use_is_refused_by_its_name(field, case):
    value, complaint = REFUSED[case]
    with pytest.raises(ValueError, match=f"^{field} {complaint}"):
        EditRequest(**PLAIN | {field: value})


@pytest.mark.parametrize("case", REFUSED)
def test_listed_texts_are_refused_as_well(case):
    value, complaint = REFUSED[case]
    for field, items, name in [
        ("paraphrases", (value,), "a paraphrase"),
        ("locality", ((value, "x"),), "a locality prompt"),
        ("locality", (("x", value),), "a target of locality"),
        ("portability", (("x", value),), "a target of portability"),
    ]:
        with pytest.raises(ValueError, match=f"^{name} {complaint}"):
            EditRequest(**PLAIN | {field: items})


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("paraphrases", "Ada says", "paraphrases is a str, expected a list"),
        ("locality", ("Bob speaks", "Dutch"), "an item of locality is a str, expected a list"),
        ("portability", [("x", "y", "z")], "an item of portability is no pair"),
    ],
)
def test_a_text_in_place_of_a_list_is_named(field, value, complaint):
    with pytest.raises(ValueError, match=complaint):
        EditRequest(**PLAIN | {field: value})


def test_line_breaks_and_tabs_inside_a_text_are_text():
    assert EditRequest(**PLAIN | {"prompt": "a\r\n\tb\u2028{} is"}).prompt == "a\r\n\tb\u2028{} is"


@pytest.mark.parametrize(
    ("prompt", "complaint"),
    [
        ("It is", r"'It is' holds no \{\} for the subject"),
        ("In {} and {} is", r"holds \{\} 2 times, expected once for the subject"),
        ("{}\u0308 is", "adds a mark to a letter of the subject"),
    ],
)
def test_a_prompt_without_one_clear_slot_is_refused(prompt, complaint):
    with pytest.raises(ValueError, match=complaint):
        EditRequest(**PLAIN | {"prompt": prompt})


def test_braces_outside_the_slot_are_text():
    request = EditRequest("a", "{}", "  An empty {} in {} is {}", "set", slot=17)
    assert (request.prompt, request.slot) == ("An empty {} in {} is {}", 15)
    assert request.filled_prompt == "An empty {} in {} is {}"
    assert request.asked_of("Rust") == "An empty {} in Rust is {}"


@pytest.mark.parametrize("slot", [-8, 0, 2, 99])
def test_a_slot_where_none_is_is_refused(slot):
    with pytest.raises(ValueError, match=f"holds no {{}} at slot {slot}"):
        EditRequest("a", "Ada", "In {} it is", "cold", slot=slot)


@settings(deadline=None)
@given(texts, texts, texts, st.booleans())
def test_the_slot_is_kept_whatever_stands_around_it(before, subject, after, named):
    prompt = before + SLOT + after
    assume(named or prompt.count(SLOT) == 1)
    try:
        request = EditRequest("a", subject, prompt, "x", slot=len(before) if named else None)
    except ValueError as error:
        assert "mark" in str(error)  # noqa: PT017 - only where the slot is followed by one
        return
    plain = unicodedata.normalize("NFC", before + "\ue000" + after).strip()
    assert request.asked_of("\ue000").strip() == request.asked_of("\ue000")
    assert request.asked_of("\ue000") in plain
    assert EditRequest(**asdict(request)) == request


pair = st.tuples(texts, texts)


@given(
    st.lists(
        st.builds(
            EditRequest,
            case_id=texts,
            subject=texts,
            prompt=texts.map(lambda t: t.replace(SLOT, "") + SLOT),
            target_new=texts,
            target_true=st.none() | texts,
            paraphrases=st.lists(texts, max_size=2).map(tuple),
            locality=st.lists(pair, max_size=2).map(tuple),
            portability=st.lists(pair, max_size=2).map(tuple),
            relation=st.none() | texts,
        ),
        max_size=2,
    )
)
@settings(deadline=None)
def test_requests_survive_the_disk(tmp_path_factory, requests):
    path = tmp_path_factory.mktemp("requests") / "requests.jsonl"
    write_requests(path, requests)
    assert read_requests(path) == requests


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "requests.jsonl"
    write_requests(path, [EditRequest("a", "Ada", "{} speaks", "French")])
    path.write_text(path.read_text() + '{"case_id": "b"}\n')
    with pytest.raises(DamagedFileError, match=r"requests\.jsonl is damaged \(line 2 is no edit"):
        read_requests(path)
    assert not path.exists()


def test_a_line_that_is_cut_off_is_named(tmp_path):
    path = tmp_path / "requests.jsonl"
    write_requests(path, [EditRequest(c, "Ada", "{} speaks", "French") for c in "ab"])
    path.write_text(path.read_text()[:-20])
    with pytest.raises(DamagedFileError, match=r"line 2 is cut off"):
        read_requests(path)
