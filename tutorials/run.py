"""Run the tutorials from top to bottom and save their outputs: python tutorials/run.py [name …]"""

from __future__ import annotations

import os
import sys
from copy import deepcopy
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
SECONDS_PER_CELL = 300


def main() -> None:
    os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    os.environ["PYTHONPATH"] = str(FOLDER.parent)
    for path in sorted(FOLDER.glob("*.ipynb")):
        if not sys.argv[1:] or path.stem in sys.argv[1:]:
            run(path)
            print(path.name, f"{path.stat().st_size / 1e3:.0f} kB")


def run(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    kept = deepcopy(notebook.metadata)
    where = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(
        notebook,
        timeout=SECONDS_PER_CELL,
        kernel_name="python3",
        resources=where,
        record_timing=False,
    ).execute()
    notebook.metadata = kept  # without what this machine's kernel says of itself
    for cell in notebook.cells:
        cell.metadata = {}
    nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
