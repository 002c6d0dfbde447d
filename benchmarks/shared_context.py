"""What IKE's context costs each question, read once for all of a request or with each of them.

python benchmarks/shared_context.py --model results/models/smollm2-135m [--blocks 33]

Thirteen questions, as CounterFact has about a fact: the fact, two paraphrases and ten neighbours,
each asked for the new answer and for another. The context is made of facts of OpenFacts.
"""

from collections.abc import Mapping, Sequence

import torch
from common import build, openfacts_requests, parser, seconds, table

from kmebench.data.records import EditRequest
from kmebench.edits.edit import Edit
from kmebench.edits.overlays import Hook, Passage
from kmebench.edits.sentences import SentenceEncoder
from kmebench.edits.text_memory import Fact, TextMemory
from kmebench.evaluation.predict import Settings, predict
from kmebench.evaluation.prompts import Prompt
from kmebench.models.editable import EditableModel

HEADER = ["context", "tokens", "ms per question", "times"]
QUESTIONS = 13


class WithEachQuestion(TextMemory):
    """The same memory, which claims to act inside the model, where nothing is read apart."""

    kind = "benchmark"

    def hooks(self, passage: Passage) -> Mapping[str, Hook]:
        return {}


def context_of(requests: Sequence[EditRequest]) -> str:
    """Blocks as IKE has them; the last is open for a question."""
    told = [f"{r.filled_prompt} {r.target_new}" for r in requests]
    blocks = [f"New Fact: {fact}\nPrompt: {fact}\n\n" for fact in told]
    return "".join(blocks) + f"New Fact: {told[-1]}\nPrompt: "


def memory(kind: type[TextMemory], context: str) -> Edit:
    """The context before every question of the request; nothing is looked up."""
    nothing = kind("oracle", 0.0, SentenceEncoder("", ""))
    return Edit(overlays={"ike": nothing.with_facts([Fact("0", "", context)], torch.zeros(1, 1))})


def milliseconds(
    model: EditableModel, edit: Edit, prompts: Sequence[Prompt], repeats: int
) -> float:
    """Time of one question."""
    model.apply(edit)
    settings = Settings(batch_size=32)
    asked = lambda: predict(model, prompts, settings, decode=False)  # noqa: E731
    spent = seconds(asked, repeats, warm_up=0)
    model.revert()
    return 1000 * spent / len(prompts)


def main() -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--blocks", type=int, default=33)
    arguments = options.parse_args()
    model = build(arguments)
    context = context_of(openfacts_requests(arguments.blocks))
    prompts = [
        Prompt("0", 0, "edit", r.filled_prompt, r.target_new, r.target_new, r.target_true)
        for r in openfacts_requests(QUESTIONS)
    ]
    (ids,) = model.encode_prompts([context])
    milliseconds(model, Edit(), prompts, 1)  # warms up
    none = milliseconds(model, Edit(), prompts, arguments.repeats)
    rows = [["none", "0", f"{none:.1f}", ""]]
    shared = milliseconds(model, memory(TextMemory, context), prompts, arguments.repeats)
    rows.append(["read once", str(len(ids)), f"{shared:.1f}", "1.0"])
    each = milliseconds(model, memory(WithEachQuestion, context), prompts, arguments.repeats)
    rows.append(["read with each question", str(len(ids)), f"{each:.1f}", f"{each / shared:.1f}"])
    print(table(HEADER, rows))


if __name__ == "__main__":
    main()
