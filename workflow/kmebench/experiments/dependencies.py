"""Which source files a script or notebook depends on, read from its imports without running it.

Snakemake compares scripts by time stamp and does not see library code at all. Rules therefore
list this closure as an input: touching a file changes nothing (inputs are compared by
checksum), editing one re-runs exactly what it can influence.
"""

import ast
import json
from functools import cache
from pathlib import Path

PACKAGE = "kmebench"
_LIBRARY = Path(__file__).resolve().parents[2]  # the folder that holds the package


def source_closure(script: str, *modules: str) -> list[str]:
    """Return ``script`` (or notebook), ``modules`` and every library file they import, sorted.

    Paths of library files are relative to the current folder when they lie below it, so that
    a moved checkout re-runs nothing. ``modules`` are dotted names: code that the script loads
    lazily (an editor).
    """
    found: set[Path] = set()
    queue = [Path(script)] + [p for m in modules if (p := _module_file(m)) is not None]
    while queue:
        path = queue.pop()
        if path not in found:
            found.add(path)
            queue += _imports(path)
    return sorted(_shown(path) for path in found)


def _shown(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


@cache
def _imports(path: Path) -> tuple[Path, ...]:
    """Return the library files that one file imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(_source(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    mine = {name for name in names if name.split(".")[0] == PACKAGE}
    parents = {".".join(n.split(".")[:k]) for n in mine for k in range(1, n.count(".") + 1)}
    return tuple(p for n in sorted(mine | parents) if (p := _module_file(n)) is not None)


def _source(path: Path) -> str:
    """Return Python source; of a notebook its code cells, without IPython's own lines."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    cells = ["".join(c["source"]) for c in json.loads(text)["cells"] if c["cell_type"] == "code"]
    lines = "\n".join(cells).splitlines()
    return "\n".join(line for line in lines if not line.startswith(("%", "!")))


def _module_file(name: str) -> Path | None:
    """Return the file of a library module, or None for anything else."""
    if name.split(".")[0] != PACKAGE:
        return None
    stem = _LIBRARY.joinpath(*name.split("."))
    candidates = (stem.with_suffix(".py"), stem / "__init__.py")
    return next((path for path in candidates if path.is_file()), None)
