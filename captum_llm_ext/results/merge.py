"""Several input tokens as one: words of sub-words, or any spans."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from operator import index
from typing import Any

import torch
from captum.attr import InterpretableInput, TextTokenInput
from torch import Tensor

from captum_llm_ext.display import word_spans, word_texts

Spans = Sequence[tuple[int, int]]

_COMBINED: dict[str | None, Callable[[Tensor], Tensor]] = {
    # norm of the result → the value of a span; norms give the norm of the span's whole gradient
    None: lambda values: values.sum(-1),
    "l1": lambda values: values.sum(-1),
    "l2": lambda values: values.norm(dim=-1),
    "linf": lambda values: values.amax(-1),
}


def merged_fields(fields: dict[str, Any], merge: str | Spans, inp: Any) -> dict[str, Any]:
    """The attributes of a result, with each span of its input tokens as one token.

    Raises:
        ValueError: neither "word" nor spans that can be merged.
    """
    tokens: list[str] = fields["input_tokens"]
    are_tokens, texts = _are_tokens(tokens, inp), word_texts(tokens)
    if merge == "word":
        if not are_tokens:
            return fields
        spans = word_spans(texts, _gaps(inp))
    else:
        spans = _checked_spans(merge, len(tokens))
        if getattr(inp, "mask", None):
            raise ValueError(
                "merge: expected an input without a mask, got one whose mask gives several values "
                "one attribution; use one value per feature"
            )
    merged = {
        name: _MERGED[name](value, spans, fields.get("norm"))
        for name, value in fields.items()
        if name in _MERGED and value is not None
    }
    separator = "" if are_tokens else " "
    if "spread" in fields:  # that of a sum does not follow from those of its parts
        merged["spread"] = None
    return fields | merged | {"input_tokens": [separator.join(texts[a:b]) for a, b in spans]}


def selected_fields(fields: dict[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """The attributes of a result with some of its input tokens alone."""

    def columns(name: str, value: Any) -> Any:
        if name != "hidden_attr":
            return value[..., list(kept)]
        if isinstance(value, dict):
            return {key: one if one is None else one[:, list(kept)] for key, one in value.items()}
        return value[:, list(kept)]

    by_column = [*_MERGED, "spread"]
    chosen = {n: columns(n, v) for n, v in fields.items() if n in by_column and v is not None}
    return fields | chosen | {"input_tokens": [fields["input_tokens"][i] for i in kept]}


def _merged_columns(values: Tensor, spans: Spans, norm: str | None) -> Tensor:
    """Shape (..., n_input) to (..., n_spans)."""
    combine = _COMBINED[norm]
    return torch.stack([combine(values[..., start:stop]) for start, stop in spans], dim=-1)


def _merged_hidden(values: Any, spans: Spans, norm: str | None) -> Any:
    """Shape (n_output, n_input, hidden) to (n_output, n_spans, hidden), also of each layer.

    Attributions per hidden unit add up whatever the norm.
    """
    if isinstance(values, dict):
        return {
            name: None if layer is None else _merged_hidden(layer, spans, norm)
            for name, layer in values.items()
        }
    return torch.stack([values[:, start:stop].sum(1) for start, stop in spans], dim=1)


def _alone_in(flags: Tensor, spans: Spans, norm: str | None) -> Tensor:
    """Shape (n_input,) to (n_spans,): whether a span is one feature that was left out alone."""
    return torch.stack([flags[start:stop].all() & (stop - start == 1) for start, stop in spans])


_MERGED: dict[str, Callable[[Any, Spans, str | None], Any]] = {
    # attributes with a value for each input token
    "seq_attr": _merged_columns,
    "token_attr": _merged_columns,
    "layer_seq_attr": _merged_columns,
    "layer_token_attr": _merged_columns,
    "hidden_attr": _merged_hidden,
    "attention": _merged_columns,
    "measured": _alone_in,
}


def _are_tokens(tokens: Sequence[str], inp: InterpretableInput | None) -> bool:
    """Whether the features are tokens, and not words already, such as the values of a template.

    Without an input, they are taken for tokens where one begins with a space.
    """
    if inp is not None:
        return isinstance(inp, TextTokenInput)
    return any(text.startswith(" ") for text in word_texts(tokens))


def _gaps(inp: Any) -> Collection[int]:
    """Features before which the prompt has tokens that are not features, as in a chat."""
    mask = getattr(inp, "itp_mask", None)
    if mask is None:
        return set()
    positions = [*mask[0].nonzero().flatten().tolist(), mask.size(1)]
    return {i for i in range(1, len(positions)) if positions[i] != positions[i - 1] + 1}


def _checked_spans(spans: Any, n_input: int) -> list[tuple[int, int]]:
    """The spans in order, and a span for each token outside them."""
    try:
        ordered = sorted((index(start), index(stop)) for start, stop in spans)
    except (TypeError, ValueError):
        raise ValueError(f'merge: expected "word" or spans (start, stop), got {spans!r}') from None
    for (start, stop), before in zip(ordered, [0, *(stop for _, stop in ordered)], strict=False):
        if not before <= start < stop <= n_input:
            raise ValueError(
                f"merge: expected spans (start, stop) within 0 to {n_input} that do not overlap, "
                f"got ({start}, {stop})"
            )
    inside = {token for start, stop in ordered for token in range(start, stop)}
    return sorted([*ordered, *((i, i + 1) for i in range(n_input) if i not in inside)])
