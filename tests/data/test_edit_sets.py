"""The public forms, their bad records, and data files as people save them."""

import bz2
import copy
import gzip
import json
import lzma
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kmebench.data.edit_sets import read_records
from kmebench.data.forms import SCHEMAS
from kmebench.data.records import SLOT, read_requests, write_requests
from kmebench.errors import DataError

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
WIKIBIGEDIT = {
    "tag": "update",
    "subject": "Ada",
    "update": "Which language does Ada speak?",
    "ans": "French",
    "rephrase": "What is the tongue of Ada?",
    "personas": "Say, what would Ada be talking in?",
    "loc": "Which language does Bob speak?",
    "loc_ans": "Dutch",
    "mhop": None,
    "mhop_ans": None,
}
RECORDS = {"easyedit": EASYEDIT, "mend": MEND, "rome": ROME, "wikibigedit": WIKIBIGEDIT}


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
    assert request.target_true == (None if schema == "wikibigedit" else "English")
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


def test_the_questions_of_wikibigedit_reach_the_kinds_they_count_for():
    """A file written by hand in the release's form: keys it adds, nulls, and more personas."""
    path = Path(__file__).parent / "wikibigedit.json"
    records, bad = read_records(path, "wikibigedit")
    assert not bad
    (_, hops), (_, plain), (_, voices) = records
    assert hops.filled_prompt == "Who is the mayor of Lower Exampleton?"
    assert hops.prompt == "Who is the mayor of {}?"
    assert (hops.target_new, hops.target_true) == ("Ida Muster", None)
    assert hops.relation == "head of government"
    assert hops.paraphrases == (
        "What is the name of Lower Exampleton's mayor?",
        "Hey, who runs Lower Exampleton these days?",
    )
    assert hops.locality == (("Who is the mayor of Upper Exampleton?", "Tom Sample"),)
    assert hops.portability == (("Where was the mayor of Lower Exampleton born?", "Samplestadt"),)
    assert (plain.portability, plain.relation) == ((), None)
    assert plain.paraphrases == ("Which club does Jon Probe play for?",)
    assert voices.paraphrases[1:] == ("Formally asked?", "Asked by a pirate, mate?")
    assert voices.portability == ()


def read_one(folder, record, schema="easyedit"):
    ((_, request),), _ = read_records(write(folder, [record]), schema)
    return request


def test_the_slot_is_the_subject_as_a_whole_word_and_braces_are_text(tmp_path):
    record = EASYEDIT | {"prompt": "In Canada an {} of Ada is", "rephrase_prompt": "{} of Ada is"}
    request = read_one(tmp_path, record)
    assert (request.prompt, request.slot) == ("In Canada an {} of {} is", 19)
    assert request.filled_prompt == "In Canada an {} of Ada is"
    assert request.paraphrases == ("{} of Ada is",)
    write_requests(tmp_path / "requests.jsonl", [request])
    assert read_requests(tmp_path / "requests.jsonl") == [request]


def test_every_text_of_a_list_is_asked(tmp_path):
    flat = EASYEDIT | {
        "rephrase_prompt": ["Ada speaks", "Ada says it in"],
        "locality_prompt": ["Bob speaks", "Eve speaks"],
        "locality_ground_truth": ["Dutch", ["German", "Deutsch"]],
    }
    request = read_one(tmp_path, flat)
    assert request.paraphrases == ("Ada speaks", "Ada says it in")
    assert request.locality == (("Bob speaks", "Dutch"), ("Eve speaks", "German"))
    mend = MEND | {
        "rephrase": ["Which?", "What?"],
        "loc": ["who?", "when?"],
        "loc_ans": ["nobody", "never"],
        "portability": [
            {"New Question": ["Where?", "How?"], "New Answer": ["Paris", "well"]},
            {"New Question": "Why?", "New Answer": ["So", "because"]},
        ],
    }
    request = read_one(tmp_path, mend, "mend")
    assert request.paraphrases == ("Which?", "What?")
    assert request.locality == (("who?", "nobody"), ("when?", "never"))
    assert request.portability == (("Where?", "Paris"), ("How?", "well"), ("Why?", "So"))


def test_of_several_right_answers_the_first_counts(tmp_path):
    record = EASYEDIT | {
        "ground_truth": ["English", "british"],
        "locality_ground_truth": ["a", "b"],
    }
    request = read_one(tmp_path, record)
    assert request.target_true == "English"
    assert request.locality == (("Bob speaks", "a"),)


def test_lists_may_be_empty(tmp_path):
    lists = {"rephrase_prompt": [], "locality_prompt": [], "locality_ground_truth": []}
    request = read_one(tmp_path, EASYEDIT | lists)
    assert (request.paraphrases, request.locality) == ((), ())


def test_numbers_are_texts_as_they_are_written(tmp_path):
    path = tmp_path / "set.json"
    content = json.dumps([EASYEDIT | {"target_new": "NEW", "ground_truth": "OLD"}])
    path.write_text(content.replace('"NEW"', "1902").replace('"OLD"', "[3.50, 1e5]"))
    ((_, request),), _ = read_records(path, "easyedit")
    assert (request.case_id, request.target_new, request.target_true) == ("7", "1902", "3.50")


def test_a_decomposed_subject_is_found_in_a_composed_prompt(tmp_path):
    record = EASYEDIT | {"subject": "Zoe\u0308", "prompt": "The tongue of Zo\u00eb is"}
    assert read_one(tmp_path, record).subject == "Zo\u00eb"
    record = EASYEDIT | {"subject": "Zo\u00eb", "prompt": "The tongue of Zoe\u0308 is"}
    assert read_one(tmp_path, record).prompt == "The tongue of {} is"


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
    "no text": ("mend", MEND | {"alt": True}, "the key 'alt' is no text but a bool"),
    "not a number": ("mend", MEND | {"alt": float("nan")}, "the key 'alt' is no text but a float"),
    "no answers": ("mend", MEND | {"answers": []}, "the key 'answers' holds 0 texts"),
    "two targets": (
        "mend",
        MEND | {"alt": ["a", "b"]},
        "the key 'alt' holds 2 texts",
    ),
    "unseen": ("mend", MEND | {"alt": "\u3164\ufe0f"}, "the key 'alt' is empty"),
    "half an emoji": ("mend", MEND | {"loc": "x \ud83d"}, "the key 'loc' holds half a surrogate"),
    "half a case_id": ("rome", ROME | {"case_id": "\ud83d"}, "case_id holds half a surrogate pair"),
    "a case_id of many": ("rome", ROME | {"case_id": [9]}, "case_id is no text but a list"),
    "subject absent": ("mend", MEND | {"subject": "Eve"}, "'Eve' does not stand in the prompt"),
    "other case": ("mend", MEND | {"subject": "ADA"}, "'ADA' does not stand in the prompt"),
    "looks alike": (
        "mend",
        MEND | {"subject": "\u0410da"},
        "'\u0410da' does not stand in the prompt 'What does Ada speak?': '\\u0410da' in",
    ),
    "other blank": (
        "mend",
        MEND | {"subject": "A da", "src": "Does A\u00a0da speak"},
        "'A da' in 'Does A\\xa0da speak'",
    ),
    "inside a word": (
        "mend",
        MEND | {"src": "In Canada and Adana"},
        "'Ada' does not stand in the prompt 'In Canada and Adana' as a whole word",
    ),
    "twice": (
        "mend",
        MEND | {"src": "Does Ada, Ada's own, speak"},
        "'Ada' stands 2 times in the prompt",
    ),
    "unequal questions": (
        "easyedit",
        EASYEDIT | {"locality_prompt": ["a", "b"]},
        "'locality_prompt' and 'locality_ground_truth' differ in length",
    ),
    "no object": ("mend", ["Ada"], "it is a list, expected an object"),
    "no slot": (
        "rome",
        ROME | {"requested_rewrite": ROME["requested_rewrite"] | {"prompt": "Ada speaks"}},
        "holds no {}",
    ),
    "two slots": (
        "rome",
        ROME | {"requested_rewrite": ROME["requested_rewrite"] | {"prompt": "{} or {} is"}},
        "holds {} 2 times",
    ),
    "MQuAKE": (
        "rome",
        ROME | {"requested_rewrite": [ROME["requested_rewrite"]]},
        "it looks like MQuAKE, but schema: rome wants the keys requested_rewrite.subject, ",
    ),
    "KnowEdit": (
        "easyedit",
        without(EASYEDIT, "rephrase_prompt") | {"portability": {}},
        "it looks like KnowEdit, but schema: easyedit wants the keys subject, prompt, ",
    ),
    "RippleEdits": (
        "mend",
        {"edit": {"prompt": "The mother of Rolf is Ida."}},
        "it looks like RippleEdits, but schema: mend wants the keys subject, src, alt, ",
    ),
    "half a hop": (
        "wikibigedit",
        WIKIBIGEDIT | {"mhop": "Where is what Ada speaks spoken?"},
        "the key 'mhop_ans' is no text but a NoneType",
    ),
    "no other words": (
        "wikibigedit",
        WIKIBIGEDIT | {"rephrase": None},
        "the key 'rephrase' is no text but a NoneType",
    ),
    "subject in short": (
        "wikibigedit",
        WIKIBIGEDIT | {"subject": "Ada of Sampleton"},
        "'Ada of Sampleton' does not stand in the prompt 'Which language does Ada speak?'",
    ),
    "as wikibigedit": ("mend", WIKIBIGEDIT, "set schema: wikibigedit"),
    "another schema": ("mend", EASYEDIT, "set schema: easyedit"),
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


def test_records_without_a_case_id_are_called_by_their_number(tmp_path):
    nameless = [EASYEDIT | {"case_id": none} for none in (None, float("nan"))]
    records, _ = read_records(write(tmp_path, nameless), "easyedit")
    assert [request.case_id for _, request in records] == ["0", "1"]


@pytest.mark.parametrize(
    ("schema", "key"),
    [
        ("easyedit", "target_new"),
        ("easyedit", "case_id"),
        ("rome", "subject"),
        ("rome", "requested_rewrite"),
        ("rome", "relation_id"),
        ("rome", "paraphrase_prompts"),
        ("mend", "portability"),
        ("wikibigedit", "personas"),
    ],
)
def test_a_key_that_stands_twice_is_bad_if_it_is_read(schema, key, tmp_path):
    path = write(tmp_path, [RECORDS[schema] | {"note": 1}])
    content = path.read_text(encoding="utf-8")
    path.write_text(content.replace('"note":', '"note": 0, "note":'), encoding="utf-8")
    assert read_records(path, schema)[0]
    path.write_text(content.replace(f'"{key}":', f'"{key}": "other", "{key}":'), encoding="utf-8")
    _, bad = read_records(path, schema, "skip")
    assert [problem.reason for problem in bad] == [f"the key {key!r} stands in it twice"]


def test_an_own_name_of_the_file_is_what_messages_say(tmp_path):
    path = write(tmp_path, [ROME | {"case_id": None, "requested_rewrite": 5}])
    for schema, content in (("rome", None), ("mend", "["), ("mend", "5"), ("mend", b"\xff\xfe[")):
        if content is not None:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(DataError, match=r"^my/own\.json") as caught:
            read_records(path, schema, name="my/own.json")
        assert str(tmp_path) not in str(caught.value)


RECORD = json.dumps(EASYEDIT | {"target_new": "Fran\u00e7ais\u2028"}, ensure_ascii=False)
SAVED = {
    "list": f"[{RECORD}]",
    "byte order mark": f"\ufeff[{RECORD}]",
    "carriage returns": json.dumps(json.loads(f"[{RECORD}]"), indent=1).replace("\n", "\r\n"),
    "one line": RECORD,
    "lines": f"{RECORD}\n\n{RECORD.replace('7', '8', 1)}\n",
    "lines with carriage returns": f"\ufeff{RECORD}\r\n{RECORD.replace('7', '8', 1)}\r\n",
}


@pytest.mark.parametrize("form", SAVED)
def test_a_file_is_read_however_it_was_saved(form, tmp_path):
    path = tmp_path / "set.json"
    path.write_bytes(SAVED[form].encode())
    records, _ = read_records(path, "easyedit")
    assert len(records) == (2 if "lines" in form else 1)
    assert {request.target_new for _, request in records} == {"Fran\u00e7ais"}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
def test_other_unicode_encodings_are_named(encoding, tmp_path):
    path = tmp_path / "set.json"
    path.write_bytes(f"[{RECORD}]".encode(encoding))
    with pytest.raises(DataError, match="is UTF-16 or UTF-32 text; save it as UTF-8"):
        read_records(path, "easyedit")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "is empty, expected a list of records"),
        (" \n", "is empty, expected a list of records"),
        (
            "\nsubject,src",
            r"line 2, column 1 .*; it must hold a list of records, or a record on each",
        ),
        ("[1 2]", r"not valid JSON at line 1, column 4 \(Expecting ',' delimiter\)\.$"),
        ('{"a": 1}\n{"a" 2}\n', r"at line 2, column 6 \(Expecting ':' delimiter\)\.$"),
        (f"[{RECORD},\n]", r"at line [12], .*; take out the comma\.$"),
        (f"{RECORD},\n{RECORD}", r"at line 1, .*; take out the comma\.$"),
        ('{"a": 1, }', r"at line 1, .*; take out the comma\.$"),
        ('{"a", 2}', r"Expecting ':' delimiter\)\.$"),
        ('{"a": 1, b}', r"double quotes\)\.$"),
        ("5", "holds neither a list of records nor a record on each line"),
        ("null", "holds neither a list of records nor a record on each line"),
        (f"{RECORD}\n[]", "record 1 .* it is a list, expected an object"),
        ("[" * 100_000, "is nested too deeply"),
    ],
)
def test_a_damaged_file_is_named(text, complaint, tmp_path):
    path = tmp_path / "set.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=complaint) as caught:
        read_records(path, "easyedit")
    assert str(path) in str(caught.value)


def test_only_a_file_that_ends_early_may_be_truncated(tmp_path):
    path = tmp_path / "set.json"
    odd = {"a": 'x"\\\u00e9\U0001f600', "b": [True, False, None, -1.5e-3, 2, {}]}
    whole = json.dumps([odd, odd])
    for end in range(1, len(whole)):
        path.write_text(whole[:end])
        with pytest.raises(DataError, match="it ends early and may be truncated"):
            read_records(path, "easyedit")
    for place in (0, 5, whole.index(",")):  # something that is wrong inside of the file
        path.write_text(whole[:place] + "]" + whole[place + 1 :])
        with pytest.raises(DataError) as caught:
            read_records(path, "easyedit")
        assert "truncated" not in str(caught.value)


def test_a_compressed_file_is_named(tmp_path):
    path = tmp_path / "set.json"
    for pack in (gzip.compress, bz2.compress, lzma.compress):
        path.write_bytes(pack(f"[{RECORD}]".encode()))
        with pytest.raises(DataError, match=r"set\.json is a compressed file; unpack it\.$"):
            read_records(path, "easyedit")


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "set.json").write_bytes(b"[\xff]")
    with pytest.raises(DataError, match=r"not UTF-8 text \(byte 1\)"):
        read_records(tmp_path / "set.json", "mend")


@pytest.mark.parametrize("schema", SCHEMAS)
def test_the_docs_name_every_key_of_every_form(schema):
    section = Path("docs/data.md").read_text(encoding="utf-8").partition(f"`{schema}`")[2]
    for key in SCHEMAS[schema].keys:
        assert f"`{key}`" in section.partition("\n## ")[0]


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=8)  # halves of surrogate pairs too
    | st.sampled_from(["Ada", "{}", " Ada{} ", "Ada Ada", "\u200b"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)


@pytest.mark.parametrize("schema", RECORDS)
@given(data=st.data())
@settings(max_examples=200, deadline=None)
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
        usable, bad = read_records(path, schema, "skip")
        for _, request in usable:
            assert request.prompt.startswith(SLOT, request.slot)
            assert request.subject in request.filled_prompt
            write_requests(Path(folder) / "requests.jsonl", [request])
            assert read_requests(Path(folder) / "requests.jsonl") == [request]
        for problem in bad:
            assert "\n" not in problem.reason
            (problem.reason + problem.case_id).encode()  # can be written


pieces = st.sampled_from(
    ["\ufeff", "[", "]", "{", "}", '"', ":", ",", "\n", "\r\n", RECORD, "5", "null", "\\u", "\0"]
)


@given(st.binary(max_size=60) | st.lists(pieces, max_size=8).map(lambda p: "".join(p).encode()))
@settings(max_examples=200, deadline=None)
def test_any_file_is_read_or_refused_in_one_sentence(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "set.json"
        path.write_bytes(content)
        try:
            read_records(path, "mend")
        except DataError as error:
            assert str(path) in str(error)  # noqa: PT017
