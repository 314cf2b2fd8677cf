"""Interpretable inputs: tokens, templates, segments, chats, and what the wrappers need of them."""

from captum_llm_ext.inputs.chats import chat_input
from captum_llm_ext.inputs.features import (
    Features,
    baseline_tokens,
    places_kept,
    prompt_ids,
    read_features,
)
from captum_llm_ext.inputs.questions import qa_input
from captum_llm_ext.inputs.segments import segment_input
from captum_llm_ext.inputs.templates import TextTemplateInput, check_template, drawn
from captum_llm_ext.inputs.tokens import TextTokenInput, attributed_with, with_baselines

__all__ = [
    "Features",
    "TextTemplateInput",
    "TextTokenInput",
    "attributed_with",
    "baseline_tokens",
    "chat_input",
    "check_template",
    "drawn",
    "places_kept",
    "prompt_ids",
    "qa_input",
    "read_features",
    "segment_input",
    "with_baselines",
]
