"""Every tutorial runs from top to bottom without a warning, and holds what it gave."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.printed import assert_printed_alike

ROOT = Path(__file__).parents[2]
TUTORIALS = sorted((ROOT / "tutorials").glob("*.ipynb"))
LARGEST = 1_000_000  # bytes
PINNED = all(
    f"{name}=={version(name).partition('+')[0]}" in (ROOT / "constraints.txt").read_text().split()
    for name in ("numpy", "scikit-learn", "torch", "transformers")
)

each = pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def complaints(notebook: Any) -> list[str]:
    """What a reader would be shown of errors and warnings."""
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return [
        output.get("text") or output.get("evalue")
        for output in outputs
        if output.output_type == "error" or output.get("name") == "stderr"
    ]


def printed(notebook: Any) -> list[str]:
    """The text of each cell's outputs."""
    return [
        "".join(
            output.get("text") or output.get("data", {}).get("text/plain", "")
            for output in cell.outputs
        )
        for cell in code_cells(notebook)
    ]


def test_there_are_five() -> None:
    assert [path.name[:2] for path in TUTORIALS] == ["01", "02", "03", "04", "05"]


@each
def test_saved_with_its_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert sum(bool(cell.outputs) for cell in cells) > len(cells) / 2
    assert complaints(notebook) == []
    assert path.stat().st_size < LARGEST


@each
def test_says_what_changes_on_a_gpu(path: Path) -> None:
    cells = code_cells(nbformat.read(path, as_version=4))
    on_gpu = [cell for cell in cells if cell.source.startswith("if torch.cuda.is_available():")]
    assert len(on_gpu) == 1
    assert 'quantization="nf4"' in on_gpu[0].source
    compile(on_gpu[0].source, path.name, "exec")


@pytest.mark.real_model
@each
def test_runs(path: Path, tmp_path: Path, monkeypatch: Any, demo_model: Any) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    notebook = nbformat.read(path, as_version=4)
    saved = printed(notebook)
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=None, kernel_name="python3", resources=where).execute()
    assert complaints(notebook) == []
    assert len(nbformat.writes(notebook).encode()) < LARGEST
    if PINNED:  # other versions draw other samples
        for found, expected in zip(printed(notebook), saved, strict=True):
            assert_printed_alike(found, expected)  # or the saved outputs are old: make tutorials
