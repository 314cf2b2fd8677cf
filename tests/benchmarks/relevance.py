"""Relevance against L1 saliency, the sequence alone, 17 prompt tokens and 14 target tokens.

`python -m tests.benchmarks.relevance` prints CPU seconds and their ratio. One thread, alternating
in one process, median of 7.
"""

from __future__ import annotations

import torch

from captum_llm_ext import TextTokenInput, explain, load_demo_model
from tests.benchmarks.flow import PROMPT, TARGET
from tests.benchmarks.measure import compare


def main() -> None:
    torch.set_num_threads(1)
    model, tokenizer = load_demo_model()
    inp = TextTokenInput(PROMPT, tokenizer)

    def run(method: str, **options: str) -> None:
        explain(model, tokenizer, inp, TARGET, method, include_per_token_attr=False, **options)

    for rules in ("cp", "attnlrp"):
        run("relevance", rules=rules)
        found = compare(lambda: run("saliency"), lambda: run("relevance", rules=rules), repeats=7)  # noqa: B023
        print(f"{rules}: {found['captum_s']:.2f} s, {found['ratio']:.2f} times saliency")


if __name__ == "__main__":
    main()
