"""The notebooks in examples/ run whole, in a kernel of their own, and are kept with what they print."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

BOOKS = sorted((Path(__file__).parents[2] / "examples").glob("*.ipynb"))


def test_there_are_notebooks() -> None:
    assert [book.stem for book in BOOKS] == ["1_your_own_model", "2_backdoorbench", "3_encoder"]


@pytest.mark.slow
@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path) -> None:
    book = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    kept = [cell.outputs for cell in book.cells if cell.cell_type == "code"]
    NotebookClient(book, timeout=280, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    made = [cell.outputs for cell in book.cells if cell.cell_type == "code"]
    assert [bool(kinds(outputs)) for outputs in made] == [bool(kinds(outputs)) for outputs in kept]


def kinds(outputs: list[nbformat.NotebookNode]) -> set[str]:
    """What a cell shows, apart from warnings on standard error."""
    return {output.output_type for output in outputs if output.get("name") != "stderr"}


@pytest.mark.parametrize("path", BOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_whole_and_without_this_machine(path: Path) -> None:
    book = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    nbformat.validate(book)
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not re.search(r"/(home|usr|tmp|var)/|site-packages|\.py:\d", "".join(str(cell.outputs) for cell in cells))
    assert sum(bool(kinds(cell.outputs)) for cell in cells) >= len(cells) / 2
