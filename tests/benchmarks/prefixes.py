"""Integrated gradients of a question after a long fixed prefix, with and without reusing it.

`python -m tests.benchmarks.prefixes` prints a table and writes results/prefixes.json. One thread,
CPU seconds, alternating in one process, median of 3.
"""

from __future__ import annotations

import re
import warnings
from typing import Any

import torch

from captum_llm_ext import (
    LayerIntegratedGradients,
    LLMGradientAttribution,
    load_demo_model,
    segment_input,
)
from tests.benchmarks.measure import print_table, time_row, write_results
from tests.benchmarks.perturbations import EXAMPLES, TASK

QUESTION = "I would happily see this one again tomorrow, and bring my parents too. Verdict:"
STEPS = 20


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model, tokenizer = load_demo_model()
    prefix = TASK + "".join(EXAMPLES)
    text = prefix + QUESTION
    words = [match.span() for match in re.finditer(r"\S+", text)]
    inp = segment_input(text, [span for span in words if span[0] >= len(prefix)])
    method = LayerIntegratedGradients(model, model.get_input_embeddings())
    attribution = LLMGradientAttribution(method, tokenizer)
    n_prefix, n_all = (len(tokenizer.encode(t)) for t in (prefix, text))

    def run(reuse_prefix: bool) -> Any:
        return attribution.attribute(inp, " good", n_steps=STEPS, reuse_prefix=reuse_prefix)

    reused, plain = run(True).seq_attr, run(False).seq_attr
    difference = float((reused - plain).abs().max() / plain.abs().max())
    print(f"{n_prefix} of {n_all} tokens are fixed")
    print(f"largest difference: {difference:.0e} of the maximum")
    rows = [time_row("prefix reused (right: not reused)", 6, lambda: run(True), lambda: run(False))]
    print_table(rows)
    print(f"written: {write_results('prefixes', rows)}")


if __name__ == "__main__":
    main()
