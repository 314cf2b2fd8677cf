"""A chat as an interpretable input: messages or parts of them are features, the template stays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from captum_llm_ext.compat import InterpretableInput
from captum_llm_ext.inputs.segments import PATTERNS, Span, find_segments, template_of_spans
from captum_llm_ext.inputs.templates import value_spans
from captum_llm_ext.inputs.tokens import tokens_in_spans
from captum_llm_ext.model.suitability import check_tokenizer
from captum_llm_ext.registry import did_you_mean

CHAT_FEATURES = ("token", "message", *PATTERNS)


def chat_input(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    by: str = "token",
    roles: Sequence[str] = ("user",),
    baselines: Any = None,
) -> InterpretableInput:
    """A chat whose features are messages, or parts of them, after the tokenizer's chat template.

    Args:
        messages: dicts with "role" and "content", as ``tokenizer.apply_chat_template`` takes them.
            Those of `roles` need a str as their content, which the template must leave as it is.
        tokenizer: a fast tokenizer with a chat template.
        by: what a feature is: "token", "message", "word", "sentence", "line" or "paragraph".
        roles: the roles whose messages hold the features. Tokens of the template and special tokens
            are never features and are never replaced.
        baselines: what stands in place of each absent feature; for tokens, give baselines to
            `attribute` instead. Default: nothing.

    Returns:
        An input for `LLMGradientAttribution` and `LLMAttribution`: a `TextTokenInput` by token, a
        `TextTemplateInput` otherwise.

    Raises:
        ValueError: no chat template, or one that refuses the messages; a role that no message has;
            a message of `roles` that the template changes or leaves out, or that has no text;
            nothing to attribute to.

    Example:
        >>> inp = chat_input([{"role": "user", "content": "Where is Paris?"}], tokenizer)
        >>> inp.values
        ['Where', 'Ġis', 'ĠParis', '?']
    """
    if not isinstance(messages, Sequence):
        raise TypeError(f"expected a list of messages first, got {type(messages).__name__}")
    check_tokenizer(tokenizer)
    if by not in CHAT_FEATURES:
        raise ValueError(
            f"by must be one of {', '.join(CHAT_FEATURES)}; got {by!r}"
            + did_you_mean(by, CHAT_FEATURES)
        )
    text, spans = _rendered(messages, tokenizer, roles)
    if by == "token":
        if baselines is not None:
            raise ValueError("baselines of tokens belong to attribute(), not to the chat")
        return tokens_in_spans(text, spans, tokenizer)
    text, spans = _without_double_start(text, spans, tokenizer)
    if by != "message":
        spans = [part for span in spans for part in find_segments(text, by, span)]
    if not spans:
        raise ValueError(f"no message of {', '.join(roles)} has a feature by {by!r}")
    return template_of_spans(text, spans, baselines)


def _rendered(
    messages: Sequence[Mapping[str, Any]], tokenizer: Any, roles: Sequence[str]
) -> tuple[str, list[Span]]:
    """The chat as text, and the spans of the messages of these roles in it."""
    for message in messages:
        if not (isinstance(message, Mapping) and isinstance(message.get("role"), str)):
            raise ValueError(f"a message must be a dict with a 'role', got {message!r}")
    roles = (roles,) if isinstance(roles, str) else roles
    present = {message["role"] for message in messages}
    missing = sorted(set(roles) - present)
    if missing or not roles:
        raise ValueError(
            f"roles must be among those of the messages; no message has {missing}"
            + "".join(did_you_mean(role, present) for role in missing[:1])
        )
    with_features = [i for i, message in enumerate(messages) if message["role"] in roles]
    for message in (messages[i] for i in with_features):
        if not isinstance(message.get("content"), str):
            raise ValueError(
                "a message that holds features must be a dict with a str as 'content', got "
                f"{message!r}: give it one, or leave its role out of roles"
            )
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the tokenizer has no chat template: pass a plain string as the prompt")

    def render(contents: list[str]) -> str:
        # A template may trim a message, so its outer spaces stay outside the marks.
        whole = list(messages)
        for i, content in zip(with_features, contents, strict=True):
            text = messages[i]["content"]
            whole[i] = {**messages[i], "content": text.replace(text.strip(), content)}
        try:
            return str(
                tokenizer.apply_chat_template(whole, tokenize=False, add_generation_prompt=True)
            )
        except (TemplateError, TypeError) as error:  # what it raises, or cannot do with a content
            raise ValueError(f"the chat template refuses the messages: {error}") from error

    text, spans = value_spans(render, [messages[i]["content"].strip() for i in with_features])
    spans = [(start, stop) for start, stop in spans if start < stop]
    if not spans:
        raise ValueError(f"the messages of {', '.join(roles)} are empty")
    return text, spans


def _without_double_start(text: str, spans: list[Span], tokenizer: Any) -> tuple[str, list[Span]]:
    """Leave out the beginning-of-sequence token if the tokenizer puts one before every text."""
    start = getattr(tokenizer, "bos_token", None)
    first = tokenizer.encode("a")[:1]
    if not start or not text.startswith(start) or first != [tokenizer.bos_token_id]:
        return text, spans
    return text[len(start) :], [(a - len(start), b - len(start)) for a, b in spans]
