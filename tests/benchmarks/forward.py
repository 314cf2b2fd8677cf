"""Forward mode: 5 features and 64 target tokens, against Captum's token-level integrated gradients.

`python -m tests.benchmarks.forward` prints a table and writes results/forward.json. One thread, CPU
seconds, alternating in one process, median of 3. Captum attributes to tokens, since it takes no
templates with gradients: the same prompt, target and steps.
"""

from __future__ import annotations

import warnings
from typing import Any

import captum.attr
import torch

import captum_llm_ext
from captum_llm_ext import LayerIntegratedGradients, TextTemplateInput, load_demo_model
from tests.benchmarks.measure import print_table, time_row, write_results
from tests.benchmarks.perturbations import BASELINES, TEMPLATE, VALUES
from tests.oracles.cases import differentiating

STEPS = 4
TARGET_TOKENS = 64


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model, tokenizer = load_demo_model()
    inp = TextTemplateInput(TEMPLATE, VALUES, baselines=BASELINES)
    text = inp.to_model_input()
    ids = torch.tensor([tokenizer.encode(text)])
    target = model.generate(ids, max_new_tokens=TARGET_TOKENS, do_sample=False)[0, ids.size(1) :]
    method = LayerIntegratedGradients(model, model.get_input_embeddings())
    ours = captum_llm_ext.LLMGradientAttribution(method, tokenizer)
    theirs = captum.attr.LLMGradientAttribution(method, tokenizer)
    tokens = captum.attr.TextTokenInput(text, tokenizer)

    def forward() -> Any:
        return ours.attribute(inp, target, n_steps=STEPS)

    rows = [
        time_row(
            f"forward mode, 5 features, {len(target)} target tokens",
            5,
            forward,
            lambda: theirs.attribute(tokens, target, n_steps=STEPS),
        )
    ]
    chosen = forward().token_attr
    with differentiating(forward=False):
        backward = forward().token_attr
    difference = float((chosen - backward).abs().max() / backward.abs().max())
    print(f"largest difference from backward passes: {difference:.0e} of the maximum")
    print_table(rows)
    print(f"written: {write_results('forward', rows)}")


if __name__ == "__main__":
    main()
