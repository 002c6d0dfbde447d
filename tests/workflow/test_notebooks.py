"""Notebooks: clean in git, whole when executed, and never half a result."""

from pathlib import Path

import nbformat
import pytest

NAMES = sorted(path.stem for path in Path("notebooks").glob("*.ipynb"))


def read(path):
    book = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(book)
    return book


def code_cells(book):
    return [cell for cell in book.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_in_git_is_text_and_code_alone(name):
    book = read(f"notebooks/{name}.ipynb")
    assert book.cells[0].cell_type == "markdown"
    assert book.cells[0].source.startswith("# ")
    for cell in code_cells(book):
        assert cell.outputs == []
        assert cell.execution_count is None
    tagged = [cell for cell in book.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    assert tagged[0].source.startswith('results = "results"\n')


@pytest.mark.parametrize("name", NAMES)
def test_an_executed_notebook_is_whole_and_so_is_its_page(name, finished):
    results = finished.folder / "results/notebooks"
    book = read(results / f"{name}.ipynb")
    for cell in code_cells(book):
        assert cell.execution_count, cell.source
        for output in cell.outputs:
            assert output.output_type != "error", cell.source
            assert output.get("name") != "stderr", output.text
    page = (results / f"{name}.html").read_text(encoding="utf-8")
    assert book.cells[0].source.splitlines()[0].removeprefix("# ") in page
    assert 'src="data:image/png' in page
    assert 'src="http' not in page  # it asks no server for anything
    (log,) = (finished.folder / "logs").glob(f"*notebook/{name}.log")
    assert "unknown parameter" not in log.read_text(encoding="utf-8")


def test_a_failing_cell_fails_its_rule_and_leaves_no_result(copy_of_finished):
    path = copy_of_finished.folder / "notebooks/01_dataset_tour.ipynb"
    book = read(path)
    book.cells.append(nbformat.v4.new_code_cell('raise ValueError("this cell is broken")'))
    nbformat.write(book, path)
    results = copy_of_finished.folder / "results/notebooks"
    output = copy_of_finished.run("results/notebooks/01_dataset_tour.html", check=False)
    assert "Error in rule notebook" in output
    log = copy_of_finished.folder / "logs/notebook/01_dataset_tour.log"
    assert "ValueError: this cell is broken" in log.read_text(encoding="utf-8")
    assert not list(results.glob("*01_dataset_tour*"))
    assert list(results.glob("02_*"))
