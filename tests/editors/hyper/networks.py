"""Networks in a state as after some training, and their files."""

import torch

from kmebench.editors.base import build_editor
from kmebench.editors.gradient.moments import Moments

#: Two shapes, one of them of two matrices.
LAYERS = {"value_layers": (1, 2), "key_layers": (2,)}
SMALL = LAYERS | {"rank": 3, "steps": 4, "edits": 1, "groups": 2, "step_size": 0.05}


def editor_of(name, assets=None, **hparams):
    return build_editor(name, SMALL | hparams, assets or {})


def fresh(editor, model, moved=0.0):
    """A network for the editor, its weights moved at random; rows are left as they are."""
    shapes = [site.shape for site in editor.sites(model)]
    network = editor.network(shapes, editor.hparams).to(model.model.dtype)
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter)
        parameter.data += moved * noise
    for shape in set(shapes):
        zero, one = torch.zeros(sum(shape)).double(), torch.ones(sum(shape)).double()
        network.moments[shape] = Moments(torch.tensor(2), zero, one)
    return network


def ready(name, model, path, moved=0.0, **hparams):
    """An editor with the file of such a network."""
    editor = editor_of(name, {"hypernetwork": path}, **hparams)
    network = fresh(editor, model, moved)
    network.save(path, editor.hparams, records=3)
    return editor, network
