"""What the parsed arguments mean to `load_model`, `explain` and `batch`."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from captum_llm_ext.batches.processes import this_process
from captum_llm_ext.explaining import Layers
from captum_llm_ext.model.adapter import CAUSAL
from captum_llm_ext.model.loading import load_demo_model, load_model

LOAD_OPTIONS = ("task", "quantization", "dtype", "device_map")
# Those of `explain` that are on the command line as they are, in the namespace where given.
EXPLAIN_OPTIONS = (
    "attr_target",
    "attribute_to_layer_input",
    "contrast_target",
    "forward_mode",
    "heads",
    "include_generated",
    "include_hidden_attr",
    "include_per_token_attr",
    "include_prompt_attention",
    "internal_batch_size",
    "layer_mode",
    "max_evaluations",
    "n_samples",
    "n_steps",
    "norm",
    "num_trials",
    "quadrature",
    "reduction",
    "reuse_prefix",
    "stdevs",
    "tol",
)


def loaded(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The model and the tokenizer."""
    options = given(arguments, LOAD_OPTIONS)
    if not hasattr(arguments, "model"):
        if options.get("task") == CAUSAL:  # which it is
            del options["task"]
        if options:
            if "task" in options:
                raise ValueError(
                    f"--task {options['task']} needs a --model: the demo model is causal"
                )
            names = ", ".join(f"--{name.replace('_', '-')}" for name in options)
            raise ValueError(f"{names}: of a model that --model names, not of the demo model")
        return load_demo_model()
    device = _device_of_process()
    if device is not None:
        options.setdefault("device_map", device)
    return load_model(arguments.model, **options)


def layers(arguments: argparse.Namespace) -> Layers | None:
    """Layers as `explain` takes them: one alone gives the result of one."""
    found: list[str] | None = getattr(arguments, "layers", None)
    return found[0] if found is not None and len(found) == 1 else found


def explain_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keywords of `explain`, those that were given."""
    options = given(arguments, EXPLAIN_OPTIONS)
    if hasattr(arguments, "baselines") and not hasattr(arguments, "values"):
        several = arguments.baselines
        options["baselines"] = several[0] if len(several) == 1 else several
    if hasattr(arguments, "autocast"):
        options["dtype"] = getattr(torch, arguments.autocast)
    if gen_args := _gen_args(arguments):
        options["gen_args"] = gen_args
    return options


def given(arguments: argparse.Namespace, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}


def _gen_args(arguments: argparse.Namespace) -> dict[str, Any]:
    """Greedy unless said otherwise."""
    named = dict(getattr(arguments, "gen_args", ()))
    if hasattr(arguments, "max_new_tokens"):
        named.setdefault("max_new_tokens", arguments.max_new_tokens)
    return {"do_sample": False} | named if named else {}


def _device_of_process() -> dict[str, str] | None:
    """Of several processes each takes a GPU of its own, where its machine has any."""
    process = this_process()
    if process.count == 1 or not torch.cuda.is_available():
        return None
    return {"": f"cuda:{process.local_index % torch.cuda.device_count()}"}
