"""Requests as the command line and JSON lines give them: the input from fields, checked options."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from captum.attr import InterpretableInput
from torch import nn

from captum_llm_ext.explaining import Layers, Wrapper, as_input, prepare
from captum_llm_ext.gradients.methods import RULES, check_baselines, read_rule
from captum_llm_ext.gradients.wrapper import LLMGradientAttribution
from captum_llm_ext.inputs.chats import CHAT_FEATURES, chat_input
from captum_llm_ext.inputs.questions import qa_input
from captum_llm_ext.inputs.segments import PATTERNS, segment_input
from captum_llm_ext.inputs.templates import TextTemplateInput
from captum_llm_ext.model.random_state import seeded
from captum_llm_ext.perturbations.wrapper import RESERVED, LLMAttribution

TEXT_FEATURES = ("token", *PATTERNS)


def requested_input(
    tokenizer: Any,
    *,
    prompt: str | None = None,
    messages: Sequence[Mapping[str, str]] | None = None,
    template: str | None = None,
    values: list[str] | dict[str, str] | None = None,
    baselines: list[str] | dict[str, str] | None = None,
    context: str | None = None,
    answers: bool = False,
    by: str = "token",
    roles: Sequence[str] = ("user",),
) -> InterpretableInput:
    """The interpretable input of a prompt, of messages, or of a template with its values.

    Args:
        tokenizer: the model's tokenizer.
        prompt: a text, cut into features `by` "token", "word", "sentence", "line" or "paragraph".
        messages: a chat, cut likewise or `by` "message"; features are those of `roles`.
        context: of a prompt that is a question, the text that holds the answer; `by` may then be
            "part" too. answers: whether the model answers questions, and so needs one.
        template: a format string; `values` are its features, and `baselines` stand for them.

    Raises:
        ValueError: not exactly one of prompt, messages and template, or fields that do not fit.
    """
    kinds = {"prompt": prompt, "messages": messages, "template": template}
    given = [name for name, value in kinds.items() if value is not None]
    if len(given) != 1:
        raise ValueError(f"expected one of {', '.join(kinds)}; got {' and '.join(given) or 'none'}")
    if (values is None) != (template is None):
        raise ValueError("a template needs values, and values need a template")
    if template is not None:
        if by != "token":
            raise ValueError(f"the values of a template are its features; by={by!r} has no meaning")
        return TextTemplateInput(template, values, baselines)
    if context is not None and prompt is None:
        raise ValueError("a context belongs to a prompt that is a question")
    if baselines is not None:
        raise ValueError("baselines of the input belong to a template and its values")
    if messages is not None:
        return chat_input(messages, tokenizer, by, roles)
    if by == "token":
        return as_input(prompt, tokenizer, context, answers)
    if context is not None:
        return qa_input(prompt or "", context, tokenizer, by)
    if by not in TEXT_FEATURES:
        chats = " (of a chat: message too)" if by in CHAT_FEATURES else ""
        raise ValueError(f"by must be one of {', '.join(TEXT_FEATURES)}{chats}; got {by!r}")
    return segment_input(prompt or "", by)


def check_options(
    model: nn.Module,
    tokenizer: Any,
    method: str,
    layers: Layers | None,
    options: Mapping[str, Any],
) -> None:
    """Refuse options of `explain` that the method does not take, or that would do nothing.

    Raises:
        ValueError: an unknown method, layer or name, or a value without meaning.
        TypeError: an option that the method does not have; the message lists its own.
    """
    wrapper, rest = prepare(model, tokenizer, method, layers, options)
    shared = _named(wrapper.attribute) - {"inp", "target"}
    own = {name: value for name, value in rest.items() if name not in shared}
    known = _own_options(wrapper)  # of integrated gradients `method` is quadrature in `explain`
    if unknown := sorted(set(own) - known):
        names = ", ".join(sorted(known | shared)).replace("method", "quadrature")
        raise TypeError(f"{method} does not take {', '.join(unknown)}; it takes {names}")
    if isinstance(wrapper, LLMGradientAttribution):
        with seeded():  # of a method that draws at random, a rule is a draw
            rule = read_rule(wrapper.attr_method, own)
        check_baselines(rule, rest.get("baselines"), method)


def _own_options(wrapper: Wrapper) -> set[str]:
    """The options of `attribute` that belong to the wrapped method."""
    if isinstance(wrapper, LLMGradientAttribution):
        method = wrapper.attr_method
        return next(set(names) for kind, (_, names) in RULES.items() if isinstance(method, kind))
    if isinstance(wrapper, LLMAttribution):
        return _named(wrapper.attr_method.attribute) - RESERVED
    return set()


def _named(function: Callable[..., Any]) -> set[str]:
    """The parameters of a function that have a name of their own."""
    parameters = inspect.signature(function).parameters.items()
    return {
        name for name, one in parameters if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL)
    }
