"""Do integrated gradients converge on a real model, and is their stated error true?

`python -m tests.benchmarks.convergence` prints the table, writes results/convergence.json and puts
it into docs/tasks/adding_up.md: adaptive quadrature with its defaults and the fixed rule at 400
points, against the reference integrals of `integrals.py`; and the baselines "a sentence" and
"zero", which have no reference, against each other. About half an hour; cases that the file has
are not run again.
"""

from __future__ import annotations

import json
import statistics
import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from captum_llm_ext import load_demo_model
from tests.benchmarks.integrals import (
    BUDGET,
    CASES,
    SENTENCE,
    attribute,
    pairs,
    reference,
    reference_file,
)
from tests.benchmarks.measure import RESULTS, write_results
from tests.benchmarks.pages import DOCS, fill, markdown

FIXED = 400
PAGE = DOCS / "tasks" / "adding_up.md"
ORDER = ("mean", "pad", "id 0", "a sentence", "zero")


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model, tokenizer = load_demo_model()
    stored = RESULTS / "convergence.json"
    rows = json.loads(stored.read_text())["rows"] if stored.exists() else []
    known = {(row["name"], row["baseline"]) for row in rows}
    others = product(CASES, ("a sentence", "zero"))
    for run, cases in ((with_reference, pairs()), (without_reference, others)):
        for case in cases:
            if case not in known:
                rows.append(run(model, tokenizer, *case))
                write_results("convergence", rows)
    print(f"written: {stored}, {write_page()}")


def with_reference(model: Any, tokenizer: Any, name: str, baseline: str) -> dict[str, Any]:
    """Rows, delta, and errors against the mean of both reference rules."""
    kept = json.loads(reference_file(name, baseline).read_text())
    truth = reference(name, baseline)
    alone = {"include_per_token_attr": False}
    found = attribute(model, tokenizer, name, baseline, method="adaptive", **alone)[1]
    fixed = attribute(model, tokenizer, name, baseline, n_steps=FIXED, **alone)[1]
    each = attribute(model, tokenizer, name, baseline, method="adaptive")[1]
    misses = (each.token_attr - torch.tensor(kept["mesh_tokens"])).norm(dim=1) / truth.norm()
    figures = {
        "error": _miss(found.seq_attr, truth),
        "fixed_delta": _delta(fixed),
        "fixed_error": _miss(fixed.seq_attr, truth),
        "difference": _miss(found.seq_attr, fixed.seq_attr),
        "token_errors": misses.tolist(),
    }
    return _said(_row(name, baseline, found) | figures)


def without_reference(model: Any, tokenizer: Any, name: str, baseline: str) -> dict[str, Any]:
    """Rows, delta, and the difference to the fixed rule: an error only if that converged."""
    start = ("text", SENTENCE) if baseline == "a sentence" else baseline
    alone = {"include_per_token_attr": False}
    found = attribute(model, tokenizer, name, start, method="adaptive", **alone)[1]
    fixed = attribute(model, tokenizer, name, start, n_steps=FIXED, **alone)[1]
    difference = _miss(found.seq_attr, fixed.seq_attr)
    figures = {"fixed_delta": _delta(fixed), "difference": difference}
    return _said(_row(name, baseline, found) | figures)


def _row(name: str, baseline: str, found: Any) -> dict[str, Any]:
    rows = found.n_evaluations if found.converged else BUDGET
    known = {"name": name, "baseline": baseline, "n_input": len(found.input_tokens)}
    return known | {"rows": rows, "converged": found.converged, "delta": _delta(found)}


def _delta(result: Any) -> float:
    """The stated delta, relative to the score difference that the path itself has."""
    path = result.score_path[1]
    return abs(float(result.convergence_delta.sum())) / max(abs(float(path[-1] - path[0])), 1e-3)


def _miss(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


def _said(row: dict[str, Any]) -> dict[str, Any]:
    print({k: f"{v:.3f}" if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    return row


# --- the page ------------------------------------------------------------------------------------


def page_text(rows: Sequence[Mapping[str, Any]]) -> str:
    known = [row for row in rows if "error" in row]
    return "\n\n".join([by_baseline(rows), met(known), by_case(known)])


def by_baseline(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each baseline: medians over prompts."""
    columns = (
        "baseline",
        "converged",
        "rows",
        "delta",
        "error",
        f"{FIXED} fixed points: delta",
        "error",
        "both differ by",
    )
    lines = []
    for baseline in ORDER:
        own = [row for row in rows if row["baseline"] == baseline]
        converged = sum(row["converged"] for row in own)
        cells = (_median(own, "delta"), _median(own, "error"))
        fixed = [_median(own, name) for name in ("fixed_delta", "fixed_error", "difference")]
        count = f"{statistics.median(row['rows'] for row in own):.0f}"
        lines.append((baseline, f"{converged} of {len(own)}", count, *cells, *fixed))
    return markdown(columns, lines)


def by_case(rows: Iterable[Mapping[str, Any]]) -> str:
    """A line for each prompt: rows, error, and the error of the fixed rule, from each baseline."""
    rows = list(rows)
    columns = ["prompt", "tokens"] + [
        f"{baseline}: {what}" for baseline in ORDER[:3] for what in ("rows", "error", "fixed")
    ]
    lines = []
    for name in CASES:
        own = {row["baseline"]: row for row in rows if row["name"] == name}
        cells = [name, str(own["mean"]["n_input"])]
        for baseline in ORDER[:3]:
            row = own[baseline]
            cells += [str(row["rows"]), _percent(row["error"]), _percent(row["fixed_error"])]
        lines.append(cells)
    return markdown(columns, lines)


def met(rows: Sequence[Mapping[str, Any]]) -> str:
    """What was asked of the cases with a reference, in one sentence."""
    within = sum(row["delta"] <= 0.05 and row["error"] <= 0.10 for row in rows)
    tokens = [miss for row in rows for miss in row["token_errors"]]
    close = sum(miss <= 0.10 for miss in tokens)
    return (
        f"Delta within 5 % and error within 10 %: {within} of {len(rows)} cases, with "
        f"{statistics.median(row['rows'] for row in rows):.0f} rows in the median. Of "
        f"{len(tokens)} target tokens the attributions of {close} are within 10 % of the "
        "sequence's norm."
    )


def _median(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    known = [row[name] for row in rows if name in row]
    return _percent(statistics.median(known)) if known else "–"


def _percent(share: float) -> str:
    return f"{share:.1%}" if share < 0.1 else f"{share:.0%}"


def write_page() -> str:
    stored = json.loads((RESULTS / "convergence.json").read_text())
    return str(fill(PAGE, "convergence", page_text(stored["rows"])))


if __name__ == "__main__":
    main()
