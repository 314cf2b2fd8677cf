"""A cheaper method's attributions, which tell a perturbation method where to look first."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from captum_llm_ext.choosing import automatic_methods, first_that_reads
from captum_llm_ext.compat import InterpretableInput
from captum_llm_ext.perturbations.masked_prompts import MaskedPrompts
from captum_llm_ext.registry import AUTOMATIC, load, method_named
from captum_llm_ext.scoring.tasks import gen_args_of_target

logger = logging.getLogger(__name__)


def checked_guide(name: str | None) -> str | None:
    """The name of a method, or None for no guide.

    Raises:
        ValueError: no method has this name.
    """
    if name is not None:
        method_named(name)
    return name


def guide_of(
    name: str,
    model: nn.Module,
    masked: MaskedPrompts,
    inp: InterpretableInput,
    gen_args: dict[str, Any] | None,
) -> Tensor | None:
    """(n_features,) attributions by the method `name` of the target's log p.

    "flow" becomes the method that `explain` takes where none is named, which reads every model; and
    a model without input embeddings has no guide then.

    gen_args: the caller's, of which an encoder-decoder model needs how its decoder begins.
    """
    attribute = partial(
        _attributions,
        model=model,
        tokenizer=masked.tokenizer,
        inp=inp,
        target=masked.scorer.target.ids.clone(),
        gen_args=gen_args_of_target(model, gen_args),
    )
    if name != AUTOMATIC[0]:
        return attribute(name)
    try:
        return first_that_reads(automatic_methods(model), attribute)
    except ValueError as error:
        logger.info("no method is a guide of this model: %s", error)
        return None


def _attributions(
    name: str,
    model: nn.Module,
    tokenizer: Any,
    inp: InterpretableInput,
    target: Tensor,
    gen_args: dict[str, Any] | None,
) -> Tensor:
    """(n_features,) by a method of the registry."""
    row = method_named(name)
    wrapper = load(row.wrapped_by.path).of_method(name, model, tokenizer, None, dict(row.fixed))
    with torch.enable_grad():
        result = wrapper.attribute(inp, target, gen_args=gen_args, **row.wrapped_by.sequence_only)
    values: Tensor = result.seq_attr.cpu()
    columns = list(inp.formatted_mask if getattr(inp, "mask", None) else range(len(values)))
    return values[[columns.index(feature) for feature in range(inp.n_itp_features)]]
