"""What was tried before `TwoStageAblation` was chosen, on the prompts to choose on.

`python -m tests.benchmarks.two_stage` prints the table, writes results/two_stage.json and puts the
table into docs/faithfulness.md. Every prompt is written as it is done, and what the file has of it
is not run again; without its file it starts anew. In nats; one thread.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from typing import Any

import pandas
import torch
from torch import Tensor, nn

from captum_llm_ext import load_demo_model
from captum_llm_ext.metrics import MethodComparison, compare_methods
from tests.benchmarks.attributed import (
    ABLATION,
    BASELINE,
    SALIENCY,
    Attributed,
    Method,
    as_input,
    methods,
    result_of,
)
from tests.benchmarks.candidates import CANDIDATES, by_candidate, first_token_aside
from tests.benchmarks.faithfulness import GREEDY, N_RANDOM, PAGE, PROMPTS
from tests.benchmarks.measure import RESULTS, machine_facts
from tests.benchmarks.pages import fill, markdown
from tests.benchmarks.tables import AREAS, difference, interval

SHIPPED = (SALIENCY, ABLATION, "two-stage ablation")


def tried() -> dict[str, Method]:
    return {
        **{label: methods()[label] for label in SHIPPED},
        "L1 saliency, first token aside": first_token_aside,
        **{label: partial(by_candidate, label) for label in CANDIDATES},
    }


def of_prompt(model: Any, tokenizer: Any, entry: dict[str, Any], asked: dict[str, Method]) -> list:
    """A row for each method: its measures and its cost."""
    costs: dict[str, dict[str, Any]] = {}

    def counted(label: str, model: nn.Module, tokenizer: Any, inp: Any, target: Tensor) -> Any:
        costs[label] = asdict(Attributed.by(asked[label], model, tokenizer, inp, target))
        return result_of(costs[label].pop("attr"), inp, tokenizer, target)

    found = compare_methods(
        model,
        tokenizer,
        [as_input(entry, tokenizer)],
        {label: partial(counted, label) for label in asked},
        gen_args=GREEDY,
        baselines=BASELINE,
        n_random=N_RANDOM,
        n_bootstrap=1,
    )
    rows = found.prompts.drop(columns="seconds").round(5).to_dict("records")
    return [{**row, "prompt": entry["name"], **costs[row["method"]]} for row in rows]


def page_text(rows: list[dict]) -> str:
    """Means with 95 % intervals, differences to ablation on the same prompts, and costs."""
    frame = pandas.DataFrame(rows)
    compared = MethodComparison.of(frame.assign(seconds=frame["cpu_s"]), n_bootstrap=10_000).table
    costs = frame.groupby("method")[["rows", "cpu_s"]].mean()
    over = {
        m: frame.pivot(index="prompt", columns="method", values=f"{m} over random") for m in AREAS
    }
    lines = []
    for label in compared.index:
        line = [str(label)]
        for measure in AREAS:
            mean, low, high = compared.loc[label, measure][["mean", "low", "high"]]
            line.append(f"{mean:.2f} [{low:.2f},\N{NO-BREAK SPACE}{high:.2f}]")
            less = over[measure][label] - over[measure][ABLATION]
            line.append("" if label == ABLATION else difference(interval(less)))
        cost = costs.loc[label]
        lines.append([*line, f"{cost['rows']:.1f}", f"{cost['cpu_s']:.1f}"])
    columns = [name for m in AREAS for name in (m, f"{m}, less ablation's")]
    return markdown(["method", *columns, "rows", "CPU s"], lines)


def main() -> None:
    torch.set_num_threads(1)
    path = RESULTS / "two_stage.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    model, tokenizer = load_demo_model()
    for entry in json.loads(PROMPTS.read_text())["choosing"]:
        known = {row["method"] for row in rows if row["prompt"] == entry["name"]}
        asked = {label: method for label, method in tried().items() if label not in known}
        if asked:
            rows += of_prompt(model, tokenizer, entry, asked)
            written = {"machine": machine_facts(), "rows": rows}
            path.write_text(json.dumps(written, indent=1, ensure_ascii=False) + "\n")
            print(entry["name"], flush=True)
    print(page_text(rows))
    print(f"written: {path}, {fill(PAGE, 'two_stage', page_text(rows))}")


if __name__ == "__main__":
    main()
