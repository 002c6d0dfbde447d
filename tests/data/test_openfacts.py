"""The facts of this repository: well formed, consistent, and emitted as promised."""

import json
import re
import shutil
import unicodedata
from pathlib import Path

import pytest

from kmebench.data.edit_sets import read_records
from kmebench.data.openfacts import (
    NEIGHBOURS,
    counterfact_records,
    fact_sentences,
    fill,
    load_relations,
    zsre_records,
)
from kmebench.data.prepare import conflicts
from kmebench.errors import DataError

FOLDER = Path(__file__).parents[2] / "resources" / "openfacts"
RELATIONS = {relation.id: relation for relation in load_relations(FOLDER)}
SAMPLES = {
    "capital": {
        "France": "Paris",
        "Australia": "Canberra",
        "Brazil": "Brasília",
        "Canada": "Ottawa",
        "Turkey": "Ankara",
    },
    "continent": {"Kenya": "Africa", "Peru": "South America", "Cuba": "North America"},
    "language": {"Brazil": "Portuguese", "Austria": "German", "Egypt": "Arabic"},
    "currency": {"Japan": "yen", "Croatia": "euro", "Poland": "zloty", "Sweden": "krona"},
    "chemical-symbol": {
        "gold": "Au",
        "tungsten": "W",
        "lead": "Pb",
        "sodium": "Na",
        "mercury": "Hg",
        "antimony": "Sb",
    },
    "author": {
        "Hamlet": "William Shakespeare",
        "Dracula": "Bram Stoker",
        "Moby-Dick": "Herman Melville",
        "The Divine Comedy": "Dante Alighieri",
    },
    "composer": {
        "Carmen": "Georges Bizet",
        "Aida": "Giuseppe Verdi",
        "The Planets": "Gustav Holst",
    },
    "painter": {
        "Guernica": "Pablo Picasso",
        "Nighthawks": "Edward Hopper",
        "The Scream": "Edvard Munch",
    },
    "founder": {"IKEA": "Ingvar Kamprad", "Puma": "Rudolf Dassler"},
    "headquarters": {"Nokia": "Espoo", "Microsoft": "Redmond", "Volkswagen": "Wolfsburg"},
    "landmark-city": {"Big Ben": "London", "the Colosseum": "Rome"},
    "city-country": {"Osaka": "Japan", "Porto": "Portugal", "Zurich": "Switzerland"},
    "sport": {"Tiger Woods": "golf", "Garry Kasparov": "chess"},
    "field": {"Noam Chomsky": "linguistics", "Dmitri Mendeleev": "chemistry"},
    "birthplace": {"Albert Einstein": "Ulm", "Franz Kafka": "Prague"},
    "director": {"Jaws": "Steven Spielberg", "Metropolis": "Fritz Lang"},
}


def test_there_are_enough_facts_and_relations():
    assert len(RELATIONS) >= 12
    assert sum(len(r.facts) for r in RELATIONS.values()) >= 600
    assert all(len(r.facts) >= 25 for r in RELATIONS.values())


@pytest.mark.parametrize("name", RELATIONS)
def test_sampled_facts_are_right(name):
    facts = dict(RELATIONS[name].facts)
    assert SAMPLES[name].items() <= facts.items()


@pytest.mark.parametrize("name", RELATIONS)
def test_every_subject_and_object_is_well_formed(name):
    relation = RELATIONS[name]
    for text in (text for fact in relation.facts for text in fact):
        assert text == unicodedata.normalize("NFC", text).strip()
        assert re.fullmatch(r"[\w .,'&\-–]+", text), text
        assert "  " not in text
    subjects = [subject for subject, _ in relation.facts]
    assert len({s.casefold() for s in subjects}) == len(subjects)
    assert subjects == sorted(subjects)
    assert len({o for _, o in relation.facts}) >= 3


@pytest.mark.parametrize("name", RELATIONS)
def test_every_template_is_a_prompt_or_a_question(name):
    relation = RELATIONS[name]
    assert len(set(relation.templates)) == 5
    assert relation.question.endswith("?")
    assert relation.question_paraphrase.endswith("?")
    assert len(relation.paraphrases) == 2
    for template in (relation.prompt, *relation.paraphrases):
        assert template[-1].isalpha() or template.endswith("{}")
    for template in relation.templates:
        assert template[0].isupper()  # subjects such as "the Louvre" never begin a sentence


def test_every_relation_says_where_its_facts_come_from():
    entries = json.loads((FOLDER / "relations.json").read_text(encoding="utf-8"))
    assert [entry["id"] for entry in entries] == list(RELATIONS)
    assert all(entry["source"].strip() for entry in entries)


def test_every_table_belongs_to_a_relation():
    assert {path.stem for path in (FOLDER / "facts").iterdir()} == set(RELATIONS)


@pytest.mark.parametrize("seed", [0, 1])
def test_counterfact_records_keep_their_promises(seed):
    records = counterfact_records(FOLDER, seed)
    assert [r["case_id"] for r in records] == list(range(len(records)))
    for record in records:
        rewrite = record["requested_rewrite"]
        relation = RELATIONS[rewrite["relation_id"]]
        facts, subject = dict(relation.facts), rewrite["subject"]
        true, new = rewrite["target_true"]["str"], rewrite["target_new"]["str"]
        assert facts[subject] == true
        assert new in facts.values()
        assert not new.casefold().startswith(true.casefold())
        assert not true.casefold().startswith(new.casefold())
        assert record["paraphrase_prompts"] == [fill(t, subject) for t in relation.paraphrases]
        asked = {fill(relation.prompt, s): o for s, o in relation.facts if s != subject}
        neighbours = record["neighborhood_prompts"]
        sharing = sum(o == true for o in facts.values()) - 1
        assert len(set(neighbours)) == len(neighbours) == min(NEIGHBOURS, sharing or NEIGHBOURS)
        assert [asked[n] for n in neighbours] == record["neighborhood_targets"]
        if sharing:
            assert set(record["neighborhood_targets"]) == {true}


@pytest.mark.parametrize("seed", [0, 1])
def test_zsre_records_keep_their_promises(seed):
    questions = {fill(r.question, s): (r.id, s, o) for r in RELATIONS.values() for s, o in r.facts}
    for record in zsre_records(FOLDER, seed):
        relation, subject, true = questions[record["src"]]
        other_relation, other_subject, answer = questions[record["loc"]]
        assert record["subject"] == subject
        assert record["answers"] == [true] != [record["alt"]]
        assert other_relation != relation
        assert other_subject != subject
        assert record["loc_ans"] == answer
        assert record["rephrase"] == fill(RELATIONS[relation].question_paraphrase, subject)
        new = record["alt"]
        assert new in dict(RELATIONS[relation].facts).values()
        assert not new.casefold().startswith(true.casefold())
        assert not true.casefold().startswith(new.casefold())


@pytest.fixture(params=[(counterfact_records, "rome"), (zsre_records, "mend")], ids=lambda p: p[1])
def loaded(request, tmp_path):
    """Records as emitted, and the requests that the loader of their public form makes of them."""
    emit, schema = request.param
    raw = emit(FOLDER, 0)
    path = tmp_path / "set.json"
    path.write_text(json.dumps(raw), encoding="utf-8")
    records, bad = read_records(path, schema)
    assert bad == []
    return raw, [request for _, request in records]


def test_the_loaders_of_the_public_forms_find_the_templates(loaded):
    raw, requests = loaded
    templates = {t for r in RELATIONS.values() for t in (r.prompt, r.question)}
    assert len(requests) == len(raw)
    assert {request.prompt for request in requests} <= templates
    assert all(request.locality for request in requests)


def test_no_two_edits_contradict_each_other(loaded):
    _, requests = loaded
    assert conflicts(requests) == []


@pytest.mark.parametrize("seed", range(5))
def test_the_first_records_cover_many_relations(seed):
    first = counterfact_records(FOLDER, seed)[:40]
    assert len({r["requested_rewrite"]["relation_id"] for r in first}) >= 10


@pytest.mark.parametrize("emit", [counterfact_records, zsre_records])
def test_the_seed_decides_everything(emit):
    assert emit(FOLDER, 3) == emit(FOLDER, 3)
    assert emit(FOLDER, 3) != emit(FOLDER, 4)


def test_training_sentences_cover_every_fact_in_every_wording():
    sentences = fact_sentences(FOLDER)
    assert len(sentences) == 5 * sum(len(r.facts) for r in RELATIONS.values())
    assert ("The capital of France is", "Paris") in sentences
    assert len(set(sentences)) == len(sentences)


@pytest.fixture
def copy(tmp_path):
    return Path(shutil.copytree(FOLDER, tmp_path / "openfacts"))


def complaint_about(folder):
    """Return the one sentence in which the folder is refused."""
    with pytest.raises(DataError) as refused:
        load_relations(folder)
    sentence = str(refused.value).replace(str(folder), "")
    assert sentence.endswith(".")
    assert ". " not in sentence
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("France,Lyon", "the subject 'France' stands there twice"),
        ("Atlantis,", "the object is empty"),
        (",Poseidonis", "the subject is empty"),
        ("Atlantis, Poseidonis", "the object begins or ends with a blank"),
        ("Atlantis", "it holds 1 cells"),
        ("Atlantis,Poseidonis,Thera", "it holds 3 cells"),
        ("", "it holds 0 cells"),
        ("Atlan{}tis,Poseidonis", "the subject holds {} 1 times"),
        ("Atlantis,Poseido\u0301nis", "the object is not in the Unicode form NFC"),
        ("Atlantis,Posei\u200bdonis", "the object holds a line break or another character"),
    ],
)
def test_a_bad_fact_is_named_with_file_and_line(copy, row, complaint):
    table = copy / "facts" / "capital.csv"
    number = len(RELATIONS["capital"].facts) + 2
    with open(table, "a", encoding="utf-8") as stream:
        stream.write(row + "\n")
    assert complaint_about(copy).startswith(f"/facts/capital.csv, line {number}: {complaint}")


@pytest.mark.parametrize("header", ["subject", "object,subject", "subject,object,source", ""])
def test_a_missing_column_is_named_with_file_and_line(copy, header):
    (copy / "facts" / "capital.csv").write_text(f"{header}\nFrance,Paris\n", encoding="utf-8")
    assert "capital.csv, line 1: the columns must be" in complaint_about(copy)


@pytest.mark.parametrize("rows", ["", "France,Paris\n", "a,Paris\nb,Paris\n", "a,C\nb,Cl\n"])
def test_a_table_without_counterfactual_targets_is_refused(copy, rows):
    (copy / "facts" / "capital.csv").write_text(f"subject,object\n{rows}", encoding="utf-8")
    assert "capital.csv has an object without any other" in complaint_about(copy)


def test_a_table_in_another_encoding_is_refused(copy):
    (copy / "facts" / "capital.csv").write_bytes("subject,object\nPerú,Lima\n".encode("latin-1"))
    assert "capital.csv is not UTF-8" in complaint_about(copy)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"prompt": "The capital is"}, "'capital' has the template 'The capital is', which holds"),
        ({"prompt": "{} and {} is"}, "which holds {} 2 times instead of 1"),
        ({"prompt": "The capital of {} is "}, "begins or ends with a blank"),
        ({"prompt": ""}, "is empty"),
        ({"prompt": 3}, "is no text"),
        ({"question": "Capital of {}"}, "'Capital of {}', which does not end with a question mark"),
        ({"paraphrases": ["{} has"]}, "the paraphrases of 'capital' must be a list of 2"),
        ({"paraphrases": "{} has"}, "the paraphrases of 'capital' must be a list of 2"),
        ({"id": ""}, "entry 1 has the id '', which is empty"),
        ({"id": "continent"}, "the relation 'continent' stands there twice"),
    ],
)
def test_a_bad_relation_is_named_with_file_and_key(copy, change, complaint):
    path = copy / "relations.json"
    entries = json.loads(path.read_text(encoding="utf-8"))
    entries[0].update(change)
    path.write_text(json.dumps(entries), encoding="utf-8")
    sentence = complaint_about(copy)
    assert sentence.startswith("/relations.json: ")
    assert complaint in sentence


@pytest.mark.parametrize("key", ["id", "prompt", "paraphrases", "question", "question_paraphrase"])
def test_a_missing_key_is_named(copy, key):
    path = copy / "relations.json"
    entries = json.loads(path.read_text(encoding="utf-8"))
    del entries[0][key]
    path.write_text(json.dumps(entries), encoding="utf-8")
    assert f"has no {key!r}" in complaint_about(copy)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[\n{", "relations.json, line 2: it is not valid JSON"),
        ("{}", "relations.json holds a dict, expected a list"),
        ('["capital"]', "relations.json: entry 1 is a str"),
        ("[]", "relations.json holds fewer than two relations"),
    ],
)
def test_a_file_that_lists_no_relations_is_refused(copy, text, complaint):
    (copy / "relations.json").write_text(text, encoding="utf-8")
    assert complaint in complaint_about(copy)


@pytest.mark.parametrize("name", ["relations.json", "facts/sport.csv"])
def test_a_missing_file_is_named(copy, name):
    (copy / name).unlink()
    assert f"/{name} does not exist" in complaint_about(copy)
