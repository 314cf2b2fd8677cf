"""Does the attribution name the sentence that holds the answer?

`python -m tests.benchmarks.planted_long` plants a made-up fact among the sentences of a text of
about 1,000 tokens, twelve times, and asks for it. Features are the sentences. It prints the rank of
the planted sentence by guided ablation with 24 evaluations and by flow, among all sentences but the
question, and where they miss. Each text is kept in `.benchmarks/` as it is done, and what is there
is not run again. One thread.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import torch

from captum_llm_ext import explain, load_demo_model, segment_input
from tests.benchmarks.pages import markdown

FACTS = json.loads((Path(__file__).parent / "planted_long.json").read_text())
KEPT = Path(__file__).parents[2] / ".benchmarks"
N_SENTENCES = 94
METHODS: dict[str, dict[str, Any]] = {
    "guided ablation, 24 evaluations": {"method": "guided", "max_evaluations": 24},
    "information flow": {"method": "flow"},
}


def text_of(number: int) -> str:
    """The text of a fact: other sentences in an order of its own, the fact at another place."""
    drawn = random.Random(number)
    sentences = drawn.sample(FACTS["sentences"], N_SENTENCES)
    fact = FACTS["facts"][number]
    sentences.insert(round((number + 0.5) / len(FACTS["facts"]) * N_SENTENCES), fact["sentence"])
    return " ".join([*sentences, fact["question"]])


def rank(values: torch.Tensor, place: int) -> int:
    """1 for the largest."""
    return 1 + int((values > values[place]).sum())


def of_text(model: Any, tokenizer: Any, number: int) -> dict[str, Any]:
    fact = FACTS["facts"][number]
    text = text_of(number)
    inp = segment_input(text, by="sentence")
    place = inp.values.index(fact["sentence"])
    row: dict[str, Any] = {"fact": fact["sentence"], "n_features": len(inp.values), "place": place}
    row["n_tokens"] = len(tokenizer.encode(text))
    for label, options in METHODS.items():
        start = time.process_time()
        result = explain(model, tokenizer, inp, fact["answer"], **options)
        values = result.seq_attr[:-1]  # the question is the last
        first = inp.values[int(values.argmax())]
        row[label] = {"rank": rank(values, place), "first": first}
        row[label]["cpu_s"] = round(time.process_time() - start, 1)
    return row


def table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for label in METHODS:
        ranks = [row[label]["rank"] for row in rows]
        seconds = sum(row[label]["cpu_s"] for row in rows) / len(rows)
        first = f"{sum(r == 1 for r in ranks)} of {len(rows)}"
        lines.append([label, first, " ".join(map(str, ranks)), f"{seconds:.1f}"])
    return markdown(["method", "named first", "ranks", "CPU s"], lines)


def main() -> None:
    torch.set_num_threads(1)
    KEPT.mkdir(exist_ok=True)
    path = KEPT / "planted_long.json"
    rows = json.loads(path.read_text()) if path.exists() else []
    model, tokenizer = load_demo_model()
    for number in range(len(rows), len(FACTS["facts"])):
        rows.append(of_text(model, tokenizer, number))
        path.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
        print(number, rows[-1]["n_tokens"], "tokens", flush=True)
    print(table(rows))
    for row in rows:
        for label in METHODS:
            if row[label]["rank"] > 1:
                print(f"{label} misses {row['fact']!r}: it names {row[label]['first']!r} first")


if __name__ == "__main__":
    main()
