"""How adaptive quadrature was chosen: gradient rows of its alternatives on the convergence cases.

`python -m tests.benchmarks.quadrature` prints rows to a tolerance of 5 % for 8 prompts and 2
baselines, and writes results/quadrature.json. A budget of 1000 that ends first counts as 1000.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from captum_llm_ext import adaptive, load_demo_model
from tests.benchmarks.convergence import BUDGET, CASES, attribute
from tests.benchmarks.measure import write_results

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


VARIANTS: dict[str, dict[str, Any]] = {
    "as shipped: 8 intervals, 3 points, the worst until the rest is half the tolerance": {},
    "2 points in an interval": {"POINTS": 2},
    "5 points in an interval": {"POINTS": 5},
    "4 intervals at first": {"FIRST_INTERVALS": 4},
    "16 intervals at first": {"FIRST_INTERVALS": 16},
    "one interval at a time": {"_worst": one_at_a_time},
    "all intervals above their share": {"_worst": all_above_their_share},
}


@contextmanager
def changed(names: dict[str, Any]) -> Iterator[None]:
    with ExitStack() as stack:
        for name, value in names.items():
            stack.enter_context(patch.object(adaptive, name, value))
        yield


def rows_of(model: Any, tokenizer: Any, name: str, baseline: str) -> int:
    options = {"method": "adaptive", "include_per_token_attr": False, "internal_batch_size": 24}
    result = attribute(model, tokenizer, name, baseline, **options)[1]
    return result.n_evaluations if result.converged else BUDGET


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model, tokenizer = load_demo_model()
    rows = []
    for what, names in VARIANTS.items():
        with changed(names):
            found = {
                f"{name}, {baseline}": rows_of(model, tokenizer, name, baseline)
                for name in CASES
                for baseline in ("pad", "mean")
            }
        counts = list(found.values())
        row = {"what": what, "median": statistics.median(counts), "mean": statistics.mean(counts)}
        rows.append(row | {"spent": sum(c >= BUDGET for c in counts), "rows": found})
        print(f"{what:85} median {row['median']:5.0f}  mean {row['mean']:5.0f}", flush=True)
    print(f"written: {write_results('quadrature', rows)}")


if __name__ == "__main__":
    main()
