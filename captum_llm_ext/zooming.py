"""From passages to words: attribution inside one feature of a result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from captum_llm_ext.compat import CaptumTextTemplateInput
from captum_llm_ext.explaining import explain
from captum_llm_ext.inputs.segments import find_segments, template_of_spans
from captum_llm_ext.inputs.templates import render_template, value_spans
from captum_llm_ext.results.provenance import Provenance
from captum_llm_ext.results.single import LLMAttributionResult
from captum_llm_ext.scoring.tasks import gen_args_of_target


def zoom(
    model: nn.Module,
    tokenizer: Any,
    result: LLMAttributionResult,
    feature: int | str,
    by: str = "sentence",
    method: str | None = None,
    target: str | Tensor | None = None,
    **options: Any,
) -> LLMAttributionResult:
    """Attribute the same target to the parts of one feature, with the rest of the prompt whole.

    Args:
        model: the model of the result.
        tokenizer: its tokenizer.
        result: an attribution of a prompt whose features are parts of a text, as `segment_input`
            and `chat_input` make them.
        feature: the number of the feature, from 0 on (from the end if negative), or its text.
        by: what a part is: "word", "sentence", "line" or "paragraph", or a regular expression.
        method: as in `explain`. Default: "guided", which takes at most 64 prompts.
        target: what was attributed, a string or ids (n_output,). Default: the result's own.
        **options: of `explain`.

    Returns:
        A result whose features are the parts. Zoom into one of them with it.

    Raises:
        ValueError: the result does not know its input, its features are no parts of a text, the
            feature is not one of them or has no such parts; or the result does not know its target.
        IndexError: there are fewer features.

    Example:
        >>> inp = segment_input("Rain is due. The Louvre is in Paris.\\n\\nIt is in", "paragraph")
        >>> passages = explain(model, tokenizer, inp, " Paris", method="ablation")
        >>> zoom(model, tokenizer, passages, 0).input_tokens
        ['Rain is due.', 'The Louvre is in Paris.']

    Source: feature ablation of language models, Miglani et al. 2023,
    https://arxiv.org/abs/2312.05491.
    """
    inp = result.inp
    if not isinstance(inp, CaptumTextTemplateInput):
        kind = "no input" if inp is None else type(inp).__name__
        raise ValueError(
            "zoom needs a result whose features are parts of a text, as segment_input and "
            f"chat_input(by=...) make them; this result has {kind}"
        )
    number = _number(feature, list(inp.values))
    text, spans = value_spans(render_template(inp), inp.values)
    parts = find_segments(text, by, spans[number])
    if not parts:
        raise ValueError(f"the feature {inp.values[number]!r} has no part by {by!r}")
    if result.provenance is not None:
        options = {**_scored_as(result.provenance, model, options), **options}
        if target is None and result.provenance.target_ids is not None:
            target = torch.tensor(result.provenance.target_ids)
    if target is None:
        raise ValueError("the result does not know its target (provenance): pass target=")
    part_input = template_of_spans(text, parts)
    return explain(model, tokenizer, part_input, target, method or "guided", **options)


def _scored_as(
    provenance: Provenance, model: nn.Module, options: Mapping[str, Any]
) -> dict[str, Any]:
    """The options by which the result was scored."""
    contrast = provenance.options.get("contrast_target")
    if "contrast_target" not in options and not isinstance(contrast, str | None):
        raise ValueError("the result keeps a contrast_target as text alone: pass contrast_target=")
    made_with = {
        "attr_target": provenance.score,
        "contrast_target": contrast,
        "gen_args": gen_args_of_target(model, provenance.options.get("gen_args")),
    }
    return {name: value for name, value in made_with.items() if value is not None}


def _number(feature: int | str, values: list[str]) -> int:
    if isinstance(feature, str):
        if feature not in values:
            raise ValueError(f"no feature is {feature!r}: choose one of the result's input_tokens")
        return values.index(feature)
    if not -len(values) <= feature < len(values):
        raise IndexError(f"the result has {len(values)} features, and none with number {feature}")
    return feature % len(values)
