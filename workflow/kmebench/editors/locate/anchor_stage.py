"""How long values are on the unedited model: a cached stage on development records."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kmebench.data.records import SLOT, EditRequest
from kmebench.editors.locate.anchor import FORMAT
from kmebench.editors.locate.keys import module_outputs
from kmebench.editors.locate.targets import TargetSettings, optimise_targets
from kmebench.errors import ConfigError
from kmebench.io.tensors import write_tensors
from kmebench.memory import halved_if_needed
from kmebench.models.editable import EditableModel


def measure(
    path: str | Path,
    model: EditableModel,
    requests: Sequence[EditRequest],
    settings: Mapping[str, Any],
) -> None:
    """Write ‖v0 + δ‖ of the first ``records`` development requests, none of them edited.

    ``settings``: ``records``, and what :class:`TargetSettings` holds of layer and loss. δ is
    added to the layer's output, as MEMIT's, in the bare prompt alone. NaN where it is not finite.

    Raises:
        ConfigError: there are fewer requests.
    """
    loss = dict(settings)
    records = loss.pop("records")
    if len(requests) < records:
        raise ConfigError(
            f"anchor asks for {records} requests of the development split, which has "
            f"{len(requests)}; lower anchor, or raise the data set's development."
        )
    whole = TargetSettings(site="layer", **loss, keep_failed=True)
    chosen = requests[:records]
    targets = halved_if_needed(
        lambda size: optimise_targets(
            model, chosen, ((SLOT,),), replace(whole, micro_batch=size), "anchor"
        ),
        whole.micro_batch,
        "measuring the length of values",
        "choose a smaller dtype",
    )
    value = model.ffn[whole.layer].value.module
    said = module_outputs(model, chosen, value, whole.micro_batch)
    lengths = (said + targets.deltas).norm(dim=1)
    write_tensors(path, {"lengths": lengths}, FORMAT, {"case_ids": [r.case_id for r in chosen]})
