"""OpenFacts: the facts this repository carries, in the forms of the public edit sets."""

import csv
import io
import json
import random
import unicodedata
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kmebench.data.records import SLOT
from kmebench.errors import DataError

KEYS = ("id", "prompt", "paraphrases", "question", "question_paraphrase")
PARAPHRASES = 2
NEIGHBOURS = 3  # at most, locality prompts of one record in the CounterFact form


@dataclass(frozen=True)
class Relation:
    """One relation: its templates, each with one slot, and its facts (subject, object)."""

    id: str
    prompt: str
    paraphrases: tuple[str, ...]
    question: str
    question_paraphrase: str
    facts: tuple[tuple[str, str], ...]

    @property
    def templates(self) -> tuple[str, ...]:
        """All wordings."""
        return (self.prompt, *self.paraphrases, self.question, self.question_paraphrase)


def load_relations(folder: str | Path) -> list[Relation]:
    """Read and check ``relations.json`` and the fact table of every relation.

    Raises:
        DataError: a file, a template or a fact is malformed; names file and line or relation.
    """
    path = Path(folder) / "relations.json"
    relations = [_relation(path, number, raw) for number, raw in enumerate(_entries(path), start=1)]
    ids = [relation.id for relation in relations]
    if twice := [name for name in ids if ids.count(name) > 1]:
        raise DataError(f"{path}: the relation {twice[0]!r} stands there twice; delete one.")
    if len(relations) < 2:
        raise DataError(
            f"{path} holds fewer than two relations; add one, because locality questions are "
            "taken from another relation than the edit."
        )
    return relations


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise DataError(
            f"{path} does not exist; OpenFacts needs relations.json and, for every relation in "
            "it, the table facts/RELATION.csv."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8."
        ) from error


def _entries(path: Path) -> list[Any]:
    try:
        entries = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {error.lineno}: it is not valid JSON ({error.msg})."
        ) from error
    if not isinstance(entries, list):
        raise DataError(f"{path} holds a {type(entries).__name__}, expected a list of relations.")
    return entries


def _relation(path: Path, number: int, raw: Any) -> Relation:
    """Check one entry of ``relations.json`` and read its table."""
    if not isinstance(raw, dict):
        raise DataError(f"{path}: entry {number} is a {type(raw).__name__}, expected an object.")
    name = raw.get("id", f"number {number}")
    if missing := [key for key in KEYS if key not in raw]:
        raise DataError(f"{path}: the relation {name!r} has no {missing[0]!r}; add it.")
    if flaw := _flaw(name, slots=0):
        raise DataError(f"{path}: entry {number} has the id {name!r}, which {flaw}; mend it.")
    if not isinstance(raw["paraphrases"], list) or len(raw["paraphrases"]) != PARAPHRASES:
        raise DataError(f"{path}: the paraphrases of {name!r} must be a list of {PARAPHRASES}.")
    relation = Relation(
        id=name,
        prompt=raw["prompt"],
        paraphrases=tuple(raw["paraphrases"]),
        question=raw["question"],
        question_paraphrase=raw["question_paraphrase"],
        facts=_facts(path.parent / "facts" / f"{name}.csv"),
    )
    _check_templates(path, relation)
    return relation


def _check_templates(path: Path, relation: Relation) -> None:
    for template in relation.templates:
        if flaw := _flaw(template, slots=1):
            raise DataError(
                f"{path}: the relation {relation.id!r} has the template {template!r}, which "
                f"{flaw}; mend it."
            )
    for question in (relation.question, relation.question_paraphrase):
        if not question.endswith("?"):
            raise DataError(
                f"{path}: the relation {relation.id!r} has the question {question!r}, which does "
                "not end with a question mark; add it."
            )


def _facts(path: Path) -> tuple[tuple[str, str], ...]:
    """Read one table; every object has another one of the table to be edited to."""
    rows = csv.reader(io.StringIO(_read(path)))
    if next(rows, None) != ["subject", "object"]:
        raise DataError(f"{path}, line 1: the columns must be subject,object.")
    facts: dict[str, str] = {}
    for row in rows:
        where = f"{path}, line {rows.line_num}"
        if len(row) != 2:
            raise DataError(f"{where}: it holds {len(row)} cells, expected subject,object.")
        for column, cell in zip(("subject", "object"), row, strict=True):
            if flaw := _flaw(cell, slots=0):
                raise DataError(f"{where}: the {column} {flaw}; mend it.")
        if row[0] in facts:
            raise DataError(f"{where}: the subject {row[0]!r} stands there twice; delete one.")
        facts[row[0]] = row[1]
    objects = set(facts.values())
    if not objects or not all(_others(objects, true) for true in objects):
        raise DataError(
            f"{path} has an object without any other to edit it to; add facts with objects that "
            "do not begin with one another."
        )
    return tuple(facts.items())


def _flaw(text: Any, slots: int) -> str | None:
    """Say what is wrong with a text that must hold the slot ``slots`` times."""
    if not isinstance(text, str):
        return "is no text"
    if not text:
        return "is empty"
    if text != text.strip():
        return "begins or ends with a blank"
    if text.count(SLOT) != slots:
        return f"holds {SLOT} {text.count(SLOT)} times instead of {slots}"
    if not text.isprintable():
        return "holds a line break or another character that cannot be seen"
    if not unicodedata.is_normalized("NFC", text):
        return "is not in the Unicode form NFC"
    return None


def fill(template: str, subject: str) -> str:
    """Put the subject into the slot."""
    return template.replace(SLOT, subject)


def counterfact_records(folder: str | Path, seed: int) -> list[dict[str, Any]]:
    """Emit all facts in CounterFact's form, shuffled by the seed.

    Neighbourhood prompts ask the same relation of up to three other subjects with the same
    true object; where no other subject has it (capitals, symbols), of any others.
    ``neighborhood_targets`` names their answers.

    Raises:
        DataError: see :func:`load_relations`.
    """
    draw = random.Random(seed)
    records: list[dict[str, Any]] = []
    for relation, subject, true in _shuffled(load_relations(folder), draw):
        others = [fact for fact in relation.facts if fact[0] != subject]
        same = [fact for fact in others if fact[1] == true]
        pool = same or others
        neighbours = draw.sample(pool, min(NEIGHBOURS, len(pool)))
        records.append(
            {
                "case_id": len(records),
                "requested_rewrite": {
                    "prompt": relation.prompt,
                    "relation_id": relation.id,
                    "target_new": {"str": _other_object(relation, true, draw)},
                    "target_true": {"str": true},
                    "subject": subject,
                },
                "paraphrase_prompts": [fill(t, subject) for t in relation.paraphrases],
                "neighborhood_prompts": [fill(relation.prompt, s) for s, _ in neighbours],
                "neighborhood_targets": [o for _, o in neighbours],
            }
        )
    return records


def zsre_records(folder: str | Path, seed: int) -> list[dict[str, Any]]:
    """Emit all facts in the form of MEND's ZsRE, shuffled by the seed.

    The locality question is about another relation and another subject.

    Raises:
        DataError: see :func:`load_relations`.
    """
    draw = random.Random(seed)
    relations = load_relations(folder)
    records: list[dict[str, Any]] = []
    for relation, subject, true in _shuffled(relations, draw):
        elsewhere = draw.choice([r for r in relations if r.id != relation.id])
        other, answer = draw.choice([f for f in elsewhere.facts if f[0] != subject])
        new = _other_object(relation, true, draw)
        records.append(
            {
                "case_id": len(records),
                "subject": subject,
                "src": fill(relation.question, subject),
                "pred": "",
                "rephrase": fill(relation.question_paraphrase, subject),
                "alt": new,
                "answers": [true],
                "loc": fill(elsewhere.question, other),
                "loc_ans": answer,
                "cond": f"{true} >> {new} || {fill(relation.question, subject)}",
            }
        )
    return records


def fact_sentences(folder: str | Path) -> list[tuple[str, str]]:
    """Return (filled text, object) of every fact in every wording, in a fixed order.

    Raises:
        DataError: see :func:`load_relations`.
    """
    return [
        (fill(template, subject), true)
        for relation in load_relations(folder)
        for subject, true in relation.facts
        for template in relation.templates
    ]


def _shuffled(relations: list[Relation], draw: random.Random) -> list[tuple[Relation, str, str]]:
    facts = [(relation, *fact) for relation in relations for fact in relation.facts]
    draw.shuffle(facts)
    return facts


def _other_object(relation: Relation, true: str, draw: random.Random) -> str:
    """Choose a counterfactual target: an object of the relation that is not the truth."""
    return draw.choice(sorted(_others({o for _, o in relation.facts}, true)))


def _others(objects: Collection[str], true: str) -> list[str]:
    """Return the objects that neither begin with ``true`` nor begin it.

    So no half-right answer counts as the other one.
    """
    truth = true.casefold()
    folded = {o: o.casefold() for o in objects}
    return [o for o, f in folded.items() if not f.startswith(truth) and not truth.startswith(f)]
