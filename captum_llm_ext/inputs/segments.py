"""A text whose features are its words, sentences, lines or other spans."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from captum_llm_ext.inputs.templates import TextTemplateInput

Span = tuple[int, int]

PATTERNS = {
    "word": r"\S+",
    "sentence": r"\S(?:[^\n]*?)(?:[.!?]+[\"')\]]*(?=\s|$)|(?=\s*(?:\n|$)))",
    "line": r"\S(?:[^\n]*\S)?",
    "paragraph": r"\S(?:[\s\S]*?\S)??(?=\s*(?:\n[^\S\n]*\n|$(?![\s\S])))",
}


def segment_input(
    text: str,
    by: str | re.Pattern[str] | Sequence[Span] = "sentence",
    baselines: list[str] | Callable[[], list[str]] | None = None,
) -> TextTemplateInput:
    """A text as an interpretable input whose features are parts of it.

    Args:
        text: the prompt; the text between the segments stays as it is.
        by: "word", "sentence", "line" or "paragraph"; a regular expression, whose matches are the
            segments; or a list of (start, stop) spans in characters.
        baselines: what stands in place of each absent segment. Default: nothing.

    Returns:
        A `TextTemplateInput`, for gradient and perturbation methods.

    Raises:
        ValueError: the text has no segment, or spans overlap or leave the text.

    Example:
        >>> segment_input("It rains. Stay in.", by="sentence").values
        ['It rains.', 'Stay in.']
    """
    if isinstance(by, str | re.Pattern):
        spans = find_segments(text, by)
    else:
        spans, baselines = _in_order(by, baselines, len(text))
    if not spans:
        raise ValueError(f"the text has no segment by {by!r}: choose another way to cut it")
    return template_of_spans(text, spans, baselines)


def find_segments(text: str, by: str | re.Pattern[str], within: Span | None = None) -> list[Span]:
    """The spans of a text's segments, in characters; `within` limits them to a part of it."""
    start, stop = within or (0, len(text))
    pattern = PATTERNS.get(by, by) if isinstance(by, str) else by
    try:
        matches = re.finditer(pattern, text[start:stop])
    except re.error as error:
        names = ", ".join(PATTERNS)
        raise ValueError(
            f"by must be one of {names} or a regular expression, got {by!r}: {error}"
        ) from error
    return [(start + m.start(), start + m.end()) for m in matches if m.group()]


def template_of_spans(text: str, spans: Sequence[Span], baselines: Any = None) -> TextTemplateInput:
    """A template whose values are spans of a text; what lies between them is fixed."""
    edges = [0, *(edge for span in spans for edge in span), len(text)]
    between = [text[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True)]

    def template(*values: str) -> str:
        return between[0] + "".join(v + b for v, b in zip(values, between[1:], strict=True))

    return TextTemplateInput(template, [text[a:b] for a, b in spans], baselines=baselines)


def _in_order(spans: Any, baselines: Any, length: int) -> tuple[list[Span], Any]:
    """The spans in the order of the text, each with its baseline."""
    try:
        pairs = [(int(start), int(stop)) for start, stop in spans]
    except (TypeError, ValueError) as error:
        names = ", ".join(PATTERNS)
        raise ValueError(
            f"by must be one of {names}, a regular expression or a list of (start, stop); "
            f"got {spans!r}"
        ) from error
    order = sorted(range(len(pairs)), key=pairs.__getitem__)
    end = 0
    for start, stop in (pairs[i] for i in order):
        if not 0 <= start < stop <= length:
            raise ValueError(f"the span {(start, stop)} is not within the {length} characters")
        if start < end:
            raise ValueError(f"the span {(start, stop)} overlaps the one before it")
        end = stop
    if isinstance(baselines, list) and len(baselines) == len(order):
        baselines = [baselines[i] for i in order]
    return [pairs[i] for i in order], baselines
