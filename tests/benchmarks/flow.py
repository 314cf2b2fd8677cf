"""Information flow against a plain forward pass, 17 prompt tokens and 14 target tokens.

`python -m tests.benchmarks.flow` prints CPU seconds and their ratio. One thread, alternating in one
process, median of 7.
"""

from __future__ import annotations

import torch

from captum_llm_ext import LLMAttentionAttribution, TextTokenInput, explain, load_demo_model
from tests.benchmarks.measure import compare

PROMPT = "Dave lives in Palm Coast, FL and is a lawyer. His personal interests include"
TARGET = " playing golf, hiking, and spending time with his family and friends."


def main() -> None:
    torch.set_num_threads(1)
    model, tokenizer = load_demo_model()
    inp = TextTokenInput(PROMPT, tokenizer)
    target = torch.tensor(tokenizer.encode(TARGET, add_special_tokens=False))
    ids = torch.cat([inp.inp_tensor, target[None]], 1)[:, :-1]
    flow = LLMAttentionAttribution(model, tokenizer, reduction="flow")

    @torch.no_grad()
    def forward() -> None:
        model(ids)

    for name, work in {
        "flow, every target token": lambda: flow.attribute(inp, target),
        "flow, the sequence": lambda: flow.attribute(inp, target, include_per_token_attr=False),
        "explain without a method": lambda: explain(model, tokenizer, inp, target),
    }.items():
        work()
        found = compare(forward, work, repeats=7)
        print(f"{name}: {found['captum_s']:.2f} s, {found['ratio']:.2f} times a forward pass")


if __name__ == "__main__":
    main()
