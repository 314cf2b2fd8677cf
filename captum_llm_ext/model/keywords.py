"""Which options a model's forward takes, also where a wrapper hands them on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from captum_llm_ext.model.hooks import evaluating
from captum_llm_ext.model.signatures import keywords, takes_any


def taken_by(
    model: nn.Module, call: Callable[..., Any], options: Mapping[str, Any]
) -> frozenset[str]:
    """Those of the options that the model's forward takes.

    A wrapper (of PEFT, DataParallel, one's own) may hand any keyword on to the model inside, may
    drop it, or may fail. What the model inside alone names is therefore tried.

    call: runs the model once with options; options: values to try.
    """
    named = frozenset(options) & keywords(model.forward)
    inside = {name: options[name] for name in options if _named_inside(model, name)}
    unsure = {name: value for name, value in inside.items() if name not in named}
    if unsure and not _works(model, call, unsure):
        unsure = {name: x for name, x in unsure.items() if _works(model, call, {name: x})}
    return named | set(unsure)


def _named_inside(model: nn.Module, name: str) -> bool:
    """Whether the forward names the argument, or takes any and a model right inside names it."""
    if name in keywords(model.forward):
        return True
    if isinstance(model, PreTrainedModel) or not takes_any(model.forward):
        return False
    return any(_named_inside(child, name) for child in model.children())


@torch.no_grad()
def _works(model: nn.Module, call: Callable[..., Any], options: Mapping[str, Any]) -> bool:
    try:
        with evaluating(model):
            call(**options)
    except Exception:  # whatever the wrapper says of an option that it does not take
        return False
    return True
