"""The notebook runs from beginning to end, and what is kept of it shows just that."""

import os

import nbformat
from nbclient import NotebookClient
from programs import PROJECT

NOTEBOOK = PROJECT / "docs" / "quickstart.ipynb"


def kinds(notebook: nbformat.NotebookNode) -> list[list[str]]:
    """For each cell, the kinds of what it put out: printed text, plots."""
    return [
        sorted({kind for output in cell.outputs for kind in output.get("data", {"text": ""})})
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def test_the_notebook_runs_and_shows_what_is_kept_of_it(tmp_path, monkeypatch):
    kept = nbformat.read(NOTEBOOK, 4)
    nbformat.validate(kept)
    notebook = nbformat.read(NOTEBOOK, 4)
    monkeypatch.setenv("PYTHONPATH", os.fspath(PROJECT))
    NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": os.fspath(tmp_path)}}
    ).execute()
    assert kinds(notebook) == kinds(kept)
    assert any("image/png" in found for found in kinds(kept))
    assert (tmp_path / "runs" / "quickstart" / "checkpoint").exists()


def test_what_is_kept_of_the_notebook_is_small_and_was_run_in_order():
    assert NOTEBOOK.stat().st_size < 500_000
    cells = [cell for cell in nbformat.read(NOTEBOOK, 4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.get("name") for output in outputs} <= {"stdout", None}, "no warnings"
    assert not any(output.output_type == "error" for output in outputs)
