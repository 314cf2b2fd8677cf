"""How faithful are the methods, and at what cost, on the small real model?

`python -m tests.benchmarks.faithfulness` prints the table of the prompts that were held out, writes
results/faithfulness_holdout.json and puts the table into docs/faithfulness.md; `--half choosing`
does so for those on which `TwoStageAblation` was chosen, with the candidates that lost. Every
prompt is written as it is done, and what the file has of it is not run again; without its file it
starts anew. In nats; one thread.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pandas
import torch
from torch import Tensor, nn

from captum_llm_ext import TextTemplateInput, explain, load_demo_model, segment_input
from captum_llm_ext.compat import CaptumTextTokenInput
from captum_llm_ext.metrics import MethodComparison, compare_methods
from captum_llm_ext.registry import METHODS
from tests.benchmarks.candidates import BASELINE, CANDIDATES, first_token_aside, result_of
from tests.benchmarks.integrals import SENTENCE
from tests.benchmarks.measure import RESULTS, machine_facts
from tests.benchmarks.pages import DOCS, fill, markdown

PROMPTS = Path(__file__).parent / "prompts.json"
PAGE = DOCS / "faithfulness.md"
TEXT = ("text", SENTENCE)
NEW_TOKENS = 7
N_RANDOM = 6
NAMED: dict[str, tuple[str, dict[str, Any]]] = {
    "L1 saliency": ("saliency", {}),
    "gradient × activation": ("gradxact", {}),
    "integrated gradients, 20 steps": ("ig", {"n_steps": 20}),
    "integrated gradients, adaptive": ("ig", {"quadrature": "adaptive"}),
    "integrated gradients, 20 steps, from a text": ("ig", {"n_steps": 20, "baselines": TEXT}),
    "gradient SHAP, 10 samples": ("gradshap", {"n_samples": 10}),
    "feature ablation": ("ablation", {}),
    "two-stage ablation": ("two_stage", {}),
    "information flow": ("flow", {}),
    "attention × value norms": ("attention", {"reduction": "value_norm"}),
}
TRIED = ("L1 saliency", "feature ablation", "two-stage ablation", "information flow")
IN_BOTH = ["two-sided ablation", "Shapley, a permutation and its reverse"]
REFERENCE = "feature ablation"


class Cost:
    """A method whose rows and CPU seconds are counted."""

    def __init__(self, method: Any) -> None:
        self.method, self.spent = method, defaultdict[str, float](float)

    def __call__(self, model: nn.Module, tokenizer: Any, inp: Any, target: Tensor) -> Any:
        start = time.process_time()
        torch.manual_seed(0)
        with counted_rows(model, self.spent):
            result = self.method(model, tokenizer, inp, target)
        self.spent["cpu_s"] += round(time.process_time() - start, 3)
        return result


@contextmanager
def counted_rows(model: nn.Module, spent: dict[str, float]) -> Iterator[None]:
    """Count rows that go through the model, and those of them that are differentiated."""

    def count(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        spent["rows"] += len(args[0])
        spent["backward_rows"] += len(args[0]) if torch.is_grad_enabled() else 0

    hook = model.register_forward_pre_hook(count)
    try:
        yield
    finally:
        hook.remove()


def by_name(
    name: str, options: Any, model: nn.Module, tokenizer: Any, inp: Any, target: Tensor
) -> Any:
    options = {**METHODS[name].wrapped_by.sequence_only, **options}
    if not isinstance(inp, CaptumTextTokenInput):
        options.pop("baselines", None)  # a template has its own
    elif METHODS[name].takes_baselines:
        options.setdefault("baselines", BASELINE)
    return explain(model, tokenizer, inp, target, name, **options)


def methods(half: str) -> dict[str, Any]:
    """All that can be taken, on the holdout; all that was tried, on the prompts to choose on."""
    chosen = TRIED if half == "choosing" else tuple(NAMED)
    candidates = CANDIDATES if half == "choosing" else IN_BOTH
    return {
        **{label: partial(by_name, *NAMED[label]) for label in chosen},
        "L1 saliency, first token aside": first_token_aside,
        **{label: partial(result_of, label) for label in candidates},
    }


def as_prompt(entry: dict[str, Any]) -> Any:
    if "template" in entry:
        return TextTemplateInput(entry["template"], entry["values"], entry["baselines"])
    if "by" in entry:
        return segment_input(entry["text"], by=entry["by"])
    return entry.get("messages", entry.get("text"))


def of_prompt(model: Any, tokenizer: Any, entry: dict[str, Any], asked: dict[str, Any]) -> list:
    """A row for each method: its measures and its cost."""
    costs = {label: Cost(method) for label, method in asked.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="integrated gradients have not converged")
        found = compare_methods(
            model,
            tokenizer,
            [as_prompt(entry)],
            costs,
            gen_args={"max_new_tokens": NEW_TOKENS, "do_sample": False},
            baselines=BASELINE,
            n_random=N_RANDOM,
            n_bootstrap=1,
        )
    rows = found.prompts.drop(columns="seconds").round(5).to_dict("records")
    return [{**row, "prompt": entry["name"], **costs[row["method"]].spent} for row in rows]


def table(rows: list[dict]) -> pandas.DataFrame:
    """Means with 95 % intervals, differences to feature ablation on the same prompts, and costs."""
    frame = pandas.DataFrame(rows)
    compared = MethodComparison.of(frame.assign(seconds=frame["cpu_s"]), n_bootstrap=10_000)
    columns = {}
    for measure in ("deletion", "insertion"):
        over = frame.pivot(index="prompt", columns="method", values=f"{measure} over random")
        better = over.sub(over[REFERENCE], axis=0)
        columns[measure] = compared.table[measure].apply(_interval, axis=1)
        columns[f"{measure}, less ablation's"] = better.apply(_paired)
    costs = frame.groupby("method")[["rows", "backward_rows", "cpu_s"]].mean()
    return pandas.DataFrame(columns).join(costs).loc[compared.table.index]


def _interval(entry: pandas.Series) -> str:
    return f"{entry['mean']:.2f} [{entry['low']:.2f}, {entry['high']:.2f}]"


def _paired(differences: pandas.Series) -> str:
    """Mean and 95 % bootstrap interval of a difference, and on how many prompts it is above 0."""
    values = torch.tensor(differences.to_numpy())
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(values), (10_000, len(values)), generator=generator)
    low, high = values[drawn].mean(1).quantile(torch.tensor([0.025, 0.975]).double())
    better, worse = int((values > 1e-6).sum()), int((values < -1e-6).sum())
    if not better and not worse:
        return ""
    return f"{float(values.mean()):+.2f} [{float(low):.2f}, {float(high):.2f}] ({better}:{worse})"


def page_text(rows: list[dict]) -> str:
    """The table as the page has it."""
    found = table(rows)
    found["rows"] = [
        f"{rows:.1f} ({round(differentiated, 1):g})"
        for rows, differentiated in zip(found["rows"], found.pop("backward_rows"), strict=True)
    ]
    found["CPU s"] = [f"{seconds:.1f}" for seconds in found.pop("cpu_s")]
    lines = [[str(line[0]), *map(_unbroken, line[1:])] for line in found.itertuples()]
    return markdown(["method", *found.columns], lines)


def _unbroken(cell: str) -> str:
    """Broken into lines between a mean, its interval and its counts alone."""
    return cell.replace(", ", ",\N{NO-BREAK SPACE}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--half", choices=("choosing", "holdout"), default="holdout")
    half = parser.parse_args().half
    torch.set_num_threads(1)
    path = RESULTS / f"faithfulness_{half}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    model, tokenizer = load_demo_model()
    for entry in json.loads(PROMPTS.read_text())[half]:
        known = {row["method"] for row in rows if row["prompt"] == entry["name"]}
        asked = {label: method for label, method in methods(half).items() if label not in known}
        if asked:
            rows += of_prompt(model, tokenizer, entry, asked)
            written = {"machine": machine_facts(), "rows": rows}
            path.write_text(json.dumps(written, indent=1, ensure_ascii=False) + "\n")
            print(entry["name"], flush=True)
    print(page_text(rows))
    print(f"written: {path}, {fill(PAGE, f'faithfulness --half {half}', page_text(rows))}")


if __name__ == "__main__":
    main()
