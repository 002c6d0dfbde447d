"""OpenFacts: the facts this repository carries, in the forms of the public edit sets."""

import csv
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kmebench.data.records import SLOT
from kmebench.errors import DataError

NEIGHBOURS = 3  # locality prompts of one record in the CounterFact form


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
        DataError: a template or a fact is malformed; names file and line or relation.
    """
    path = Path(folder) / "relations.json"
    relations = []
    for raw in json.loads(path.read_text(encoding="utf-8")):
        name = raw.get("id", "without id")
        try:
            templates = {k: raw[k] for k in ("prompt", "question", "question_paraphrase")}
            paraphrases = tuple(raw["paraphrases"])
        except KeyError as error:
            raise DataError(f"{path}: the relation {name!r} has no {error}.") from error
        for template in (*templates.values(), *paraphrases):
            if template.count(SLOT) != 1 or template != template.strip():
                raise DataError(
                    f"{path}: the relation {name!r} has the template {template!r}; it must hold "
                    f"{SLOT} once and begin and end without a blank."
                )
        facts = tuple(_facts(Path(folder) / "facts" / f"{name}.csv"))
        relations.append(Relation(id=name, paraphrases=paraphrases, facts=facts, **templates))
    return relations


def _facts(path: Path) -> Iterator[tuple[str, str]]:
    if not path.is_file():
        raise DataError(f"{path} does not exist; every relation needs its table of facts.")
    seen = set()
    with open(path, encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        if reader.fieldnames != ["subject", "object"]:
            raise DataError(f"{path}, line 1: the columns must be subject,object.")
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if not row["subject"] or not row["object"]:
                raise DataError(f"{where}: subject or object is empty.")
            if row["subject"] in seen:
                raise DataError(f"{where}: the subject {row['subject']!r} stands there twice.")
            seen.add(row["subject"])
            yield row["subject"], row["object"]


def fill(template: str, subject: str) -> str:
    """Put the subject into the slot."""
    return template.replace(SLOT, subject)


def counterfact_records(folder: str | Path, seed: int) -> list[dict[str, Any]]:
    """Emit all facts in CounterFact's form, shuffled by the seed.

    Neighbourhood prompts ask the same relation of other subjects with the same true object;
    where there are too few of them, of any others. ``neighborhood_targets`` names their answers.
    """
    draw = random.Random(seed)
    records = []
    for relation, subject, true in _shuffled(load_relations(folder), draw):
        others = [fact for fact in relation.facts if fact[0] != subject]
        same = [fact for fact in others if fact[1] == true]
        pool = same if len(same) >= NEIGHBOURS else others
        neighbours = draw.sample(pool, NEIGHBOURS)
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
    """
    draw = random.Random(seed)
    relations = load_relations(folder)
    records = []
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
    """Return (filled text, object) of every fact in every wording, in a fixed order."""
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
    """Choose a counterfactual target: an object of the relation that is not the truth.

    Nor does one begin with the other, so that no half-right answer counts.
    """
    truth = true.casefold()
    objects = sorted({o for _, o in relation.facts})
    candidates = [
        o
        for o in objects
        if not o.casefold().startswith(truth) and not truth.startswith(o.casefold())
    ]
    return draw.choice(candidates)
