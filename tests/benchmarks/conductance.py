"""Conductance of every block against one run of integrated gradients at the embeddings.

`python -m tests.benchmarks.conductance` prints a table and writes results/conductance.json. One
thread, CPU seconds, both in the same process, alternating, median of 3.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from captum_llm_ext import (
    LayerConductance,
    LayerIntegratedGradients,
    LLMGradientAttribution,
    TextTokenInput,
    load_demo_model,
)
from tests.benchmarks.measure import compare, write_results

PROMPT = "Dave lives in Palm Coast, FL and is a lawyer. His personal interests include"
TARGET = " playing golf, hiking, and spending time with his family and friends."
BAR = 1.3
RUNS: dict[str, dict[str, Any]] = {
    "20 steps, every target token": {"n_steps": 20},
    "20 steps, the sequence alone": {"n_steps": 20, "include_per_token_attr": False},
}


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model, tokenizer = load_demo_model()
    inp = TextTokenInput(PROMPT, tokenizer)
    blocks = LayerConductance(model, "model.layers.*[0-9]")
    embeddings = LayerIntegratedGradients(model, model.get_input_embeddings())
    rows = []
    for what, options in RUNS.items():

        def run(method: Any, options: dict[str, Any] = options) -> Any:
            attribution = LLMGradientAttribution(method, tokenizer)
            return attribution.attribute(inp, target=TARGET, **options)

        found, other = run(blocks), run(embeddings)
        figures = compare(lambda: run(embeddings), lambda: run(blocks))
        rows.append(
            {
                "what": f"conductance of {len(found)} blocks, {what}",
                "integrated_gradients_s": figures["ours_s"],
                "conductance_s": figures["captum_s"],
                "ratio": figures["ratio"],
                "per_row": figures["ratio"] * other.n_evaluations / found.layer_n_evaluations[0],
                "rows": [other.n_evaluations, found.layer_n_evaluations[0]],
                "largest_delta": float(found.convergence_delta.abs().max()),
                "met": figures["ratio"] <= BAR,
            }
        )
        print(rows[-1], flush=True)
    print(f"written: {write_results('conductance', rows)}")


if __name__ == "__main__":
    main()
