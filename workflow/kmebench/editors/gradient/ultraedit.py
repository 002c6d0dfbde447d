"""UltraEdit (Gu et al. 2026, "UltraEdit: training-, subject- and memory-free lifelong editing").

One forward and one backward pass give, at each answer token, the input h of every edited module and
the loss gradient g at its output. Both are normalised by moments that run through all edits of a
run. A step of fixed size against the normalised gradient is written by ridge regression on h.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from kmebench.data.records import EditRequest
from kmebench.editors.base import Editor, build_editor
from kmebench.editors.gradient.cards import UltraEditHparams
from kmebench.editors.gradient.moments import ByShape, Moments, packed, unpacked, with_rows
from kmebench.editors.losses import check_finite, row_losses
from kmebench.editors.rows import Rows, Site, rows_of, sites_of
from kmebench.edits.weights import WeightDelta
from kmebench.errors import ConfigError
from kmebench.io.tensors import TensorFile, write_tensors
from kmebench.models.editable import EditableModel
from kmebench.models.encoding import Encoded, length_sorted_chunks

#: Requests whose answer tokens the released code takes the mean loss of.
GROUP = 10
FORMAT = "kmebench.warm-up.v1"


class UltraEdit(Editor):
    """All requests of a call from one gradient, taken where the call begins."""

    hparams: UltraEditHparams
    #: What rows are normalised by.
    kind: ClassVar[type[Moments]] = Moments
    _moments: ByShape

    def edit(self, model: EditableModel, requests: Sequence[EditRequest]) -> WeightDelta:
        """Edit ``requests`` together; see :meth:`Editor.edit`."""
        sites = sites_of(self.name, self.hparams, model)
        with self.stopwatch("trace"):
            seen = self._rows(model, requests, sites)
            self._moments = with_rows(self._moments, seen, self.kind)
        self.steps += 1
        total = WeightDelta({})
        with self.stopwatch("solve"):
            for site, rows in zip(sites, seen, strict=True):
                moments = self._moments[rows.shape]
                u, v = ridge_change(rows, moments, self.hparams.learning_rate, self.hparams.ridge)
                total += site.change(u, v)
        return total

    def _rows(
        self, model: EditableModel, requests: Sequence[EditRequest], sites: Sequence[Site]
    ) -> list[Rows]:
        """Return the rows of every site, of one pass forward and back."""
        encoded = model.encode([(r.filled_prompt, r.target_new) for r in requests])
        weights = loss_weights([e.n_target for e in encoded], [len(e.ids) for e in encoded])
        if self.hparams.loss == "sum":
            weights = torch.ones_like(weights)
        found = []
        for chunk in length_sorted_chunks([len(e.ids) for e in encoded], self.micro_batch):
            asked, texts = [requests[i] for i in chunk], [encoded[i] for i in chunk]
            found.append(self._pass(model, asked, texts, weights[chunk], sites))
        return [Rows.joint(parts) for parts in zip(*found, strict=True)]

    def _pass(
        self,
        model: EditableModel,
        requests: Sequence[EditRequest],
        encoded: Sequence[Encoded],
        weights: Tensor,
        sites: Sequence[Site],
    ) -> list[Rows]:
        """Return the rows of some requests, whose tokens have ``weights`` [R]."""
        batch, rate = model.collate(encoded), self.hparams.learning_rate

        def loss() -> Tensor:
            losses = row_losses(model.answer_logits(batch), batch.labels, batch)
            check_finite(self.name, losses.detach(), requests, self.steps, learning_rate=rate)
            return (losses * batch.counts * weights.to(losses)).sum()

        places = batch.rows, batch.positions
        return rows_of(model, sites, min(self.hparams.layers), places, loss)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the moments of all edits so far."""
        return packed(self._moments)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the moments; an empty state has those of the warm-up, or none."""
        warm = self.assets.get("trained")
        tensors = state if state or not warm else read_warm_up(warm)
        self._moments = unpacked(tensors, self.kind)


def loss_weights(targets: Sequence[int], lengths: Sequence[int]) -> Tensor:
    """Return what an answer token of each request counts, [E], in the mean of its group.

    As released, groups are tens of the requests in the order of falling length; the mean is over
    all ``targets`` tokens of a group together. ``lengths`` are tokens of a text.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    weights = torch.empty(len(lengths), dtype=torch.float64)
    for start in range(0, len(order), GROUP):
        group = order[start : start + GROUP]
        weights[group] = 1 / sum(targets[i] for i in group)
    return weights


def ridge_change(rows: Rows, moments: Moments, rate: float, ridge: float) -> tuple[Tensor, Tensor]:
    """Return factors u [out, N], v [N, in] of ΔW = Vᵀ (H Hᵀ + ρ I)⁻¹ H, in float64.

    V = −η diag(‖ĥ‖²) Ĝ, [N, out], with ĥ and ĝ normalised by ``moments`` and H as it is. ΔW
    minimises ‖H ΔWᵀ − V‖² + ρ ‖ΔW‖²; the released code solves the same with HᵀH, in × in.
    """
    normal_inputs, normal_gradients = rows.split(moments.normalised(rows.joined))
    step = -rate * normal_inputs.square().sum(dim=1, keepdim=True) * normal_gradients
    return step.T, rows.ridge_solution(ridge)


def warm_up(
    path: str | Path,
    model: EditableModel,
    requests: Sequence[EditRequest],
    settings: Mapping[str, Any],
) -> None:
    """Write the moments of the first ``warm_up`` of the development requests, none of them edited.

    ``settings``: ``editor``, the name of UltraEdit or of one that builds on it, and its values.

    Raises:
        ConfigError: there are fewer requests.
    """
    values = dict(settings)
    editor = build_editor(values.pop("editor"), values, {})
    asked = values["warm_up"]
    if len(requests) < asked:
        raise ConfigError(
            f"{editor.name}: warm_up asks for {asked} requests of the development split, which "
            f"has {len(requests)}; lower warm_up, or raise the data set's development."
        )
    editor.edit(model, requests[:asked])
    write_tensors(path, editor.state_dict(), FORMAT, {"requests": asked})


def read_warm_up(path: str | Path) -> dict[str, Tensor]:
    """Read the moments of :func:`warm_up`.

    Raises:
        KMEBenchError: the file is of another kind, or damaged.
    """
    file = TensorFile.open(path, FORMAT)
    return {name: file.tensor(name) for name in file.digests}
