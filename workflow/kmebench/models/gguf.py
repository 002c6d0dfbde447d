"""GGUF files: dequantised to float32, tensor by tensor, as a Hugging Face folder.

transformers names and converts the tensors and makes config and tokenizer; what is here holds a
gigabyte of them at a time instead of the whole model, and parses the file once.
"""

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.gguf_reader import ReaderTensor
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

from kmebench.errors import ModelError
from kmebench.io.files import staged, write_json
from kmebench.models.gguf_config import MEND, complete

#: Bytes of float32 weights in one file of the folder, and in memory at once.
_SHARD = 2**30


def from_gguf(path: Path, folder: Path) -> None:
    """Write the model of a GGUF file as a Hugging Face folder, in float32.

    Raises:
        ModelError: the file cannot be read, or is of no supported architecture; or transformers
            does not read all of it, so that the model would be another.
    """
    with staged(folder) as staging:
        unpack(path, staging)


def unpack(path: Path, folder: Path) -> None:
    """Write the files of :func:`from_gguf` into a folder that exists."""
    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    with _readable(path), _parsed_once(path) as reader:
        config = AutoConfig.from_pretrained(**where, trust_remote_code=False)
        complete(config, reader, path.name)
        with torch.device("meta"):  # names and shapes alone
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        converter = _Converter(path.name, reader, model)
        converter.check()
        tokenizer = AutoTokenizer.from_pretrained(**where, trust_remote_code=False)
        tokenizer.save_pretrained(folder)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    _write(_shards(reader.tensors), converter, path, folder)


class _Converter:
    """Makes transformers' tensors from a file's."""

    def __init__(self, file: str, reader: gguf.GGUFReader, model: PreTrainedModel) -> None:
        self.file = file
        architecture = str(reader.fields["general.architecture"].contents())
        processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
        self.processor = processor(config=model.config.to_dict())
        self.names = get_gguf_hf_weights_map(model, self.processor)  # by the file's names
        self.held = [tensor.name for tensor in reader.tensors]
        # What is tied, once.
        self.wanted = {name: weight.shape for name, weight in model.named_parameters()}

    def check(self) -> None:
        """Refuse a file of which something is not read, or that lacks something.

        transformers passes over the one, and fills the other at random.
        """
        unread = [name for name in self.held if name not in self.names]
        found = [self.names[name] for name in self.held if name in self.names]
        if unread:
            raise ModelError(
                f"{self.file} holds weights that transformers does not read "
                f"({', '.join(unread[:3])}), so the model would be another: {MEND}."
            )
        if missing := sorted(self.wanted.keys() - found):
            raise ModelError(f"{self.file} is no whole model: it lacks {', '.join(missing[:3])}.")

    def __call__(self, tensor: ReaderTensor) -> tuple[str, torch.Tensor]:
        """Dequantise one tensor; return its name in transformers, too."""
        stored: dict[str, torch.Tensor] = {}  # by converters that name the tensor themselves
        weights = gguf.dequantize(tensor.data, tensor.tensor_type)
        done = self.processor.process(
            weights,
            tensor.name,
            tensor_key_mapping=self.names,
            parsed_parameters={"tensors": stored},
        )
        if done.name is not None:
            own = np.require(done.weights, requirements=("C", "W"))
            stored = {self.names[tensor.name]: torch.from_numpy(own)}
        ((name, weight),) = stored.items()
        if weight.shape != self.wanted.get(name):
            raise ModelError(
                f"{tensor.name} of {self.file} has the shape {list(weight.shape)}, and "
                f"transformers expects {list(self.wanted.get(name, ()))}: {MEND}."
            )
        return name, weight


def _shards(tensors: Sequence[ReaderTensor]) -> list[list[ReaderTensor]]:
    """Divide tensors, in order, among files of at most a shard, or of one tensor."""
    shards: list[list[ReaderTensor]] = [[]]
    size = 0
    for tensor in tensors:
        size += 4 * int(tensor.n_elements)
        if shards[-1] and size > _SHARD:
            shards.append([])
            size = 4 * int(tensor.n_elements)
        shards[-1].append(tensor)
    return shards


def _write(
    shards: Sequence[Sequence[ReaderTensor]], converter: _Converter, path: Path, folder: Path
) -> None:
    """Write the weights, and where each is if they are in several files."""
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        of = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        file = folder / f"model{of}.safetensors"
        with _readable(path):
            weights = dict(map(converter, shard))
        save_file(weights, file, metadata={"format": "pt"})
        places |= dict.fromkeys(weights, file.name)
        del weights  # before the next
    if len(shards) > 1:
        size = 4 * sum(int(tensor.n_elements) for shard in shards for tensor in shard)
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
        write_json(folder / "model.safetensors.index.json", index)


# -- reading --------------------------------------------------------------------------------


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Tell in a sentence why a file cannot be read."""
    try:
        yield
    except (ModelError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # gguf and transformers raise all kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"{path.name} cannot be read as a model in GGUF ({reason}).") from error


@contextmanager
def _parsed_once(path: Path) -> Iterator[gguf.GGUFReader]:
    """Let transformers parse a file once, and make its table of names once.

    It parses the file for the config and again for the tokenizer, and makes the table for every
    module of the model.
    """
    reader = _Reader(path)
    once = {
        "GGUFReader": lambda *_: reader,
        "get_tensor_name_map": cache(gguf.get_tensor_name_map),
    }
    usual = {name: getattr(gguf, name) for name in once}
    try:
        for name, function in once.items():
            setattr(gguf, name, function)
        yield reader
    finally:
        for name, function in usual.items():
            setattr(gguf, name, function)


class _Reader(gguf.GGUFReader):
    """A reader that takes a second for a vocabulary of 262,144 words, not twenty.

    gguf makes an array of the mapped file of each word, of its length and of its score.
    """

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list, list]:
        kinds = gguf.GGUFValueType
        if raw_type != kinds.ARRAY or self.byte_order != "I":
            return super()._get_field_parts(orig_offs, raw_type)
        item, count = struct.unpack_from("=IQ", self.data.data, orig_offs)
        start, kind = orig_offs + 12, kinds(item)
        if kind is kinds.STRING:
            end, parts = self._strings(start, count)
        elif kind in self.gguf_scalar_to_np:
            numbers = np.asarray(self._get(start, self.gguf_scalar_to_np[kind], count))
            end, parts = start + numbers.nbytes, list(numbers[:, None])
        else:
            return super()._get_field_parts(orig_offs, raw_type)
        return end - orig_offs, parts, list(range(count)), [kinds.ARRAY, kind]

    def _strings(self, offset: int, count: int) -> tuple[int, list[memoryview]]:
        """Return where an array of strings ends, and the strings."""
        data, length_of, strings = self.data.data, struct.Struct("=Q").unpack_from, []
        for _ in range(count):
            (length,) = length_of(data, offset)
            offset += 8 + length
            strings.append(data[offset - length : offset])
        return offset, strings
