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
    # norm of the result: values of several tokens as one, which is the norm of their gradients
    # taken together
    None: lambda values: values.sum(-1),
    "l1": lambda values: values.sum(-1),
    "l2": lambda values: values.norm(dim=-1),
    "linf": lambda values: values.amax(-1),
}


def merged_fields(fields: dict[str, Any], merge: str | Spans, inp: Any) -> dict[str, Any]:
    """The attributes of a result with every span of its input tokens as one.

    Raises:
        ValueError: neither "word" nor spans that can be merged.
    """
    tokens: list[str] = fields["input_tokens"]
    of_text, texts = _are_tokens(tokens, inp), word_texts(tokens)
    if merge == "word":
        if not of_text:
            return fields
        spans = word_spans(texts, _gaps(inp))
    else:
        spans = _checked(merge, len(tokens))
        _check_mask(inp)
    between = "" if of_text else " "
    merged = {
        name: _MERGED[name](value, spans, fields.get("norm"))
        for name, value in fields.items()
        if name in _MERGED and value is not None
    }
    return fields | merged | {"input_tokens": [between.join(texts[a:b]) for a, b in spans]}


def _columns(values: Tensor, spans: Spans, norm: str | None) -> Tensor:
    """Shape (..., n_input) to (..., n_spans)."""
    combine = _COMBINED[norm]
    return torch.stack([combine(values[..., start:stop]) for start, stop in spans], dim=-1)


def _hidden(values: Tensor, spans: Spans, _: str | None) -> Tensor:
    """Shape (n_output, n_input, hidden) to (n_output, n_spans, hidden): they always add up."""
    return torch.stack([values[:, start:stop].sum(1) for start, stop in spans], dim=1)


def _hidden_of_layers(values: Any, spans: Spans, norm: str | None) -> Any:
    if isinstance(values, Tensor):
        return _hidden(values, spans, norm)
    return {
        name: None if value is None else _hidden(value, spans, norm)
        for name, value in values.items()
    }


_MERGED: dict[str, Callable[[Any, Spans, str | None], Any]] = {
    # attributes with a value for each input token
    "seq_attr": _columns,
    "token_attr": _columns,
    "layer_seq_attr": _columns,
    "layer_token_attr": _columns,
    "hidden_attr": _hidden_of_layers,
    "attention": _columns,
}


def _are_tokens(tokens: Sequence[str], inp: InterpretableInput | None) -> bool:
    """Whether features are tokens rather than, say, values of a template, which are words already.

    Where the input is not known, tokens are told by one that begins with a space.
    """
    if inp is not None:
        return isinstance(inp, TextTokenInput)
    return any(text.startswith(" ") for text in word_texts(tokens))


def _gaps(inp: Any) -> Collection[int]:
    """Features before which the prompt has tokens that are no features, as in a chat."""
    mask = getattr(inp, "itp_mask", None)
    if mask is None:
        return set()
    places = [*mask[0].nonzero().flatten().tolist(), mask.size(1)]
    return {i for i in range(1, len(places)) if places[i] != places[i - 1] + 1}


def _check_mask(inp: Any) -> None:
    if getattr(inp, "mask", None):
        raise ValueError(
            "merge: values that share a mask have one attribution already, and each shows it; "
            "expected an input without a mask, use one value per feature"
        )


def _checked(spans: Any, n_input: int) -> list[tuple[int, int]]:
    """The spans in order, with every token outside them as a span of its own."""
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
    inside = {place for start, stop in ordered for place in range(start, stop)}
    return sorted([*ordered, *((p, p + 1) for p in range(n_input) if p not in inside)])
