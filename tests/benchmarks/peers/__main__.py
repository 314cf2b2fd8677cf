"""The same work done by this package, Captum, inseq and interpreto: `make bench-peers`.

Each library has a pinned environment of its own in the user's cache folder, made on the first call.
The attributions are compared with plain loops of autograd (`oracle.py`). Writes
results/peers.json and the tables of docs/peers.md. `python -m tests.benchmarks.peers inseq` runs
inseq alone again and takes the others from the last run.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import torch

from captum_llm_ext import load_demo_model
from captum_llm_ext.model.loading import DEMO_FOLDER, _cache_folder
from tests.benchmarks.measure import RESULTS, machine_facts
from tests.benchmarks.peers.compare import compared
from tests.benchmarks.peers.render import write_page

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
ENVIRONMENTS = _cache_folder() / "bench-peers"
# Environment and script of each; the oracle needs nothing but what Captum's has.
SCRIPTS = {
    "oracle": ("captum", "oracle"),
    "this package": ("ours", "run_ours"),
    "Captum": ("captum", "run_captum"),
    "inseq": ("inseq", "run_inseq"),
    "interpreto": ("interpreto", "run_interpreto"),
}


def environment(name: str) -> Path:
    """The interpreter of a library's environment, made anew where its pins have changed."""
    folder = ENVIRONMENTS / name
    pins = (HERE / f"{name}.txt").read_text()
    stamp = folder / ".pins"
    python = folder / "bin" / "python"
    if not stamp.exists() or stamp.read_text() != hashlib.sha256(pins.encode()).hexdigest():
        print(f"== installing {name} into {folder}", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "-r", str(HERE / f"{name}.txt")], check=True)
        stamp.write_text(hashlib.sha256(pins.encode()).hexdigest())
    return python


def run_script(library: str, folder: Path) -> None:
    """Writes {"versions": …, "rows": {work: figures}} of a library, on one thread."""
    name, script = SCRIPTS[library]
    print(f"== {library}", flush=True)
    module = f"tests.benchmarks.peers.{script}"
    command = [str(environment(name)), "-m", module, str(folder), str(found_at(library))]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})


def found_at(library: str) -> Path:
    return ENVIRONMENTS / f"{SCRIPTS[library][1]}.json"


def result() -> dict[str, Any]:
    """Of what the scripts have written: the machine, the versions, and a row for each work."""
    found = {library: json.loads(found_at(library).read_text()) for library in SCRIPTS}
    oracle = found.pop("oracle")["rows"]
    facts = machine_facts()
    rows = [
        {"library": library, "name": name, **compared(name, row, oracle)}
        for library, one in found.items()
        for name, row in one["rows"].items()
    ]
    return {
        "machine": {name: facts[name] for name in ("processor", "cores", "threads", "python")},
        "versions": {library: one["versions"] for library, one in found.items()},
        "rows": rows,
    }


def main(libraries: list[str]) -> None:
    torch.set_num_threads(1)
    load_demo_model()  # made where it is not there yet
    for library in libraries:
        run_script(library, _cache_folder() / DEMO_FOLDER)
    (RESULTS / "peers.json").write_text(json.dumps(result(), indent=2) + "\n")
    print(f"written: {write_page()}")


if __name__ == "__main__":
    main(sys.argv[1:] or list(SCRIPTS))
