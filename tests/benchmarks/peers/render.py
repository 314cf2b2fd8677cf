"""results/peers.json as the tables of docs/peers.md, between the page's two markers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.benchmarks.measure import RESULTS

PAGE = Path(__file__).parents[3] / "docs" / "peers.md"
START, END = "<!-- tables: make bench-peers -->", "<!-- end of the tables -->"
TITLES = {
    "error": "Integrated gradients and their error",
    "tokens": "Integrated gradients of every target token",
    "sequence": "Integrated gradients of the sequence alone",
    "layers": "Gradient × activation of 121 layers",
    "ablation": "Ablation of each token",
}
COST = ("library", "how", "CPU s", "F+B", "peak MB")
COLUMNS = {"error": (*COST, "sum misses by", "integral missed by", "error stated")}


def tables(result: dict[str, Any]) -> str:
    parts = [machine(result)]
    for work, title in TITLES.items():
        rows = [row for row in result["rows"] if row["name"].partition("/")[0] == work]
        parts += [f"## {title}", table(work, rows)]
    return "\n\n".join(parts)


def machine(result: dict[str, Any]) -> str:
    facts = result["machine"]
    versions = {name: v for one in result["versions"].values() for name, v in one.items()}
    stated = ", ".join(f"{name} {v}" for name, v in sorted(versions.items()))
    return (
        f"{facts['processor']}, {facts['cores']} cores, {facts['threads']} thread; Python "
        f"{facts['python']}; {stated}."
    )


def table(work: str, rows: list[dict[str, Any]]) -> str:
    columns = COLUMNS.get(work, (*COST, "largest difference"))
    lines = [columns, ("---",) * 2 + ("---:",) * (len(columns) - 2)]
    lines += [cells(work, row, len(columns)) for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cells(work: str, row: dict[str, Any], width: int) -> tuple[str, ...]:
    if "error" in row:
        error = row["error"].replace("|", r"\|")
        return (row["library"], f"{row['settings']}: `{error}`", *["–"] * (width - 2))
    estimate = "about " if row["scale"] != 1 else ""
    cost = (estimate + figure(row["cpu_s"]), figure(row["units"]), f"{row['peak_mb']:.0f}")
    head = (row["library"], row["settings"], *cost)
    if work != "error":
        return (*head, f"{row['difference']:.0e}" if row["difference"] else "0")
    if "sum_error" not in row:
        return (*head, "no sign", "no sign", "no")
    stated = row["stated_error"]
    return (
        *head,
        f"{row['sum_error']:+.0%}",
        f"{row['integral_error']:.0%}",
        "no" if stated is None else f"{stated:+.0%}",
    )


def figure(number: float) -> str:
    """Two significant digits: timings on a shared machine have no more."""
    return f"{number:.0f}" if number >= 10 else f"{number:.2g}"


def write_page() -> Path:
    result = json.loads((RESULTS / "peers.json").read_text())
    text = PAGE.read_text()
    before, after = text.split(START)[0], text.split(END)[1]
    PAGE.write_text(f"{before}{START}\n\n{tables(result)}\n\n{END}{after}")
    return PAGE
