"""The authors' code of PAC: its scoring and its two steps, epoch by epoch."""

import importlib
import json
import time
from argparse import Namespace
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import nn

from kmebench.data.records import EditRequest
from kmebench.editors.contexts import Contexts

from .base import Batches, Release, Run, Toolkit
from .standins import quietly_in, standing_in


class PACCode(Toolkit):
    """Drives ``PAC.assessment`` and ``PAC.edit`` in the order of our mini-batches."""

    release = Release(
        "PAC",
        "124010211bb15bc62d4baf2320b69410cb0198c9",
        "plms/gptj.py",
        ("pac.py",),
        "0719f9c29c5355fdeff42bc3f871462b1cea7e7d06ff3845c5901335bc0695dd",
    )
    editors = ("pac-released",)
    notes: ClassVar = {
        "pac-released": "the model's own class instead of the files in `plms`, mini-batches in "
        "the same order on both sides (theirs are shuffled without a seed)",
    }

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.model.register_forward_pre_hook(_to_device, with_kwargs=True)

    @classmethod
    def standing_in(cls, folder: Path) -> AbstractContextManager[None]:
        return standing_in(folder, ["pac"], unused=["plms", "scipy"])

    def run(self, editor: str, hparams: Any, contexts: Contexts | None, batches: Batches) -> Run:
        (requests,) = batches
        self.reset()
        with quietly_in(self.scratch):
            code = importlib.import_module("pac")
            model = self._model(code, hparams)
            data = self._data(code, model, requests)
            size = hparams.mini_batch
            loader = code.CounterFactDataLoader(data, size)
            items = [data[i] for i in range(len(data))]
            in_order = [items[i : i + size] for i in range(0, len(items), size)]
            assess = _Loader(data, [loader.cf_collate_fn(batch) for batch in in_order])
            start = time.perf_counter()
            for epoch in range(hparams.epochs):
                model.assessment(assess, epoch)
                for chunk in torch.randperm(len(items)).split(size):
                    batch = loader.cf_collate_fn([items[i] for i in chunk])
                    model.edit(batch[1], batch[2], batch[4])
            seconds = time.perf_counter() - start
        trained = [name for name, p in self.parameters.items() if p.requires_grad]
        return Run(self.change(trained), seconds / len(requests))

    def _model(self, code: Any, hparams: Any) -> Any:
        """Build their editor around our copy of the model."""
        gptj = self.model.config.model_type == "gptj"
        self.model.requires_grad_(True)
        models = SimpleNamespace(from_pretrained=lambda _path: self.model)
        code.GPTJForCausalLM = code.Llama3ForCausalLM = models
        code.AutoTokenizer = SimpleNamespace(from_pretrained=lambda _path: self.tokenizer)
        code.CONFIG["optimizer"]["lr"] = hparams.learning_rate
        return code.PAC(
            Namespace(
                llm_name="gptj" if gptj else "llama3",
                lamb=hparams.contrast,
                eta=hparams.rescore_every,
                topk=hparams.paths,
                bottomk=hparams.negatives,
            )
        )

    def _data(self, code: Any, model: Any, requests: Sequence[EditRequest]) -> Any:
        """Build their data set, with the unedited model's answers as they make them."""
        file = self.scratch / "records.json"
        file.write_text(json.dumps([_record(request) for request in requests]))
        data = code.CounterFact(str(file))
        data.reproduce(model.model, model.tokenizer, model.emb_device)
        return data


class _Loader(list):
    """Batches with the data set they are of, as a ``DataLoader`` has them."""

    def __init__(self, dataset: Any, batches: Sequence[Any]) -> None:
        super().__init__(batches)
        self.dataset = dataset


def _to_device(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Move what their code leaves on the CPU to the model."""
    return args, {k: v.to(module.device) if torch.is_tensor(v) else v for k, v in kwargs.items()}


def _record(request: EditRequest) -> dict[str, str]:
    prompt = request.filled_prompt
    return {
        "case_id": request.case_id,
        "prompt": prompt,
        "rephrase_prompt": prompt,
        "locality_prompt": prompt,
        "target_new": request.target_new,
        "ground_truth": request.target_new,
        "locality_ground_truth": request.target_new,
    }
