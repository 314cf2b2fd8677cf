"""A question and its context as one interpretable input, for extractive question answering."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from captum_llm_ext.compat import InterpretableInput
from captum_llm_ext.inputs.segments import PATTERNS, find_segments, template_of_spans
from captum_llm_ext.inputs.tokens import token_input
from captum_llm_ext.model.suitability import check_tokenizer

PARTS = ("question", "context")
QA_FEATURES = ("token", "part", *PATTERNS)


def qa_input(
    question: str,
    context: str,
    tokenizer: Any,
    by: str = "token",
    parts: Sequence[str] = PARTS,
    baselines: Any = None,
) -> InterpretableInput:
    """A question and its context, as the tokenizer pairs them.

    Args:
        question: the question.
        context: the text that the answer is part of.
        tokenizer: a fast tokenizer with a separator, such as BERT's or RoBERTa's.
        by: what a feature is: "token", "part" (question and context are one feature each), "word",
            "sentence", "line" or "paragraph".
        parts: which of "question" and "context" hold the features. Special tokens are never
            features.
        baselines: what stands in place of each absent feature; for tokens, give baselines to
            `attribute` instead. Default: nothing. Perturbation methods put mask tokens in place of
            a baseline of another length, since the scores are of positions.

    Returns:
        An input for `LLMGradientAttribution` and `LLMAttribution`: a `TextTokenInput` by token, a
        `TextTemplateInput` otherwise.

    Raises:
        ValueError: an empty question or context, an unknown part or feature, or a tokenizer that
            does not pair texts with a separator.

    Example:
        >>> inp = qa_input(
        ...     "Who plays golf?", "Dave plays golf.", tokenizer, by="part"
        ... )  # doctest: +SKIP
        >>> inp.values  # doctest: +SKIP
        ['Who plays golf?', 'Dave plays golf.']
    """
    check_tokenizer(tokenizer)
    if by not in QA_FEATURES:
        raise ValueError(f"by must be one of {', '.join(QA_FEATURES)}; got {by!r}")
    parts = (parts,) if isinstance(parts, str) else parts
    if not parts or not set(parts) <= set(PARTS):
        raise ValueError(f"parts must be of {' and '.join(PARTS)}, got {parts!r}")
    if not (question.strip() and context.strip()):
        raise ValueError("expected a question and a context of at least one character each")
    ids, part_of = _paired(question, context, tokenizer)
    if by == "token":
        if baselines is not None:
            raise ValueError("baselines of tokens belong to attribute(), not to the question")
        inside = [part is not None and PARTS[part] in parts for part in part_of]
        return token_input(ids, inside, tokenizer)
    text = question + _separator(ids, part_of, tokenizer) + context
    if list(tokenizer.encode(text)) != ids:
        raise ValueError(
            f"{type(tokenizer).__name__} does not pair two texts as it reads a text with its "
            'separator: use by="token"'
        )
    spans = {"question": (0, len(question)), "context": (len(text) - len(context), len(text))}
    features = [spans[part] for part in PARTS if part in parts]
    if by != "part":
        features = [segment for span in features for segment in find_segments(text, by, span)]
    return template_of_spans(text, features, baselines)


def _paired(question: str, context: str, tokenizer: Any) -> tuple[list[int], list[int | None]]:
    """The ids of both texts, and the text of each: 0, 1, or None for a special token."""
    encoded = tokenizer(question, context)
    try:
        part_of = list(encoded.sequence_ids())
    except ValueError as error:
        raise ValueError(
            f"{type(tokenizer).__name__} cannot tell the question's tokens from the context's: "
            "load the fast tokenizer (use_fast=True)"
        ) from error
    return [int(i) for i in encoded["input_ids"]], part_of


def _separator(ids: Sequence[int], part_of: Sequence[int | None], tokenizer: Any) -> str:
    """The special tokens that the tokenizer puts between question and context."""
    last = max(i for i, part in enumerate(part_of) if part == 0)
    between = ids[last + 1 : part_of.index(1)]
    return "".join(tokenizer.convert_ids_to_tokens(list(between)))
