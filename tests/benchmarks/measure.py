"""For the benchmarks: CPU seconds, alternating in one process; peak memory, in a process each."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def cpu_seconds(work: Callable[[], Any]) -> float:
    """CPU time of all threads, which other processes on the machine do not change."""
    start = time.process_time()
    work()
    return time.process_time() - start


def compare(
    ours: Callable[[], Any], theirs: Callable[[], Any], repeats: int = 3
) -> dict[str, float]:
    """Median CPU seconds of both, called alternately, and the median of the ratios pair by pair."""
    pairs = [(cpu_seconds(ours), cpu_seconds(theirs)) for _ in range(repeats)]
    return {
        "ours_s": statistics.median(a for a, _ in pairs),
        "captum_s": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(b / a for a, b in pairs),
    }


def time_row(
    what: str, bar: float, ours: Callable[[], Any], theirs: Callable[[], Any]
) -> dict[str, Any]:
    """A row of the table: how many times faster ours is, and whether that meets the bar."""
    figures = compare(ours, theirs)
    ratio = figures["ratio"]
    return {
        "what": what,
        "ours": f"{figures['ours_s']:.2f} s",
        "captum": f"{figures['captum_s']:.2f} s",
        "ratio": ratio,
        "bar": f">= {bar:g}",
        "met": ratio >= bar,
    }


def megabytes(field: str = "VmRSS") -> float:
    """Memory of this process now ("VmRSS") or at its peak ("VmHWM"), Linux only."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in status if x.startswith(field)) / 1024


def peak_above_now(work: Callable[[], Any]) -> float:
    """Megabytes that `work` takes at its peak above what is held before."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = megabytes()
    work()
    return megabytes("VmHWM") - before


def in_own_process(module: str, *arguments: str) -> float:
    """The number that `python -m module arguments` prints on its last line."""
    command = [sys.executable, "-m", module, *arguments]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(output.strip().splitlines()[-1])


def machine_facts() -> dict[str, Any]:
    packages = ("captum", "torch", "transformers")
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def write_results(name: str, rows: list[dict[str, Any]]) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine_facts(), "rows": rows}, indent=2) + "\n")
    return path


def print_table(rows: list[dict[str, Any]], theirs: str = "Captum") -> None:
    """One line a row: what was measured, ours, theirs, the ratio and the bar."""
    print(f"{'workload':58} {'ours':>10} {theirs:>10} {'ratio':>7}  bar")
    for row in rows:
        mark = "met" if row["met"] else "MISSED"
        print(
            f"{row['what']:58} {row['ours']:>10} {row['captum']:>10} {row['ratio']:>7.2f}  "
            f"{row['bar']} {mark}"
        )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [x for x in info.read_text().splitlines() if "model name" in x] if info.exists() else []
    return names[0].partition(":")[2].strip() if names else platform.processor()
