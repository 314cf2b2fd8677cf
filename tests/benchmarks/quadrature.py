"""How adaptive quadrature was chosen: gradient rows of its alternatives on the convergence cases.

`python -m tests.benchmarks.quadrature` prints rows to a tolerance of 5 % for 8 prompts and 2
baselines, with the error against the reference integrals, writes results/quadrature.json and puts
the table into docs/tasks/adding_up.md. A budget of 1000 that ends first counts as 1000. Variants
that the file holds already are not run again; without it all are (about an hour).
"""

from __future__ import annotations

import json
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from captum_llm_ext import load_demo_model
from captum_llm_ext.gradients import adaptive
from tests.benchmarks.integrals import BUDGET, CASES, attribute, reference
from tests.benchmarks.measure import RESULTS, write_results
from tests.benchmarks.pages import DOCS, fill, markdown

Choice = Callable[[Sequence[float], float, int, int], list[int]]


def one_at_a_time(errors: Sequence[float], allowed: float, rows: int, affordable: int) -> list[int]:
    """The interval with the largest mismatch alone."""
    worst = max(range(len(errors)), key=lambda i: errors[i])
    return [worst] if affordable else []


def all_above_their_share(
    errors: Sequence[float], allowed: float, rows: int, affordable: int
) -> list[int]:
    """Every interval whose mismatch is more than the tolerance divided evenly."""
    order = sorted(range(len(errors)), key=lambda i: -errors[i])
    return [i for i in order if errors[i] > allowed / len(errors)][: max(0, affordable)]


def halves_against_the_whole(halved: Any) -> Any:
    """The classic estimate: how far the attributions of both halves are from their parent's.

    The first intervals, which have no parent, keep the mismatch of their sums.
    """

    def halve(path: Any, like: Any, parents: Any) -> Any:
        halves = halved(path, like, parents)
        for i, parent in enumerate(parents):
            pair = halves[2 * i : 2 * i + 2]
            for site, total in parent.totals.items():
                both = pair[0].totals[site].sequence + pair[1].totals[site].sequence
                for half in pair:
                    half.error = float((both - total.sequence).norm() / path.scale[-1]) / 2
        return halves

    return halve


# What is replaced in adaptive.py, and rows per pass where those are another number than ROWS.
VARIANTS: dict[str, dict[str, Any]] = {
    "as shipped: 8 intervals of 3 points, the worst until the rest is half the tolerance": {},
    "2 points in an interval": {"POINTS": 2},
    "5 points in an interval": {"POINTS": 5},
    "4 intervals at first": {"FIRST_INTERVALS": 4},
    "16 intervals at first, a warm start of about 50 steps": {"FIRST_INTERVALS": 16},
    "one interval at a time": {"_worst": one_at_a_time},
    "all intervals above their share of the tolerance": {"_worst": all_above_their_share},
    "12 rows in a pass, so at most 2 intervals halved at once": {"rows": 12},
    "48 rows in a pass, so at most 8": {"rows": 48},
    "error estimated by the halves against the whole": {
        "_halved": halves_against_the_whole(adaptive._halved),
    },
}
ROWS = 24
PAGE = DOCS / "tasks" / "adding_up.md"


@contextmanager
def changed(names: dict[str, Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for name, value in names.items():
            if name != "rows":
                stack.enter_context(patch.object(adaptive, name, value))
        yield


def measured(model: Any, tokenizer: Any, name: str, baseline: str, rows: int) -> dict[str, Any]:
    """Gradient rows, and the error against the reference."""
    options = {"method": "adaptive", "include_per_token_attr": False, "internal_batch_size": rows}
    result = attribute(model, tokenizer, name, baseline, **options)[1]
    truth = reference(name, baseline)
    error = float((result.seq_attr - truth).norm() / truth.norm())
    return {"rows": result.n_evaluations if result.converged else BUDGET, "error": error}


def row_of(model: Any, tokenizer: Any, what: str) -> dict[str, Any]:
    names = VARIANTS[what]
    with changed(names):
        found = {
            f"{name}, {baseline}": measured(model, tokenizer, name, baseline, rows_of(names))
            for name in CASES
            for baseline in ("pad", "mean")
        }
    return {"what": what, "cases": found}


def rows_of(names: dict[str, Any]) -> int:
    return int(names.get("rows", ROWS))


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    stored = RESULTS / "quadrature.json"
    rows = json.loads(stored.read_text())["rows"] if stored.exists() else []
    model, tokenizer = load_demo_model()
    for what in [what for what in VARIANTS if what not in {row["what"] for row in rows}]:
        rows.append(row_of(model, tokenizer, what))
        print(line(rows[-1]), flush=True)
        write_results("quadrature", rows)
    print(f"written: {stored}, {write_page()}")


def line(row: dict[str, Any]) -> list[str]:
    """Rows in the median and mean, how many ran out of rows, the median and largest error."""
    counts = [case["rows"] for case in row["cases"].values()]
    errors = [case["error"] for case in row["cases"].values()]
    return [
        row["what"],
        f"{statistics.median(counts):.0f}",
        f"{statistics.mean(counts):.0f}",
        str(sum(count >= BUDGET for count in counts)),
        f"{statistics.median(errors):.1%}",
        f"{max(errors):.1%}",
    ]


def page_text(rows: Sequence[dict[str, Any]]) -> str:
    columns = ("rule", "median rows", "mean", "budget spent", "median error", "largest")
    return markdown(columns, [line(row) for row in rows])


def write_page() -> str:
    rows = json.loads((RESULTS / "quadrature.json").read_text())["rows"]
    return str(fill(PAGE, "quadrature", page_text(rows)))


if __name__ == "__main__":
    main()
