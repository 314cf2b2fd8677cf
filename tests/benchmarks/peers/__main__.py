"""The same work done by this package, Captum, inseq and interpreto: `make bench-peers`.

Each library has a pinned environment of its own in the user's cache folder, made on the first call.
The attributions are compared with plain loops of autograd (`oracle.py`). Writes
results/peers.json and the tables of docs/peers.md; `… render` writes the page alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

from captum_llm_ext import load_demo_model
from captum_llm_ext.models import DEMO_FOLDER, _cache_folder
from tests.benchmarks.measure import RESULTS, machine_facts
from tests.benchmarks.peers.compare import compared
from tests.benchmarks.peers.render import write_page

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
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
    folder = _cache_folder() / "bench-peers" / name
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


def run_script(library: str, folder: Path) -> dict[str, Any]:
    """{"versions": …, "rows": {work: figures}}, on one thread."""
    name, script = SCRIPTS[library]
    print(f"== {library}", flush=True)
    with tempfile.TemporaryDirectory() as work:
        out = Path(work) / "found.json"
        module = f"tests.benchmarks.peers.{script}"
        command = [str(environment(name)), "-m", module, str(folder), str(out)]
        subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return json.loads(out.read_text())


def main() -> None:
    if sys.argv[1:] != ["render"]:
        load_demo_model()  # made where it is not there yet
        folder = _cache_folder() / DEMO_FOLDER
        found = {library: run_script(library, folder) for library in SCRIPTS}
        oracle = found.pop("oracle")["rows"]
        facts = machine_facts()
        machine = {name: facts[name] for name in ("processor", "cores", "threads", "python")}
        rows = [
            {"library": library, "name": name, **compared(name, row, oracle)}
            for library, one in found.items()
            for name, row in one["rows"].items()
        ]
        versions = {library: one["versions"] for library, one in found.items()}
        result = {"machine": machine, "versions": versions, "rows": rows}
        (RESULTS / "peers.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"written: {write_page()}")


if __name__ == "__main__":
    main()
