"""The facts of this repository: well formed, consistent, and emitted as promised."""

import re
import shutil
import unicodedata
from pathlib import Path

import pytest

from kmebench.data.openfacts import (
    NEIGHBOURS,
    counterfact_records,
    fact_sentences,
    fill,
    load_relations,
    zsre_records,
)
from kmebench.errors import DataError

FOLDER = Path(__file__).parents[2] / "resources" / "openfacts"
RELATIONS = {relation.id: relation for relation in load_relations(FOLDER)}
SAMPLES = {
    "capital": {"France": "Paris", "Australia": "Canberra", "Brazil": "Brasília"},
    "continent": {"Kenya": "Africa", "Peru": "South America"},
    "language": {"Brazil": "Portuguese", "Austria": "German"},
    "currency": {"Japan": "the yen", "Croatia": "the euro", "Poland": "the zloty"},
    "chemical-symbol": {"gold": "Au", "tungsten": "W", "lead": "Pb", "sodium": "Na"},
    "author": {"Hamlet": "William Shakespeare", "Dracula": "Bram Stoker"},
    "composer": {"Carmen": "Georges Bizet", "Aida": "Giuseppe Verdi"},
    "painter": {"Guernica": "Pablo Picasso", "Nighthawks": "Edward Hopper"},
    "founder": {"IKEA": "Ingvar Kamprad"},
    "headquarters": {"Nokia": "Espoo", "Microsoft": "Redmond"},
    "landmark-city": {"Big Ben": "London"},
    "city-country": {"Osaka": "Japan", "Porto": "Portugal"},
    "sport": {"Tiger Woods": "golf", "Garry Kasparov": "chess"},
    "field": {"Noam Chomsky": "linguistics"},
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
        assert len(set(neighbours)) == NEIGHBOURS
        assert [asked[n] for n in neighbours] == record["neighborhood_targets"]
        if sum(o == true for o in facts.values()) > NEIGHBOURS:
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
        assert subject in record["rephrase"]


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


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("France,Lyon", r"capital\.csv, line 117: the subject 'France' stands there twice"),
        ("Atlantis,", r"capital\.csv, line 117: subject or object is empty"),
    ],
)
def test_a_bad_fact_is_named_with_file_and_line(copy, line, complaint):
    table = copy / "facts" / "capital.csv"
    lines = len(table.read_text(encoding="utf-8").splitlines())
    with open(table, "a", encoding="utf-8") as stream:
        stream.write(line + "\n")
    with pytest.raises(DataError, match=complaint.replace("117", str(lines + 1))):
        load_relations(copy)


def test_a_bad_template_is_named(copy):
    path = copy / "relations.json"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("The capital of {} is", "The capital is"), encoding="utf-8")
    with pytest.raises(DataError, match=r"relations\.json: the relation 'capital' has the templ"):
        load_relations(copy)


def test_a_missing_table_is_named(copy):
    (copy / "facts" / "sport.csv").unlink()
    with pytest.raises(DataError, match=r"sport\.csv does not exist"):
        load_relations(copy)
