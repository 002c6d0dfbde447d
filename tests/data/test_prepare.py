"""Selection, the development split, and contradictions."""

import json
import os
import zipfile
from pathlib import Path

import pytest

from kmebench.data.edit_sets import read_records
from kmebench.data.prepare import Selection, conflicts, edited_elsewhere, prepare
from kmebench.data.records import BadRecord, EditRequest
from kmebench.errors import DataError


def request(case_id, subject="", prompt="{} is in", target="Rome", paraphrases=()):
    subject = subject or f"subject {case_id}"
    return EditRequest(str(case_id), subject, prompt, target, paraphrases=paraphrases)


def indexed(requests):
    return list(enumerate(requests))


MANY = indexed([request(i) for i in range(30)])


def ids(requests):
    return [int(r.case_id) for r in requests]


def test_the_first_n_without_a_seed():
    assert ids(prepare(MANY, [], Selection(n=4)).requests) == [0, 1, 2, 3]


def test_a_seeded_sample_keeps_the_order_of_the_file():
    first, again, other = (
        ids(prepare(MANY, [], Selection(n=8, seed=s)).requests) for s in (1, 1, 2)
    )
    assert first == again == sorted(first)
    assert first != other
    assert len(set(first)) == 8


def test_segments_count_records_of_the_source_file():
    without_bad = [(i, r) for i, r in MANY if i != 3]
    chosen = prepare(without_bad, [], Selection(segments=((2, 5), (10, 12)))).requests
    assert ids(chosen) == [2, 4, 10, 11]


def test_segments_may_end_in_records_that_are_not_taken():
    """The file is as long as it is, whether or not its last record is bad or left out."""
    last = Selection(segments=((28, 30),))
    assert ids(prepare(MANY[:-1], [BadRecord(29, "29", "")], last).requests) == [28]
    assert ids(prepare(MANY, [], last, left_out=[MANY[29][1]]).requests) == [28]
    with pytest.raises(DataError, match=r"segment \[28, 31\] lies outside the 30 records"):
        prepare(MANY[:-1], [BadRecord(29, "29", "")], Selection(segments=((28, 31),)))


@pytest.mark.parametrize("segments", [(), ((29, 30),)])
def test_segments_of_no_usable_record_are_refused(segments):
    with pytest.raises(DataError, match="segments of this data set hold none of its 29 usable"):
        prepare(MANY[:-1], [BadRecord(29, "29", "")], Selection(segments=segments))


def test_the_development_split_shares_no_subject_with_the_reported_one():
    requests = [request(i, f"Subject {i % 10}".upper(), f"{{}} has {i}") for i in range(30)]
    requests += [request(100 + i, f"subject {i}") for i in range(10)]
    for seed in range(5):
        prepared = prepare(indexed(requests), [], Selection(n=6, seed=seed, development=8))
        reported = {r.subject.casefold() for r in prepared.requests}
        held_out = {r.subject.casefold() for r in prepared.development}
        assert len(prepared.development) == 8
        assert not reported & held_out


def test_the_development_split_shares_no_prompt_with_the_reported_one():
    """Another subject may be cut out of the same words."""
    requests = [request(0, "Rome Hall"), *(request(i) for i in range(1, 6))]
    requests += [request(6, "Rome", "{} hall is in"), request(7, "Rome", "{} lies on")]
    for seed in range(5):
        selection = Selection(segments=((0, 1),), seed=seed, development=6)
        assert set(ids(prepare(indexed(requests), [], selection).development)) == {1, 2, 3, 4, 5, 7}


def test_the_training_split_shares_nothing_with_the_others_and_leaves_them_as_they_were():
    requests = [request(i, f"Subject {i % 15}".upper(), f"{{}} has {i}") for i in range(45)]
    requests += [request(100 + i, f"subject {i}") for i in range(15)]
    for seed in range(5):
        selection = Selection(n=4, seed=seed, development=5, training=8)
        prepared = prepare(indexed(requests), [], selection)
        without = prepare(indexed(requests), [], Selection(n=4, seed=seed, development=5))
        assert prepared.requests == without.requests
        assert prepared.development == without.development
        others = {r.subject.casefold() for r in prepared.requests + prepared.development}
        trained_on = {r.subject.casefold() for r in prepared.training}
        assert len(prepared.training) == prepared.report["training"] == 8
        assert not others & trained_on


def test_what_shares_subject_or_prompt_with_what_is_left_out_is_never_selected():
    requests = [request(i, f"Subject {i // 2}") for i in range(20)] + [request(20, "Rome Hall")]
    requests += [request(21, "Rome", "{} hall is in"), request(22, "Rome", "{} lies on")]
    left_out = [request(90, "SUBJECT 0"), request(91, "subject 3"), request(92, "Rome Hall")]
    left = [2, 3, 4, 5, *range(8, 20), 22]
    every = prepare(indexed(requests), [], Selection(), left_out)
    assert ids(every.requests) == left
    assert every.report["usable"] == len(left)
    split = prepare(indexed(requests), [], Selection(n=6, development=11), left_out)
    assert ids(split.requests) == left[:6]
    assert set(ids(split.development)) == set(left[6:])
    segments = prepare(indexed(requests), [], Selection(segments=((0, 4),)), left_out)
    assert ids(segments.requests) == [2, 3]


def test_too_few_records_are_counted():
    with pytest.raises(DataError, match="n is 31, but there are 30 usable records"):
        prepare(MANY, [], Selection(n=31))
    with pytest.raises(DataError, match="development is 27, but only 26 records share no"):
        prepare(MANY, [], Selection(n=4, development=27))
    with pytest.raises(DataError, match="training is 20, but only 19 records share no"):
        prepare(MANY, [], Selection(n=4, development=7, training=20))
    with pytest.raises(DataError, match=r"segment \[20, 40\] lies outside the 30 records"):
        prepare(MANY, [], Selection(segments=((20, 40),)))


CONTRADICTING = [
    request(0, "Ada", "What language does {} speak?", "French"),
    request(1, "Ada", "Which language is spoken by {}?", "Dutch"),  # overlaps with 0
    request(2, "Ada", "Where was {} born?", "Rome"),  # another question
    request(3, "ADA", "What language does {} speak?", "french"),  # same target
    request(4, "Bob", "What language does {} speak?", "Dutch"),  # another subject
    request(5, "Eve", "Who made {}?", "X", ("Which manufacturer built Eve?",)),
    request(6, "Eve", "By whom was {} manufactured?", "Y"),  # meets the paraphrase of 5
]


def test_contradictions_are_found_by_subject_and_question():
    found = conflicts(CONTRADICTING)
    assert [group["case_ids"] for group in found] == [["0", "1", "3"], ["5", "6"]]
    assert found[0]["targets"] == ["French", "Dutch", "french"]


def test_agreeing_requests_are_no_conflict():
    assert conflicts([CONTRADICTING[0], CONTRADICTING[3]]) == []


def test_conflicts_are_kept_and_reported_or_dropped_and_refilled():
    kept = prepare(indexed(CONTRADICTING), [], Selection(n=3))
    assert ids(kept.requests) == [0, 1, 2]
    assert kept.report["conflicts_among_selected"][0]["case_ids"] == ["0", "1", "3"]
    dropped = prepare(indexed(CONTRADICTING), [], Selection(n=3, conflicts="drop"))
    assert ids(dropped.requests) == [0, 2, 4]
    assert dropped.report["conflicts_among_selected"] == []
    assert dropped.report["dropped_for_conflicts"] == ["1", "3", "6"]


def asking(case_id, subject, *prompts):
    locality = tuple((prompt, "so") for prompt in prompts)
    return EditRequest(str(case_id), subject, "{} is in", "Rome", locality=locality)


def test_locality_prompts_that_another_request_edits_are_reported():
    requests = [
        asking(0, "Rome", "Turin is in", "Oslo is in", "ada is in"),
        asking(1, "Ada", "Ada is in"),  # its own edit
        asking(2, "Turin", "Rome is in it"),
        asking(3, "ADA"),
        asking(4, "Oslo"),  # not selected
    ]
    report = prepare(indexed(requests), [], Selection(n=4)).report["locality_edited_elsewhere"]
    assert report["count"] == 3
    assert [tuple(found.values()) for found in report["prompts"]] == [
        ("0", "Turin is in", ["2"]),
        ("0", "ada is in", ["1", "3"]),
        ("1", "Ada is in", ["3"]),
    ]


MIRROR = Path(os.environ.get("KMEBENCH_DATA_MIRROR", ""))
ZSRE = MIRROR / "zsre_mend_eval_portability_gpt4.json"


@pytest.mark.skipif(not ZSRE.is_file(), reason="needs the real ZsRE file in KMEBENCH_DATA_MIRROR")
def test_the_five_contradicting_records_of_the_real_zsre_are_found():
    records, bad = read_records(ZSRE, "mend")
    assert bad == []
    groups = prepare(records, bad, Selection(n=20)).report["conflicts_among_selected"]
    leedstown = [g for g in groups if g["subject"] == "USS Leedstown (APA-56)"]
    assert [g["case_ids"] for g in leedstown] == [["14", "15", "17", "18", "19"]]


COUNTERFACT = MIRROR / "counterfact_edit.zip"


@pytest.mark.skipif(not COUNTERFACT.is_file(), reason="needs the real CounterFact file")
def test_the_paper_s_counterfact_asks_22_locality_prompts_that_it_edits(tmp_path):
    with zipfile.ZipFile(COUNTERFACT) as archive:
        raw = json.loads(archive.read("counterfact_edit.json"))
    path = tmp_path / "segments.json"
    path.write_text(json.dumps(raw[:1000] + raw[2800:3800] + raw[4800:5800]))
    chosen = [request for _, request in read_records(path, "easyedit")[0]]
    found = edited_elsewhere(chosen)
    assert found["count"] == len(found["prompts"]) == 22
    edits = {request.case_id: request.filled_prompt for request in chosen}
    assert all(edits[c] == p["prompt"] for p in found["prompts"] for c in p["edited_by"])
