"""What a GGUF file says of attention and positions, and what transformers makes of it.

transformers reads sizes and passes over the rest without a word, or puts a default of its own. Its
window of Phi-3 is none, whatever the file says. Mistral's files are Llama's, and say of none.
"""

from collections.abc import Iterator
from typing import Any

from gguf import GGUFReader, Keys, RopeScalingType
from transformers import PretrainedConfig

from kmebench.errors import ModelError

MEND = "take the maker's repository (source: hub)"
#: Architectures whose files say the window; of one that does not nobody knows it.
_WINDOWED = ("phi3", "gemma2", "gemma3")


def complete(config: PretrainedConfig, reader: GGUFReader, file: str) -> None:
    """Give Phi-3 the window that the file says, and refuse one that differs from its file.

    Raises:
        ModelError: names the key of the file, what stands there and what transformers takes.
    """
    said = _Said(reader)
    if config.model_type == "phi3":
        config.sliding_window = said(Keys.Attention.SLIDING_WINDOW) or None
    if reason := next(_differences(config, said), None):
        raise ModelError(f"{file} {reason}, so the model would be another: {MEND}.")


class _Said:
    """What a file says under a key of its architecture; None if nothing."""

    def __init__(self, reader: GGUFReader) -> None:
        self._fields = reader.fields
        self.architecture = str(self._fields["general.architecture"].contents())

    def name(self, key: str) -> str:
        return key.format(arch=self.architecture)

    def __call__(self, key: str) -> Any:
        field = self._fields.get(self.name(key))
        return None if field is None else field.contents()


def _differences(config: PretrainedConfig, said: _Said) -> Iterator[str]:
    """Say in what a config differs from its file."""
    scaling = said(Keys.Rope.SCALING_TYPE)
    if scaling not in (None, RopeScalingType.NONE.value):  # Gemma 3 from 4B on, YaRN
        yield f"scales its rotary positions ({scaling}), which transformers does not read from GGUF"
    window = said(Keys.Attention.SLIDING_WINDOW)
    if window is None and said.architecture in _WINDOWED:
        yield f"does not say how far attention sees ({said.name(Keys.Attention.SLIDING_WINDOW)})"
    if (window or None) != _window(config):
        yield _differs(said, Keys.Attention.SLIDING_WINDOW, window, _window(config))
    for key, taken in _taken(config).items():
        if said(key) not in (None, taken):
            yield _differs(said, key, said(key), taken)
    if getattr(config, "query_pre_attn_scalar", _head(config)) != _head(config):  # Gemma 2 27B
        yield f"has heads of width {_head(config)}, and does not say how their scores are scaled"


def _differs(said: _Said, key: str, held: Any, taken: Any) -> str:
    return f"says {said.name(key)} = {held}, and transformers takes {taken}"


def _window(config: PretrainedConfig) -> int | None:
    """Return how many positions attention sees in the layers where it does not see all."""
    kinds = getattr(config, "layer_types", None)
    sliding = kinds is None or "sliding_attention" in kinds
    return getattr(config, "sliding_window", None) if sliding else None


def _head(config: PretrainedConfig) -> int:
    """Return the width of a head of attention."""
    own = getattr(config, "head_dim", None)
    return own or config.hidden_size // config.num_attention_heads


def _taken(config: PretrainedConfig) -> dict[str, Any]:
    """Return what transformers takes for keys that it does not read, by the names of the file."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [kind == "sliding_attention" for kind in getattr(config, "layer_types", None) or ()]
    return {
        Keys.Rope.DIMENSION_COUNT: int(_head(config) * rope.get("partial_rotary_factor", 1.0)),
        Keys.Rope.FREQ_BASE_SWA: rope.get("sliding_attention", rope).get("rope_theta"),
        Keys.Attention.SLIDING_WINDOW_PATTERN: kinds,
        Keys.LLM.ATTN_LOGIT_SOFTCAPPING: getattr(config, "attn_logit_softcapping", None),
        Keys.LLM.FINAL_LOGIT_SOFTCAPPING: getattr(config, "final_logit_softcapping", None),
    }
