"""Prompts as users write them: strings, messages, questions and templates become inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from captum_llm_ext.compat import InterpretableInput
from captum_llm_ext.inputs.chats import CHAT_FEATURES, chat_input
from captum_llm_ext.inputs.questions import qa_input
from captum_llm_ext.inputs.segments import PATTERNS, segment_input
from captum_llm_ext.inputs.templates import TextTemplateInput
from captum_llm_ext.inputs.tokens import TextTokenInput
from captum_llm_ext.registry import did_you_mean

TEXT_FEATURES = ("token", *PATTERNS)


def as_input(
    prompt: Any, tokenizer: Any, context: str | None = None, answers: bool = False
) -> InterpretableInput:
    """The interpretable input of a prompt as `explain` takes it.

    answers: whether the model is a question answering model, which needs a context too.
    """
    if context is not None or (answers and isinstance(prompt, str)):
        return _question(prompt, tokenizer, context, answers)
    if isinstance(prompt, str):
        if not prompt:  # some tokenizers put a token before every text, also before this one
            raise ValueError("expected a prompt of at least one character, got an empty string")
        inp = TextTokenInput(prompt, tokenizer)
        inp.baseline_by_method = True
        return inp
    if isinstance(prompt, InterpretableInput):
        return prompt
    if isinstance(prompt, Sequence) and all(isinstance(message, Mapping) for message in prompt):
        return chat_input(prompt, tokenizer)
    raise TypeError(
        "expected the prompt to be a string, a list of messages with 'role' and 'content', or an "
        f"interpretable input of Captum; got {type(prompt).__name__}"
    )


def _question(
    prompt: Any, tokenizer: Any, context: str | None, answers: bool
) -> InterpretableInput:
    if not answers:
        raise ValueError("a context is for question answering models, which this model is not")
    if not isinstance(prompt, str) or context is None:
        raise ValueError(
            "a question answering model needs a question as the prompt, and the context that "
            "holds the answer, both strings"
        )
    return qa_input(prompt, context, tokenizer)


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
        prompt: a text; `by` says what a feature is: "token", "word", "sentence", "line" or
            "paragraph".
        messages: a chat, for which `by` may be "message" too; `roles` hold the features.
        template: a format string; `values` are its features, `baselines` stand for absent ones.
        context: the text that holds the answer, where the prompt is a question; `by` may then be
            "part" too.
        answers: whether the model is a question answering model, and so needs a context.

    Raises:
        ValueError: not exactly one of prompt, messages and template, or fields that do not fit.
    """
    kinds = {"prompt": prompt, "messages": messages, "template": template}
    present = [name for name, value in kinds.items() if value is not None]
    if len(present) != 1:
        names = " and ".join(present) or "none"
        raise ValueError(f"expected one of {', '.join(kinds)}; got {names}")
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
        raise ValueError(
            f"by must be one of {', '.join(TEXT_FEATURES)}{chats}; got {by!r}"
            + did_you_mean(by, TEXT_FEATURES)
        )
    return segment_input(prompt or "", by)
