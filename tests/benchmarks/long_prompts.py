"""How faithful is guided ablation on long prompts, and at what cost, on the small real model?

`python -m tests.benchmarks.long_prompts` judges the prompts of `long_prompts.json` that were held
out (180 to 400 tokens, every token a feature), by removal and by "pad". `--prompts N` takes the
first N alone. Each prompt is kept in `.benchmarks/` as it is done, and what is there is not run
again. In nats; one thread.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import pandas
import torch

from captum_llm_ext import load_demo_model
from captum_llm_ext.metrics import compare_methods
from tests.benchmarks.attributed import ABLATION as REFERENCE
from tests.benchmarks.attributed import FLOW, as_input, by_name
from tests.benchmarks.faithfulness import NEW_TOKENS
from tests.benchmarks.pages import markdown
from tests.benchmarks.tables import interval

PROMPTS = Path(__file__).parent / "long_prompts.json"
KEPT = Path(__file__).parents[2] / ".benchmarks"
BASELINES = ("remove", "pad")
N_STEPS, N_RANDOM = 12, 2
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    REFERENCE: ("ablation", {}),
    "guided ablation, 64 evaluations": ("guided", {"max_evaluations": 64}),
    FLOW: ("flow", {}),
    "Lasso, 64 masks": ("surrogate", {"n_masks": 64}),
}


class Cost:
    """A method whose evaluations and CPU seconds are noted; flow has one."""

    def __init__(self, method: Any) -> None:
        self.method, self.spent = method, dict[str, float]()

    def __call__(self, *arguments: Any) -> Any:
        start = time.process_time()
        torch.manual_seed(0)
        result = self.method(*arguments)
        self.spent = {
            "rows": result.provenance.evaluations,
            "cpu_s": round(time.process_time() - start, 3),
        }
        return result


def _paired(differences: pandas.Series) -> str:
    """Mean and 95 % bootstrap interval of a difference, and on how many prompts it is above 0."""
    mean, low, high, better, worse = interval(differences)
    return f"{mean:+.2f} [{low:.2f}, {high:.2f}] ({better}:{worse})" if better or worse else ""


def of_prompt(
    model: Any, tokenizer: Any, entry: dict[str, Any], baseline: str, labels: list[str]
) -> list[dict[str, Any]]:
    """A row for each method: its measures and its cost."""
    costs = {}
    for label in labels:
        name, options = METHODS[label]
        own = {} if name == "flow" else {"baselines": baseline}
        costs[label] = Cost(partial(by_name, name, {**options, **own}))
    found = compare_methods(
        model,
        tokenizer,
        [as_input(entry, tokenizer)],
        costs,
        gen_args={"max_new_tokens": NEW_TOKENS, "do_sample": False},
        baselines=baseline,
        n_steps=N_STEPS,
        n_random=N_RANDOM,
        n_bootstrap=1,
    )
    rows = found.prompts.drop(columns="seconds").round(5).to_dict("records")
    more = {"prompt": entry["name"], "baseline": baseline}
    return [{**row, **more, **costs[row["method"]].spent} for row in rows]


def table(rows: list[dict[str, Any]]) -> str:
    """Means over random order, paired differences to ablation with 95 % intervals, and costs."""
    frame = pandas.DataFrame(rows)
    lines = []
    for label in METHODS:
        line = [label]
        for measure in ("deletion", "insertion"):
            over = frame.pivot(index="prompt", columns="method", values=f"{measure} over random")
            line += [f"{over[label].mean():.2f}", _paired(over[label] - over[REFERENCE])]
        costs = {
            x: frame.pivot(index="prompt", columns="method", values=x) for x in ("rows", "cpu_s")
        }
        ratio = costs["cpu_s"][REFERENCE] / costs["cpu_s"][label]
        line += [f"{costs['rows'][label].mean():.0f}", f"{costs['cpu_s'][label].mean():.1f}"]
        lines.append([*line, f"{ratio.min():.1f} to {ratio.max():.1f}"])
    names = ("deletion", "less ablation's", "insertion", "less ablation's", "rows", "CPU s")
    return markdown(["method", *names, "ablation's CPU s over its"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=None, metavar="N")
    n_prompts = parser.parse_args().prompts
    torch.set_num_threads(1)
    KEPT.mkdir(exist_ok=True)
    path = KEPT / "long_prompts.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    model, tokenizer = load_demo_model()
    entries = json.loads(PROMPTS.read_text())["holdout"][:n_prompts]
    for entry in entries:
        for baseline in BASELINES:
            at = (entry["name"], baseline)
            known = {row["method"] for row in rows if (row["prompt"], row["baseline"]) == at}
            if labels := [label for label in METHODS if label not in known]:
                rows += of_prompt(model, tokenizer, entry, baseline, labels)
                path.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
                print(*at, flush=True)
    names = {entry["name"] for entry in entries}
    for baseline in BASELINES:
        chosen = [r for r in rows if r["baseline"] == baseline and r["prompt"] in names]
        print(f"\njudged by {baseline}, {len(entries)} prompts\n\n{table(chosen)}")


if __name__ == "__main__":
    main()
