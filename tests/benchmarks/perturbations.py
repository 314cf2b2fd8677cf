"""Perturbation attribution against Captum on the small real model.

`python -m tests.benchmarks.perturbations` prints a table and writes results/perturbations.json. One
thread, CPU seconds, both in the same process, alternating, median of 3.
"""

from __future__ import annotations

import warnings
from typing import Any

import captum.attr
import torch
from captum.attr import FeatureAblation, ShapleyValueSampling

import captum_llm_ext
from captum_llm_ext import TextTemplateInput, TextTokenInput, load_demo_model
from tests.benchmarks.gradients import PROMPT, TARGET
from tests.benchmarks.measure import print_table, time_row, write_results

TEMPLATE = "{} lives in {}, {} and is a {}. {} personal interests include"
VALUES = ["Dave", "Palm Coast", "FL", "lawyer", "His"]
BASELINES = ["Sarah", "Seattle", "WA", "doctor", "Her"]
TASK = (
    "Each of the following film reviews was written by a reader of our paper. After each review "
    "stands the verdict that the reader gave, either good or bad. The verdict says whether the "
    "reader would go and see the film again, and it is always a single word. Read the examples "
    "and then give the verdict that fits the last review.\n"
)
EXAMPLES = [
    "The film wanders for two hours through a plot that nobody on the screen seems to believe in, "
    "and the jokes were old when the cinema was built. Verdict: bad\n",
    "A small, warm and patient story about two sisters and a boat, acted so well that you forget "
    "that anyone is acting, with music that stays with you for days afterwards. Verdict: good\n",
] * 4
QUESTION = "I would happily see this one again tomorrow, and bring my parents too. Verdict:"
BY_SEQUENCE = {"forward_in_tokens": False, "use_cached_outputs": False}


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model, tokenizer = load_demo_model()
    tokens = TextTokenInput(PROMPT, tokenizer)
    values = TextTemplateInput(TEMPLATE, VALUES, baselines=BASELINES)
    examples = TextTemplateInput(TASK + "{}" * 8 + QUESTION, EXAMPLES)
    n_tokens = len(tokenizer.encode(examples.to_model_input()))

    def run(wrapper: Any, method: Any, inp: Any, target: str = TARGET, **options: Any) -> Any:
        torch.manual_seed(0)
        return wrapper(method(model), tokenizer).attribute(inp, target=target, **options)

    ours, theirs = captum_llm_ext.LLMAttribution, captum.attr.LLMAttribution
    rows = [
        time_row(
            "ablation per token, Captum's default",
            18,
            lambda: run(ours, FeatureAblation, tokens),
            lambda: run(theirs, FeatureAblation, tokens),
        ),
        time_row(
            "ablation per token, Captum forward_in_tokens=False",
            1.6,
            lambda: run(ours, FeatureAblation, tokens),
            lambda: run(theirs, FeatureAblation, tokens, **BY_SEQUENCE),
        ),
        time_row(
            f"ablation of 8 examples, {n_tokens} tokens",
            2,
            lambda: run(ours, FeatureAblation, examples, " good"),
            lambda: run(theirs, FeatureAblation, examples, " good", **BY_SEQUENCE),
        ),
        time_row(
            "Shapley sampling, 5 features, 25 samples",
            5,
            lambda: run(ours, ShapleyValueSampling, values, n_samples=25),
            lambda: run(theirs, ShapleyValueSampling, values, n_samples=25, **BY_SEQUENCE),
        ),
    ]
    print_table(rows)
    print(f"written: {write_results('perturbations', rows)}")


if __name__ == "__main__":
    main()
