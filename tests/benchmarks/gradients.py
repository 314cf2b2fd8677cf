"""Gradient attribution against Captum on the small real model: time and memory.

`python -m tests.benchmarks.gradients` prints a table and writes results/gradients.json. One thread,
CPU seconds, both in the same process, alternating, median of 3; memory in a process each.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import captum.attr
import torch
from torch import nn

import captum_llm_ext
from captum_llm_ext import (
    LayerGradientXActivation,
    LayerIntegratedGradients,
    TextTokenInput,
    find_layers,
    load_demo_model,
)
from tests.benchmarks.measure import (
    in_own_process,
    peak_above_now,
    print_table,
    time_row,
    write_results,
)

PROMPT = "Dave lives in Palm Coast, FL and is a lawyer. His personal interests include"
TARGET = " playing golf, hiking, and spending time with his family and friends."
STEPS = 20
LAYERS = ("embed_tokens", "q_proj", "k_proj", "v_proj", "mlp")


class Workload:
    """The model and the calls that are compared."""

    def __init__(self) -> None:
        self.model, self.tokenizer = load_demo_model()
        self.inp = TextTokenInput(PROMPT, self.tokenizer)
        self.embedding = self.model.get_input_embeddings()
        self.layers = find_layers(self.model, *LAYERS)

    def integrated_gradients(self, wrapper: Any, **options: Any) -> Any:
        method = LayerIntegratedGradients(self.model, self.embedding)
        attribution = wrapper(method, self.tokenizer)
        return attribution.attribute(self.inp, target=TARGET, n_steps=STEPS, **options)

    def gradient_x_activation(self, wrapper: Any, layer: nn.Module | list[nn.Module]) -> Any:
        method = LayerGradientXActivation(self.model, layer)
        return wrapper(method, self.tokenizer).attribute(self.inp, target=TARGET)

    def one_layer_at_a_time(self) -> None:
        for layer in self.layers.values():
            self.gradient_x_activation(captum.attr.LLMGradientAttribution, layer)


def memory_row() -> Any:
    module = "tests.benchmarks.gradients"
    ours, theirs = (in_own_process(module, f"memory-{who}") for who in ("ours", "captum"))
    return {
        "what": "(d) peak memory of (a) above the loaded model",
        "ours": f"{ours:.0f} MB",
        "captum": f"{theirs:.0f} MB",
        "ratio": ours / theirs,
        "bar": "<= 0.5",
        "met": ours / theirs <= 0.5,
    }


def print_peak_memory(wrapper: Any) -> None:
    """Peak memory of workload (a) above what the loaded model took, in MB."""
    workload = Workload()
    with torch.no_grad():
        workload.model(workload.inp.inp_tensor)
    print(peak_above_now(lambda: workload.integrated_gradients(wrapper)))


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    ours, theirs = captum_llm_ext.LLMGradientAttribution, captum.attr.LLMGradientAttribution
    if len(sys.argv) > 1:
        print_peak_memory(ours if sys.argv[1] == "memory-ours" else theirs)
    else:
        run(ours, theirs)


def run(ours: Any, theirs: Any) -> None:
    work = Workload()
    print(f"{work.inp.n_itp_features} prompt tokens, {len(work.layers)} layers, {STEPS} steps")
    rows = [
        time_row(
            "(a) integrated gradients, every target token",
            1.5,
            lambda: work.integrated_gradients(ours),
            lambda: work.integrated_gradients(theirs),
        ),
        time_row(
            "(b) integrated gradients, the sequence alone",
            9,
            lambda: work.integrated_gradients(ours, include_per_token_attr=False),
            lambda: work.integrated_gradients(theirs),
        ),
        time_row(
            f"(c) gradient x activation of {len(work.layers)} layers",
            100,
            lambda: work.gradient_x_activation(ours, list(work.layers.values())),
            work.one_layer_at_a_time,
        ),
        memory_row(),
    ]
    print_table(rows)
    print(f"written: {write_results('gradients', rows)}")


if __name__ == "__main__":
    main()
