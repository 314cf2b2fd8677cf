"""Turn the parsed arguments into keywords of `load_model`, `explain` and `batch`.

Each function takes the arguments that it reads out of the dict. What remains is for `explain`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

LOAD_OPTIONS = ("task", "quantization", "dtype", "device_map", "trust_remote_code")


def take(arguments: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Take these arguments out of the dict, those that are there."""
    return {name: arguments.pop(name) for name in names if name in arguments}


def load(arguments: dict[str, Any]) -> tuple[Any, Any]:
    """The model and its tokenizer; the demo model where no --model is named."""
    name, options = arguments.pop("model", None), take(arguments, LOAD_OPTIONS)
    if name is None:
        _check_demo_model(options)
    from captum_llm_ext.model.loading import load_demo_model, load_model

    if name is None:
        return load_demo_model()
    device = _device_of_process()
    if device is not None:
        options.setdefault("device_map", device)
    return load_model(name, **options)


def explain_keywords(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments as keywords of `explain`. `batch` takes the same keywords."""
    keywords = dict(arguments)
    for name in ("layers", "baselines"):
        values = keywords.get(name, ())
        if len(values) == 1:  # a list, even of one, gives a result of several layers
            keywords[name] = values[0]
    gen_args = dict(keywords.pop("gen_args", ()))
    if "max_new_tokens" in keywords:
        gen_args = {"max_new_tokens": keywords.pop("max_new_tokens"), **gen_args}
    if gen_args:
        keywords["gen_args"] = {"do_sample": False, **gen_args}
    if "autocast" in keywords:
        import torch

        keywords["dtype"] = getattr(torch, keywords.pop("autocast"))
    return keywords


def _check_demo_model(options: dict[str, Any]) -> None:
    """Refuse options of loading, which the demo model does not take."""
    task = options.pop("task", "causal")
    if task != "causal":
        raise ValueError(f"--task {task} needs a --model: the demo model is causal")
    if options:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in options)
        raise ValueError(f"{names}: only for a model that --model names, not for the demo model")


def _device_of_process() -> dict[str, str] | None:
    """The GPU of this process, where there are several processes and the machine has GPUs."""
    import torch

    from captum_llm_ext.batches.processes import this_process

    process = this_process()
    if process.count == 1 or not torch.cuda.is_available():
        return None
    return {"": f"cuda:{process.local_index % torch.cuda.device_count()}"}
