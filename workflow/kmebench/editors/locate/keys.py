"""What stands at the last token of a subject: keys, outputs, residual streams.

The key of a subject is the input of the value projection W2 at its last token, averaged over
contexts (Meng et al. 2022, eq. 3); MEMIT averages inside each group of contexts first (Meng et al.
2023, section 4.3).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kmebench.data.records import EditRequest
from kmebench.editors.contexts import Contexts, prefixes
from kmebench.models.early_exit import at_last_tokens
from kmebench.models.editable import EditableModel
from kmebench.models.encoding import SubjectText


class Activations(NamedTuple):
    """Input and output of W2 at the subjects' last tokens, in float32 or float64."""

    keys: Tensor  # [B, M]
    outputs: Tensor  # [B, D], with the bias of W2


def subject_activations(
    model: EditableModel,
    requests: Sequence[EditRequest],
    contexts: Contexts,
    layer: int,
    micro_batch: int,
) -> Activations:
    """Return the input and output of W2 of ``layer`` on the live weights.

    Means over the contexts of each group, then over groups. ``micro_batch`` requests, in all
    their contexts, pass through the model at a time.

    Raises:
        ModelError: a prompt has no slot, or no token holds the end of its subject.
    """
    before = prefixes(contexts)
    texts = [SubjectText.of(r, p, None) for r in requests for p in before]
    module = model.ffn[layer].value.module
    sizes = [len(group) for group in contexts]
    inputs, outputs = _at_subjects(model, texts, module, micro_batch * len(before))
    return Activations(_grouped_mean(inputs, sizes), _grouped_mean(outputs, sizes))


def layer_outputs(
    model: EditableModel, requests: Sequence[EditRequest], layer: int, micro_batch: int
) -> Tensor:
    """Return the residual stream after ``layer`` at the subjects in the bare prompts, [B, D]."""
    return module_outputs(model, requests, model.layers[layer], micro_batch)


def module_outputs(
    model: EditableModel, requests: Sequence[EditRequest], module: nn.Module, micro_batch: int
) -> Tensor:
    """Return any module's output at the subjects in the bare prompts, [B, D]."""
    texts = [SubjectText.of(r, "", None) for r in requests]
    return _at_subjects(model, texts, module, micro_batch)[1]


def _grouped_mean(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """[B * C, X] -> [B, X]: mean inside each group of contexts, then over groups."""
    groups = values.unflatten(0, (-1, sum(sizes))).split(list(sizes), dim=1)
    return torch.stack([group.mean(dim=1) for group in groups]).mean(dim=0)


def _at_subjects(
    model: EditableModel, texts: Sequence[SubjectText], module: nn.Module, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """Return input and output of ``module`` at each text's subject, [N, ...] both."""
    # Nothing behind the subject's last token can reach it.
    ids = [e.ids[: e.subject_last + 1] for e in model.encode_subjects(texts)]
    return at_last_tokens(model, ids, module, chunk_size)
