"""What should stand for an absent token, on the small real model?

`python -m tests.benchmarks.stand_ins` ablates each token of the held-out texts with each stand-in,
judges the attributions by leaving tokens out for real, prints the table, writes
results/stand_ins.json and puts the table into docs/tasks/baselines.md. Every prompt is written as
it is done, and what the file has of it is not run again; without its file it starts anew. In nats;
one thread.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import pandas
import torch
from torch import Tensor, nn

from captum_llm_ext import LLMAttributionResult, explain, load_demo_model
from captum_llm_ext.metrics import compare_methods
from captum_llm_ext.metrics.removal import no_gradients, open_prompts, sequence_scores
from captum_llm_ext.scoring.rank_correlation import rank_correlation
from captum_llm_ext.scoring.tasks import Request
from tests.benchmarks.faithfulness import N_RANDOM, NEW_TOKENS, PROMPTS
from tests.benchmarks.measure import RESULTS, machine_facts
from tests.benchmarks.pages import DOCS, fill, markdown

PAGE = DOCS / "tasks" / "baselines.md"
STORED = RESULTS / "stand_ins.json"
N_COMMON = 4  # tokens whose attributions are averaged
EARLIEST = 500  # merges of the tokenizer, which are of the most common words
REMOVAL = "nothing (removal)"
STAND_INS: dict[str, Any] = {
    REMOVAL: "remove",
    "the pad token": "pad",
    "the nearest token": "nearest",
    "a neutral word, “something”": "Ġsomething",
    "“...”": "...",
    "token 0": 0,
}
COMMON = f"mean over {N_COMMON} common words"
COLUMNS = {
    "deletion": "deletion over random",
    "insertion": "insertion over random",
    "with removal": "rank correlation with removal",
    "with all before": "… with removal of all up to the token",
}


def texts() -> list[dict[str, str]]:
    """The held-out prompts whose tokens are their features."""
    held_out = json.loads(PROMPTS.read_text())["holdout"]
    return [entry for entry in held_out if set(entry) == {"name", "text"}]


def common_words(tokenizer: Any) -> list[int]:
    """Drawn once, for all prompts."""
    early = range(len(tokenizer.all_special_ids), EARLIEST)
    words = [i for i in early if (word := tokenizer.decode([i])).startswith(" ") and len(word) > 3]
    drawn = torch.randperm(len(words), generator=torch.Generator().manual_seed(0))[:N_COMMON]
    return [words[i] for i in drawn.tolist()]


def ablated(
    stand_ins: list[Any], model: nn.Module, tokenizer: Any, inp: Any, target: Tensor
) -> LLMAttributionResult:
    """The ablation of each token, mean over the stand-ins."""
    results = [
        explain(model, tokenizer, inp, target, "ablation", baselines=one) for one in stand_ins
    ]
    results[0].seq_attr = torch.stack([result.seq_attr for result in results]).mean(0)
    return results[0]


def without_all_up_to(model: nn.Module, tokenizer: Any, inp: Any, target: Tensor) -> Tensor:
    """(n_features,) what each token and all before it are worth."""
    prompts = open_prompts(model, tokenizer, inp, Request(target), "remove")
    n = inp.n_itp_features
    rows = torch.cat([torch.ones(1, n), 1 - torch.ones(n, n).tril()])
    with no_gradients():
        scores = sequence_scores(prompts, rows)
    return scores[0] - scores[1:]


def of_text(model: Any, tokenizer: Any, entry: dict[str, str]) -> Iterator[dict[str, Any]]:
    """A row for each stand-in: the judge's areas over random order, and rank correlations."""
    found: dict[str, Tensor] = {}

    def kept(name: str, stand_ins: list[Any], *asked: Any) -> LLMAttributionResult:
        result = ablated(stand_ins, *asked)
        found[name] = result.seq_attr.double()
        found["all before"] = found.get("all before", without_all_up_to(*asked))
        return result

    asked = {name: [spec] for name, spec in STAND_INS.items()} | {COMMON: common_words(tokenizer)}
    judged = compare_methods(
        model,
        tokenizer,
        [entry["text"]],
        {name: partial(kept, name, stand_ins) for name, stand_ins in asked.items()},
        gen_args={"max_new_tokens": NEW_TOKENS, "do_sample": False},
        baselines="remove",
        n_random=N_RANDOM,
        n_bootstrap=1,
    ).prompts.set_index("method")
    for name in asked:
        yield {
            "prompt": entry["name"],
            "stand-in": name,
            "deletion": round(float(judged.loc[name, "deletion over random"]), 5),
            "insertion": round(float(judged.loc[name, "insertion over random"]), 5),
            "with removal": round(float(rank_correlation(found[name][None], found[REMOVAL])), 5),
            "with all before": round(
                float(rank_correlation(found[name][None], found["all before"])), 5
            ),
        }


def page_text(rows: list[dict[str, Any]]) -> str:
    """Means over the texts, the best on both areas together first."""
    means = pandas.DataFrame(rows).drop(columns="prompt").groupby("stand-in").mean()
    order = (means["deletion"] + means["insertion"]).sort_values(ascending=False).index
    lines = [[name, *(f"{means.loc[name, column]:.2f}" for column in COLUMNS)] for name in order]
    n_texts = len({row["prompt"] for row in rows})
    first = f"what stands for the absent token ({n_texts} texts)"
    return markdown([first, *COLUMNS.values()], lines)


def main() -> None:
    torch.set_num_threads(1)
    rows = json.loads(STORED.read_text())["rows"] if STORED.exists() else []
    model, tokenizer = load_demo_model()
    print("common words:", tokenizer.convert_ids_to_tokens(common_words(tokenizer)))
    for entry in texts():
        if entry["name"] not in {row["prompt"] for row in rows}:
            rows += of_text(model, tokenizer, entry)
            written = {"machine": machine_facts(), "rows": rows}
            STORED.write_text(json.dumps(written, indent=1, ensure_ascii=False) + "\n")
            print(entry["name"], flush=True)
    print(page_text(rows))
    print(f"written: {STORED}, {fill(PAGE, 'stand_ins', page_text(rows))}")


if __name__ == "__main__":
    main()
