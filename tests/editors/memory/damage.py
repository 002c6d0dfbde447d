"""Files of overlays in which something is broken."""

from safetensors import safe_open
from safetensors.torch import load_file, save_file


def save_damaged(edit, overlay, broken, path):
    """Save an edit to ``path`` with other tensors, by name, in one of its overlays."""
    edit.save(path)
    with safe_open(path, "pt") as stream:
        metadata = stream.metadata()
    own = {f"overlay|{overlay}|{name}": tensor for name, tensor in broken.items()}
    save_file(load_file(path) | own, path, metadata)
