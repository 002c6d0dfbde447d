"""EasyEdit: ROME, R-ROME, MEMIT, PMET, EMMET and AlphaEdit in its own code."""

import importlib
import time
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from kmebench.data.records import EditRequest
from kmebench.editors.contexts import Contexts
from kmebench.models.layouts import layout_of

from .base import Batches, Release, Run, Toolkit
from .standins import quietly_in, standing_in
from .values import edited_weights, reference_hparams

#: Ours -> its package, the name of its code, and that of its hyper-parameters.
_CODE = {
    "rome": ("rome", "rome", "ROMEHyperParams"),
    "r-rome": ("r_rome", "r_rome", "R_ROMEHyperParams"),
    "memit": ("memit", "memit", "MEMITHyperParams"),
    "pmet": ("pmet", "pmet", "PMETHyperParams"),
    "emmet": ("emmet", "emmet", "EMMETHyperParams"),
    "alphaedit": ("alphaedit", "AlphaEdit", "AlphaEditHyperParams"),
}
_ROME = ("rome", "r-rome")


class EasyEdit(Toolkit):
    """Calls its ``apply_..._to_model``, the entry of each of its editors."""

    release = Release(
        "EasyEdit",
        "14cea8245f06715684592ab55184939b99d70784",
        "easyeditor/models/memit/memit_main.py",
        (*(f"easyeditor/models/{package}" for package, *_ in _CODE.values()), "easyeditor/util"),
        "ddb2446712f1ad8c916d1eb91a56c516e8305d530538ca654db31cd9ba06bbbc",
    )
    editors = tuple(_CODE)
    overrides: ClassVar = {"emmet": {"epsilon_single": True}}
    notes: ClassVar = {
        "emmet": "epsilon for one request too, as the toolkit has it (epsilon_single)",
        "pmet": "texts padded on the right (the toolkit's own loader pads on the left, where its "
        "positions are off), targets with their leading blank (the toolkit puts it there for "
        "models whose path holds 'gpt' alone)",
    }

    @classmethod
    def standing_in(cls, folder: Path) -> AbstractContextManager[None]:
        return standing_in(folder, ["easyeditor"], empty=["easyeditor", "easyeditor.models"])

    def run(self, editor: str, hparams: Any, contexts: Contexts | None, batches: Batches) -> Run:
        code, hyper = self._code(editor)
        apply = getattr(code, f"apply_{_CODE[editor][1]}_to_model")
        given = reference_hparams(hyper, hparams, self.ours, **self._given(editor))
        flat = [template for group in contexts for template in group]
        nested = [list(group) for group in contexts]
        code.CONTEXT_TEMPLATES_CACHE = flat if editor in _ROME else nested
        if editor == "alphaedit":
            code.cache_c_new = False  # every run begins without earlier edits
        self.reset()
        seconds = 0.0
        with quietly_in(self.scratch):
            for batch in batches:
                asked = [_request(request, editor) for request in batch]
                start = time.perf_counter()
                apply(self.model, self.tokenizer, asked, given)
                seconds += time.perf_counter() - start
        change = self.change(edited_weights(hparams, self.ours))
        return Run(change, seconds / sum(map(len, batches)))

    def _code(self, editor: str) -> tuple[ModuleType, type]:
        """Return the module of an editor, which reads our second moments, and its hparams."""
        package, name, hyper = _CODE[editor]
        code = importlib.import_module(f"easyeditor.models.{package}.{name}_main")
        reader = "compute_u" if editor in _ROME else f"{name}_main"
        reader = importlib.import_module(f"easyeditor.models.{package}.{reader}")
        reader.layer_stats = self.layer_stats
        return code, getattr(code, hyper)

    def _given(self, editor: str) -> dict[str, Any]:
        given = {"alg_name": editor, "model_name": "llama"}  # weights lie as in Llama
        if editor == "pmet":
            layout = layout_of(self.ours.model.config)
            value = f"{layout.layers}.{{}}.{layout.value_projection}"
            given |= {"mlp_module_tmp": value, "rewrite_module_tmps": [value]}
        if editor == "alphaedit":
            given["P_loc"] = "null_space_project.pt"  # where it keeps its projections
        return given


def _request(request: EditRequest, editor: str) -> dict[str, str]:
    target = f" {request.target_new}" if editor == "pmet" else request.target_new
    return {
        "case_id": request.case_id,
        "prompt": request.prompt,
        "subject": request.subject,
        "target_new": target,
    }
