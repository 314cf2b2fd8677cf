"""How faithful are the methods, and at what cost, on two small real models?

`python -m tests.benchmarks.faithfulness --model smollm2 --prompts held-out` attributes the prompts
by every method of the registry, judges each attribution with tokens taken out in three ways, asks
the planted facts (planted.py), prints the tables, writes results/faithfulness_smollm2_held-out.json
and puts the tables into docs/faithfulness.md. `--model gemma` fetches Gemma 3 270M. `--prompts
choosing` is for what is still to be chosen, and leaves the page alone. `--tables` runs nothing and
prints what is known. In nats; one thread.

What was measured is kept in runs/, a line each, and not measured again: a run that was cut off goes
on where it stopped, and of methods a new row of the registry alone is run. Without its files it
starts anew.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import torch

from captum_llm_ext.metrics import REMOVED_BY, compare_methods
from captum_llm_ext.metrics.removal import open_prompts
from captum_llm_ext.scoring.tasks import Request
from tests.benchmarks import tables
from tests.benchmarks.attributed import (
    WITHOUT_FACTS,
    Attributed,
    Method,
    as_input,
    methods,
    result_of,
)
from tests.benchmarks.measure import RESULTS, machine_facts
from tests.benchmarks.models import MODELS
from tests.benchmarks.pages import DOCS, fill
from tests.benchmarks.planted import Fact, facts

HERE = Path(__file__).parent
PROMPTS, RUNS = HERE / "prompts.json", HERE / "runs"
PAGE = DOCS / "faithfulness.md"
NEW_TOKENS, N_RANDOM = 7, 6
GREEDY = {"max_new_tokens": NEW_TOKENS, "do_sample": False}


@dataclass(frozen=True)
class Log:
    """Records in a file, a line each, known by some of their fields."""

    path: Path
    fields: tuple[str, ...]

    @cached_property
    def known(self) -> dict[tuple, dict[str, Any]]:
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return {self._key(record): record for record in map(json.loads, lines)}

    def add(self, **record: Any) -> None:
        self.path.parent.mkdir(exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self.known[self._key(record)] = record

    def _key(self, record: dict[str, Any]) -> tuple:
        return tuple(record[field] for field in self.fields)


class Referee:
    """What is known of a model on some prompts, and what is still to be measured."""

    def __init__(self, model: str, prompts: str) -> None:
        self.model_name, self.name = model, f"{model}_{prompts}"
        self.attributed = self._log("attributed", "prompt", "method")
        self.judged = self._log("judged", "prompt", "removed by", "method")
        self.planted = self._log("planted", "fact", "method")
        half = "choosing" if prompts == "choosing" else "holdout"
        chats = model == "smollm2"  # Gemma's file has no chat template
        entries = json.loads(PROMPTS.read_text())[half]
        self.entries = [entry for entry in entries if chats or "messages" not in entry]
        self.facts = facts(prompts)

    def _log(self, kind: str, *fields: str) -> Log:
        return Log(RUNS / f"{kind}_{self.name}.jsonl", fields)

    @cached_property
    def loaded(self) -> tuple[Any, Any]:
        return MODELS[self.model_name]()

    def measure(self) -> None:
        """All that is not known yet; what the aims ask for comes first."""
        for turn, way in product(range(3), ("removal", "pad", "common words")):
            for fact in self.facts:
                self.fact(fact, turn)
            for entry in self.entries:
                self.prompt(entry, turn, way)

    def prompt(self, entry: dict[str, Any], turn: int, way: str) -> None:
        """Attribute a prompt by the methods of a turn and judge the attributions."""
        name, named = entry["name"], methods(turn)
        unjudged = [label for label in named if (name, way, label) not in self.judged.known]
        if not unjudged:
            return
        model, tokenizer = self.loaded
        inp = as_input(entry, tokenizer)
        target = self._target(inp)
        for label in unjudged:
            if (name, label) not in self.attributed.known:
                found = Attributed.by(named[label], model, tokenizer, inp, target)
                self.attributed.add(prompt=name, method=label, **asdict(found))
        for row in self._judge(name, inp, target, unjudged, way):
            self.judged.add(**{**row, "prompt": name})
        print(turn, way, name, flush=True)

    def _target(self, inp: Any) -> torch.Tensor:
        """What the model says."""
        model, tokenizer = self.loaded
        return open_prompts(model, tokenizer, inp, Request(None, GREEDY)).scorer.target.ids

    def _judge(
        self, name: str, inp: Any, target: torch.Tensor, methods: Sequence[str], way: str
    ) -> list[dict[str, Any]]:
        model, tokenizer = self.loaded

        def known(label: str) -> Method:
            attr = self.attributed.known[name, label]["attr"]
            return lambda model, tokenizer, inp, target: result_of(attr, inp, tokenizer, target)

        compared = compare_methods(
            model,
            tokenizer,
            [inp],
            {label: known(label) for label in methods},
            [target],
            removed_by={way: REMOVED_BY[way]},
            n_random=N_RANDOM,
            n_bootstrap=1,
        )
        return compared.prompts.drop(columns="seconds").round(4).to_dict("records")

    def fact(self, fact: Fact, turn: int) -> None:
        """Which sentence does each method name first?"""
        missing = {
            label: method
            for label, method in methods(turn).items()
            if label not in WITHOUT_FACTS and (fact.name, label) not in self.planted.known
        }
        if missing:
            model, tokenizer = self.loaded
            inp, target = fact.inp(), fact.target(tokenizer)
            for label, method in missing.items():
                found = Attributed.by(method, model, tokenizer, inp, target)
                rank = sorted(found.attr, reverse=True).index(found.attr[fact.place]) + 1
                self.planted.add(fact=fact.name, method=label, rank=rank, cpu_s=found.cpu_s)
            print(turn, fact.name, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--prompts", choices=("choosing", "held-out"), default="held-out")
    parser.add_argument("--tables", action="store_true", help="print what is known, run nothing")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="integrated gradients")
    referee = Referee(asked.model, asked.prompts)
    if not asked.tables:
        referee.measure()
    logs = (referee.attributed, referee.judged, referee.planted)
    summary = {
        "machine": machine_facts(),
        "n_facts": len({key[0] for key in referee.planted.known}),
        **tables.summary(*(list(log.known.values()) for log in logs)),
    }
    path = RESULTS / f"faithfulness_{referee.name}.json"
    path.write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    text = tables.page_text(summary)
    print(text)
    if asked.prompts == "held-out":
        fill(PAGE, f"faithfulness --model {asked.model}", text)


if __name__ == "__main__":
    main()
