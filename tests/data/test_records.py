"""The three public schemas, their bad records, and the JSON lines between stages."""

import copy
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kmebench.data.records import (
    SLOT,
    EditRequest,
    read_records,
    read_requests,
    write_requests,
)
from kmebench.errors import DataError
from kmebench.reading import DamagedFileError

EASYEDIT = {
    "case_id": 7,
    "prompt": "The mother tongue of Ada is",
    "subject": "Ada",
    "target_new": "French",
    "ground_truth": ["English"],
    "rephrase_prompt": "Ada speaks",
    "locality_prompt": "Bob speaks",
    "locality_ground_truth": "Dutch",
}
MEND = {
    "subject": "Ada",
    "src": "What does Ada speak?",
    "alt": "French",
    "answers": ["English", "british English"],
    "rephrase": "Which language does Ada use?",
    "loc": "nq question: who is Bob",
    "loc_ans": "nobody",
    "portability": {"New Question": "Where is Ada understood?", "New Answer": "Paris"},
}
ROME = {
    "case_id": 9,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "target_new": {"str": "French"},
        "target_true": {"str": "English"},
        "subject": "Ada",
    },
    "paraphrase_prompts": ["Ada speaks", " Born in London, Ada speaks "],
    "neighborhood_prompts": ["Bob speaks", "Eve speaks"],
}
RECORDS = {"easyedit": EASYEDIT, "mend": MEND, "rome": ROME}


def write(folder, records):
    path = folder / "set.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


@pytest.mark.parametrize("schema", RECORDS)
def test_every_schema_gives_the_same_request(schema, tmp_path):
    ((index, request),), bad = read_records(write(tmp_path, [RECORDS[schema]]), schema)
    assert (index, bad) == (0, [])
    assert request.subject == "Ada"
    assert request.target_new == "French"
    assert request.target_true == "English"
    assert request.prompt.count(SLOT) == 1
    assert request.filled_prompt.count("Ada") == 1
    assert "Ada" in request.paraphrases[0]


def test_what_only_some_schemas_carry(tmp_path):
    ((_, mend),), _ = read_records(write(tmp_path, [MEND]), "mend")
    assert mend.case_id == "0"
    assert mend.portability == (("Where is Ada understood?", "Paris"),)
    ((_, rome),), _ = read_records(write(tmp_path, [ROME]), "rome")
    assert rome.relation == "P103"
    assert rome.paraphrases[1] == "Born in London, Ada speaks"
    assert rome.locality == (("Bob speaks", "English"), ("Eve speaks", "English"))
    own = ROME | {"neighborhood_targets": ["Dutch", "German"]}
    ((_, rome),), _ = read_records(write(tmp_path, [own]), "rome")
    assert rome.locality == (("Bob speaks", "Dutch"), ("Eve speaks", "German"))


def test_only_the_first_mention_of_the_subject_becomes_the_slot(tmp_path):
    record = EASYEDIT | {"prompt": "Ada {x} and Ada speak"}
    ((_, request),), _ = read_records(write(tmp_path, [record]), "easyedit")
    assert request.prompt == "{} {x} and Ada speak"
    assert request.filled_prompt == "Ada {x} and Ada speak"


def without(record, *path):
    record = copy.deepcopy(record)
    inner = record
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return record


BAD = {
    "missing key": ("easyedit", without(EASYEDIT, "target_new"), "'target_new' is missing"),
    "missing nested key": (
        "rome",
        without(ROME, "requested_rewrite", "target_new", "str"),
        "'requested_rewrite.target_new.str' is missing",
    ),
    "empty target": ("mend", MEND | {"alt": "  "}, "the key 'alt' is empty"),
    "no text": ("mend", MEND | {"alt": 5}, "the key 'alt' holds no text"),
    "no answers": ("mend", MEND | {"answers": []}, "the key 'answers' holds no text"),
    "subject absent": ("mend", MEND | {"subject": "Eve"}, "'Eve' does not stand in the prompt"),
    "other case": ("mend", MEND | {"subject": "ADA"}, "'ADA' does not stand in the prompt"),
    "no object": ("mend", ["Ada"], "it is a list, expected an object"),
    "no slot": (
        "rome",
        ROME | {"requested_rewrite": ROME["requested_rewrite"] | {"prompt": "Ada speaks"}},
        "prompt holds no {}",
    ),
    "bad paraphrases": ("rome", ROME | {"paraphrase_prompts": [""]}, "'paraphrase_prompts'"),
    "unequal lists": ("rome", ROME | {"neighborhood_targets": ["x"]}, "differ in length"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_record_is_named_with_file_index_and_key(case, tmp_path):
    schema, record, complaint = BAD[case]
    path = write(tmp_path, [RECORDS[schema], record])
    with pytest.raises(DataError) as caught:
        read_records(path, schema)
    message = str(caught.value)
    assert str(path) in message
    assert "record 1" in message
    assert complaint in message
    assert "on_bad_record: skip" in message
    usable, bad = read_records(path, schema, "skip")
    assert len(usable) == 1
    assert bad[0].index == 1
    assert complaint in bad[0].reason


def test_a_case_id_that_stands_twice_is_bad(tmp_path):
    with pytest.raises(DataError, match=r"record 1 \(case_id 7\).*stands in the file twice"):
        read_records(write(tmp_path, [EASYEDIT, EASYEDIT]), "easyedit")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (json.dumps([EASYEDIT])[:-20], "not valid JSON at line 1, column"),
        ("", "not valid JSON at line 1, column 1"),
        (json.dumps(EASYEDIT), "holds a dict, expected a list"),
    ],
)
def test_a_damaged_file_is_named(text, complaint, tmp_path):
    path = tmp_path / "set.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=complaint) as caught:
        read_records(path, "easyedit")
    assert str(path) in str(caught.value)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "set.json").write_bytes(b"[\xff]")
    with pytest.raises(DataError, match=r"not UTF-8 text \(byte 1\)"):
        read_records(tmp_path / "set.json", "mend")


text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
pair = st.tuples(text, text)


@given(
    st.lists(
        st.builds(
            EditRequest,
            case_id=text,
            subject=text,
            prompt=text.map(lambda t: t + SLOT),
            target_new=text,
            target_true=st.none() | text,
            paraphrases=st.lists(text).map(tuple),
            locality=st.lists(pair).map(tuple),
            portability=st.lists(pair).map(tuple),
            relation=st.none() | text,
        ),
        max_size=4,
    )
)
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


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)


@pytest.mark.parametrize("schema", RECORDS)
@given(data=st.data())
@settings(max_examples=500, deadline=None)
def test_any_record_is_read_or_refused_in_one_sentence(schema, data):
    record = json.loads(json.dumps(RECORDS[schema]))
    place = record
    while True:  # walk to any place of a good record, and put something else there
        key = data.draw(st.sampled_from(sorted(place)))
        if not isinstance(place[key], dict) or data.draw(st.booleans()):
            place[key] = data.draw(anything)
            break
        place = place[key]
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), [record])
        try:
            ((_, request),), _ = read_records(path, schema)
        except DataError as error:
            assert "record 0" in str(error)  # noqa: PT017 - most records are fine
            return
    assert request.subject in request.filled_prompt


@given(st.binary(max_size=60))
@settings(max_examples=500, deadline=None)
def test_any_file_is_read_or_refused_in_one_sentence(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "set.json"
        path.write_bytes(content)
        try:
            read_records(path, "mend")
        except DataError as error:
            assert str(path) in str(error)  # noqa: PT017
