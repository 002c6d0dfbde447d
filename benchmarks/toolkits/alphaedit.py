"""The authors' code of AlphaEdit: MEMIT, AlphaEdit, RECT and PRUNE as its ``main`` runs them."""

import importlib
import json
import math
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

from torch import Tensor

from kmebench.data.records import EditRequest
from kmebench.editors.contexts import Contexts
from kmebench.models.early_exit import first

from .base import Batches, Release, Run, Toolkit
from .standins import OnDevice, quietly_in, standing_in
from .values import edited_weights, reference_hparams

#: Ours -> the name of the algorithm, and where its code is.
_CODE = {
    "memit": ("MEMIT", "memit.memit_main"),
    "alphaedit": ("AlphaEdit", "AlphaEdit.AlphaEdit_main"),
    "rect": ("MEMIT_rect", "memit.memit_rect_main"),
    "prune": ("MEMIT_prune", "memit.memit_main"),
}
_VALUES = "given.json"  # of the hyper-parameters, under the folder that globals.yml names


class AlphaEditCode(Toolkit):
    """Calls ``experiments.evaluate.main`` with records and hyper-parameters of ours."""

    release = Release(
        "AlphaEdit",
        "f5248d3d25f1b3863bff19c387293d635866079f",
        "AlphaEdit/AlphaEdit_main.py",
        ("AlphaEdit", "memit", "rome", "util", "experiments/evaluate.py", "globals.yml"),
        "309bb56d1afd438fc6cb263265ccb13a43c7a018d8a864bbf7d7bf37cf9465cf",
    )
    editors = tuple(_CODE)
    #: Values under which a few edits change a weight by more than its largest singular value.
    overrides: ClassVar = {
        "prune": {"base": math.e, "layers": [5], "learning_rate": 5.0, "moment_weight": 1.0}
    }
    notes: ClassVar = {
        "prune": "natural logarithm on both sides (the paper's base is 1.2); the code adds the "
        "restrained change on top of the edited weights, so what it adds is compared; one layer, "
        "learning rate 5 and lambda 1, so that few edits are restrained at all",
    }

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        shutil.copy(self.folder / "globals.yml", self.scratch)  # read where it runs
        with quietly_in(self.scratch):
            self.evaluate = importlib.import_module("experiments.evaluate")
        self.evaluate.args = SimpleNamespace(downstream_eval_steps=0)  # of its command line
        self.evaluate.KnownsDataset = lambda _folder: [{"template": "{} is", "subject": "It"}]
        for name in ("memit.compute_z", "AlphaEdit.compute_z"):
            code = importlib.import_module(name)
            code.nethook = SimpleNamespace(
                **vars(code.nethook) | {"TraceDict": tuple_traces(code.nethook)}
            )
        for _, name in _CODE.values():
            importlib.import_module(name).layer_stats = self.layer_stats

    @classmethod
    def standing_in(cls, folder: Path) -> AbstractContextManager[None]:
        packages = ["AlphaEdit", "memit", "rome", "util", "experiments"]
        unused = ["baselines", "dsets", "glue_eval", "nse", "experiments.py"]
        return standing_in(folder, packages, unused=unused)

    def run(self, editor: str, hparams: Any, contexts: Contexts | None, batches: Batches) -> Run:
        algorithm, name = _CODE[editor]
        hyper, apply = self.evaluate.ALG_DICT[algorithm]
        importlib.import_module(name).CONTEXT_TEMPLATES_CACHE = [list(group) for group in contexts]
        values = reference_hparams(hyper, hparams, self.ours, model_name="Llama3-8B")
        names = edited_weights(hparams, self.ours)
        self.reset()
        edits = _Edits(apply, lambda: self.change(names))
        self.evaluate.ALG_DICT[algorithm] = (hyper, edits)
        try:
            self._main(algorithm, values, batches)
        finally:
            self.evaluate.ALG_DICT[algorithm] = (hyper, apply)
        change = self.change(names)
        if editor == "prune":
            change = {name: change[name] - edits.change[name] for name in names}
        return Run(change, edits.seconds / sum(map(len, batches)))

    def _main(self, algorithm: str, values: Any, batches: Batches) -> None:
        records = [_record(number, r) for number, r in enumerate(r for b in batches for r in b)]
        self.evaluate.DS_DICT["zsre"] = (lambda *_, **__: records, lambda *_: {})
        folder = self.scratch / self.evaluate.HPARAMS_DIR / algorithm.partition("_")[0]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _VALUES).write_text(json.dumps(asdict(values)))
        cuda = self.model.device.type == "cuda"
        with quietly_in(self.scratch), nullcontext() if cuda else OnDevice(self.model.device):
            self.evaluate.main(
                algorithm,
                (self.model, self.tokenizer),
                _VALUES,
                "zsre",
                dataset_size_limit=len(records),
                continue_from_run=None,
                skip_generation_tests=True,
                generation_test_interval=1,
                conserve_memory=False,
                dir_name=algorithm,
                num_edits=len(batches[0]),
            )


class _Edits:
    """A toolkit's edit with a stopwatch; remembers what the last call left."""

    def __init__(self, apply: Callable[..., Any], change: Callable[[], dict[str, Tensor]]) -> None:
        self.apply, self.look = apply, change
        self.seconds = 0.0
        self.change: dict[str, Tensor] = {}

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        result = self.apply(*arguments, **options)
        self.seconds += time.perf_counter() - start
        self.change = self.look()
        return result


def tuple_traces(nethook: Any) -> type:
    """Return the toolkit's TraceDict for layers that say a tensor, where it expects a tuple."""

    class Traces(nethook.TraceDict):
        def __init__(self, *arguments: Any, edit_output: Callable[..., Any], **options: Any):
            def edit(output: Any, layer: str) -> Any:
                edit_output((first(output),), layer)  # changes the tensor in place
                return output

            super().__init__(*arguments, edit_output=edit, **options)

        def __getitem__(self, layer: str) -> Any:
            trace = super().__getitem__(layer)
            output = (first(trace.output),) if hasattr(trace, "output") else ()
            return SimpleNamespace(output=output, close=trace.close)

    return Traces


def _record(number: int, request: EditRequest) -> dict[str, Any]:
    rewrite = {
        "prompt": request.prompt,
        "subject": request.subject,
        "target_new": {"str": request.target_new},
    }
    return {"case_id": number, "requested_rewrite": rewrite}
