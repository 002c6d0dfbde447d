"""How the tests of memory editors edit a model, and ask it."""


def memory_of(model, editor, requests):
    """Apply the edit; return the memory that the model then carries."""
    model.apply(editor(model, requests).edit)
    return model.edits.overlays[editor.name]


def pairs(requests):
    return [(r.filled_prompt, r.target_new) for r in requests]


def logits(model, asked):
    """The logits of each pair by itself, [tokens, vocabulary]."""
    return [model.answer_logits(model.collate([e])) for e in model.encode(asked)]


def module_of(model, layer=1):
    """W2 of a layer."""
    return model.model.get_submodule(model.ffn[layer].value.weight_name.removesuffix(".weight"))
