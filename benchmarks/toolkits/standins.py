"""What a toolkit imports and a comparison does not need: made up in memory, for a while.

Nothing is written into the user's clone, and what a toolkit does to the interpreter ends with the
block.
"""

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class Unused:
    """Something that is imported, perhaps called while it is, and then never used."""

    def __call__(self, *_arguments: Any, **_options: Any) -> "Unused":
        return self

    def __getattr__(self, name: str) -> "Unused":
        if name.startswith("__"):
            raise AttributeError(name)
        return self


class _UnusedModule(ModuleType):
    def __getattr__(self, name: str) -> Unused:
        if name.startswith("__"):
            raise AttributeError(name)
        return Unused()


class _Finder(MetaPathFinder, Loader):
    """Finds packages whose own ``__init__`` is not run, and modules that are not there."""

    def __init__(self, folder: Path, empty: Sequence[str], unused: Sequence[str]) -> None:
        self.folder, self.empty, self.unused = folder, empty, unused

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name in self.empty:
            spec = ModuleSpec(name, self, is_package=True)
            spec.submodule_search_locations = [str(self.folder.joinpath(*name.split(".")))]
            return spec
        if any(f"{name}.".startswith(f"{unused}.") for unused in self.unused):
            return ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None if spec.name in self.empty else _UnusedModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


@contextlib.contextmanager
def standing_in(
    folder: Path, packages: Sequence[str], *, empty: Sequence[str] = (), unused: Sequence[str] = ()
) -> Iterator[None]:
    """Import ``packages`` from ``folder`` inside the block; leave the interpreter as it was.

    Of the packages ``empty`` no ``__init__`` is run (it would import a whole toolkit); the modules
    ``unused`` hold :class:`Unused` things only. Modules of these names, the search path and the
    environment are afterwards what they were before.
    """
    tops = {*packages, *(name.partition(".")[0] for name in unused)}
    finder = _Finder(folder, empty, unused)
    path, environment, bytecode = sys.path[:], dict(os.environ), sys.dont_write_bytecode
    hidden = _take_out(tops)
    sys.path.insert(0, str(folder))
    sys.meta_path.insert(0, finder)
    sys.dont_write_bytecode = True
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.dont_write_bytecode = bytecode
        sys.meta_path.remove(finder)
        sys.path[:] = path
        os.environ.clear()
        os.environ.update(environment)
        _take_out(tops)
        sys.modules.update(hidden)


def _take_out(tops: set[str]) -> dict[str, ModuleType]:
    names = [name for name in sys.modules if name.partition(".")[0] in tops]
    return {name: sys.modules.pop(name) for name in names}


@contextlib.contextmanager
def quietly_in(folder: Path) -> Iterator[None]:
    """Run the block in ``folder``, where a toolkit may write, without what it prints."""
    with (
        contextlib.chdir(folder),
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


class OnDevice(TorchFunctionMode):
    """Leads what a toolkit sends to ``cuda``, by that name, to the device that is compared on."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if function is torch.Tensor.cuda:
            return args[0].to(self.device)
        led = {k: self.device if v == "cuda" else v for k, v in (kwargs or {}).items()}
        if function is torch.Tensor.to:
            args = tuple(self.device if a == "cuda" else a for a in args)
        return function(*args, **led)
