"""Which source files a script or notebook depends on, read from its imports without running it.

Snakemake compares scripts by time stamp and does not see library code at all. Rules therefore
list this closure as an input: touching a file changes nothing (inputs are compared by
checksum), editing one re-runs exactly what it can influence.
"""

import ast
import json
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from kmebench.errors import ConfigError

PACKAGE = "kmebench"
_LIBRARY = Path(__file__).resolve().parents[2]  # the folder that holds the package
_CODE = _LIBRARY / PACKAGE
#: Files that decide no result, with all that only they import: how failures are told; and what
#: planning says, which reaches a job as its parameters and the names of its inputs.
_NO_RESULT = (
    *("__init__.py", "errors.py", "forkserver.py", "names.py", "io/logs.py"),
    *(
        "editors/__init__.py",
        "editors/cards.py",
        "editors/needs.py",
        "editors/sizes.py",
        "editors/*/cards.py",
        "planning/grid.py",
    ),
)
#: What modules read as their own.
_BESIDE = {"reporting/html.py": "templates/*.j2", "reporting/panels.py": "*.mplstyle"}


def code(rule: str, *modules: str) -> list[str]:
    """Return the script of a rule with all library code that it imports."""
    return with_data(source_closure(f"workflow/scripts/{rule}.py", *modules))


def with_data(files: Iterable[str]) -> list[str]:
    """Add what library files read as their own: page templates, the style of figures."""
    own = [
        _shown(path)
        for name, pattern in _BESIDE.items()
        if _shown(_CODE / name) in files
        for path in (_CODE / name).parent.glob(pattern)
    ]
    return sorted({*files, *own})


def source_closure(script: str, *modules: str) -> list[str]:
    """Return ``script`` (or notebook), ``modules`` and the library files they import, sorted.

    Left out is what decides no result, so that a better message re-runs nothing.

    Paths of files are relative to the current folder when they lie below it, so that a moved
    checkout re-runs nothing. ``modules`` are dotted names: code that the script loads lazily (an
    editor). Of a module that is not the library's, what it imports of its own package counts too.
    """
    packages = frozenset({PACKAGE, *(name.partition(".")[0] for name in modules)})
    found: set[Path] = set()
    queue = [Path(script)] + [p for m in modules if (p := _module_file(m)) is not None]
    while queue:
        path = queue.pop()
        if path not in found | _without_result():
            found.add(path)
            queue += _imports(path, packages)
    return sorted(_shown(path) for path in found)


@cache
def _without_result() -> frozenset[Path]:
    return frozenset(path for pattern in _NO_RESULT for path in _CODE.glob(pattern))


def _shown(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


@cache
def _imports(path: Path, packages: frozenset[str]) -> tuple[Path, ...]:
    """Return the files of ``packages`` that one file imports."""
    names: set[str] = set()
    beside: list[Path] = []
    for node in _statements(_parsed(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            beside += _relative(path, node)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    mine = {name for name in names if name.split(".")[0] in packages}
    parents = {".".join(n.split(".")[:k]) for n in mine for k in range(1, n.count(".") + 1)}
    found = [p for n in sorted(mine | parents) if (p := _module_file(n)) is not None]
    return (*found, *beside)


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """Every statement; expressions, which import nothing, are most of a tree."""
    queue: list[ast.AST] = [tree]
    while queue:
        node = queue.pop()
        yield node
        bodies = (ast.stmt, ast.excepthandler, ast.match_case)
        queue += [child for child in ast.iter_child_nodes(node) if isinstance(child, bodies)]


def _relative(path: Path, node: ast.ImportFrom) -> list[Path]:
    """Return the files that ``from .module import name`` reads."""
    folder = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
    stems = [folder, *(folder / alias.name for alias in node.names)]
    return [file for stem in stems if (file := _source_file(stem)) is not None]


def _parsed(path: Path) -> ast.Module:
    try:
        return ast.parse(_source(path))
    except SyntaxError as error:
        raise ConfigError(f"{path}, line {error.lineno}: {error.msg}.") from error


def _source(path: Path) -> str:
    """Return Python source; of a notebook its code cells, without IPython's own lines."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    cells = ["".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "code"]
    lines = "\n".join(cells).splitlines()
    return "\n".join(line for line in lines if not line.startswith(("%", "!")))


def _module_file(name: str) -> Path | None:
    """Return the file of a module, found without importing it; None if there is none."""
    package, *rest = name.split(".")
    if package == PACKAGE:
        stems = [_LIBRARY.joinpath(package, *rest)]
    elif (spec := find_spec(package)) is None:
        return None
    elif spec.submodule_search_locations:  # a package; several folders, if it has no __init__.py
        stems = [Path(folder, *rest) for folder in spec.submodule_search_locations]
    else:
        stems = [Path(spec.origin or package).with_suffix("")]
    return next(filter(None, map(_source_file, stems)), None)


def _source_file(stem: Path) -> Path | None:
    candidates = (stem.with_name(f"{stem.name}.py"), stem / "__init__.py")
    return next((path for path in candidates if path.is_file()), None)
