"""Our hyper-parameters under the names that the toolkits of ROME's line of code give them."""

from dataclasses import fields
from typing import Any

from kmebench.models.editable import EditableModel
from kmebench.models.layouts import layout_of

#: Ours -> theirs.
_NAMES = {
    "steps": "v_num_grad_steps",
    "learning_rate": "v_lr",
    "kl_factor": "kl_factor",
    "weight_decay": "v_weight_decay",
    "clamp_factor": "clamp_norm_factor",
    "moment_weight": "mom2_update_weight",
    "second_moment": "mom2_adjustment",
    "epsilon": "emmet_lambda",
    "threshold": "nullspace_threshold",
    "ridge": "L2",
}


def reference_hparams(cls: type, hparams: Any, model: EditableModel, **given: Any) -> Any:
    """Build a toolkit's hyper-parameters ``cls`` from ours; ``given`` counts for more."""
    ours = vars(hparams)
    values = (
        _fixed(model) | _modules(model) | {_NAMES[k]: v for k, v in ours.items() if k in _NAMES}
    )
    values |= {"layers": list(edited_layers(hparams))} | given
    return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})


def edited_layers(hparams: Any) -> tuple[int, ...]:
    """Return the layers whose W2 an editor of ROME's family changes; none for other editors."""
    ours = vars(hparams)
    return tuple(ours.get("layers", [ours["layer"]] if "layer" in ours else ()))


def edited_weights(hparams: Any, model: EditableModel) -> list[str]:
    """Return the names of the weights of :func:`edited_layers`."""
    return [model.ffn[layer].value.weight_name for layer in edited_layers(hparams)]


def _fixed(model: EditableModel) -> dict[str, Any]:
    return {
        "fact_token": "subject_last",
        "layer_selection": "all",
        "v_loss_layer": model.n_layers - 1,
        "mom2_adjustment": True,
        "nll_loss_factor": 1.0,
        "update_norm_lambda": 0,
        "context_template_length_params": [],  # contexts are given
        "mom2_dataset": "given",
        "mom2_n_samples": 0,
        "mom2_dtype": "float32",
        "stats_dir": "",
        "device": str(model.device),
    }


def _modules(model: EditableModel) -> dict[str, str]:
    layout = layout_of(model.model.config)
    layer = f"{layout.layers}.{{}}"
    return {
        "layer_module_tmp": layer,
        "rewrite_module_tmp": f"{layer}.{layout.value_projection}",
        "mlp_module_tmp": f"{layer}.{layout.value_projection.rpartition('.')[0]}",
        "attn_module_tmp": f"{layer}.{layout.attention}",
        "ln_f_module": layout.norm,
        "lm_head_module": _head(model),
    }


def _head(model: EditableModel) -> str:
    """Name the head's module by its weight, which is the embedding's where the two are tied."""
    weight = model.model.get_output_embeddings().weight
    names = [name for name, p in model.model.named_parameters() if p is weight]
    return names[0].removesuffix(".weight")
