"""Mistakes in a template raise a ValueError that names the culprit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from captum.attr import LayerIntegratedGradients

from captum_llm_ext import LayerSaliency, TextTemplateInput, chat_input, segment_input
from tests.inputs.template_cases import chat_tokenizer, keyed
from tests.models.families import tiny_model
from tests.oracles.cases import our_attribution, target_ids
from tests.perturbations.cases import ours

TEXT = "Dave lives in Palm Coast and plays golf"
TEMPLATE = "{} lives in {} and {}"
KEYED = "{name} lives in {place} and {sport}"
VALUES = ["Dave", "Palm Coast", "golf"]


def by_gradient(inp: Any, **kwargs: Any) -> Any:
    model = tiny_model("llama")
    embedding = model.model.embed_tokens
    return our_attribution(
        LayerIntegratedGradients, model, embedding, inp, target=target_ids(1), **kwargs
    )


def by_saliency(inp: Any) -> Any:
    model = tiny_model("llama")
    return our_attribution(
        LayerSaliency, model, model.model.embed_tokens, inp, target=target_ids(1)
    )


def by_ablation(inp: Any) -> Any:
    return ours("feature_ablation", tiny_model("llama"), inp, target=target_ids(1))


WAYS = {"path": by_gradient, "saliency": by_saliency, "ablation": by_ablation}


def test_no_value_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match=r"value|feature|attribute"):
        by_gradient(TextTemplateInput("Dave lives", []))


TEMPLATES: dict[str, tuple[Callable[[], Any], str]] = {
    "dict values with list baselines": (
        lambda: TextTemplateInput(KEYED, keyed(VALUES), ["He", "Tokyo", "hiking"]),
        r"baselines.*dict",
    ),
    "list values with dict baselines": (
        lambda: TextTemplateInput(TEMPLATE, VALUES, keyed(["He", "Tokyo", "hiking"])),
        r"baselines.*list",
    ),
    "dict values with list mask": (
        lambda: TextTemplateInput(KEYED, keyed(VALUES), mask=[0, 1, 1]),
        r"mask.*dict",
    ),
    "dict baselines without a key": (
        lambda: TextTemplateInput(KEYED, keyed(VALUES), {"name": "He", "sport": "hiking"}),
        r"baselines.*place|place.*baselines",
    ),
    "dict mask without a key": (
        lambda: TextTemplateInput(KEYED, keyed(VALUES), mask={"name": 0, "sport": 1}),
        r"mask.*place|place.*mask",
    ),
    "too few baselines": (lambda: TextTemplateInput(TEMPLATE, VALUES, ["He"]), r"baselines.*3.*1"),
    "too many baselines": (
        lambda: TextTemplateInput(TEMPLATE, VALUES, ["He", "a", "b", "c"]),
        r"baselines.*3.*4",
    ),
    "too short a mask": (lambda: TextTemplateInput(TEMPLATE, VALUES, mask=[0, 1]), r"mask.*3.*2"),
    "too long a mask": (
        lambda: TextTemplateInput(TEMPLATE, VALUES, mask=[0, 1, 1, 2]),
        r"mask.*3.*4",
    ),
    "literal braces": (
        lambda: TextTemplateInput('{"name": "{}"} {} {}', VALUES),
        r"template.*(brace|\{\{)",
    ),
    "brace left open": (lambda: TextTemplateInput("{} { {} {}", VALUES), r"template.*(brace|\{\{)"),
    "more places than values": (lambda: TextTemplateInput("{} {} {} {}", VALUES), r"template.*3"),
    "key that no value has": (
        lambda: TextTemplateInput(KEYED + "{city}", keyed(VALUES)),
        r"template.*city",
    ),
    "number as a value": (lambda: TextTemplateInput(TEMPLATE, ["Dave", 5, "golf"]), r"value.*5"),
    "None as a value": (
        lambda: TextTemplateInput(KEYED, keyed(["Dave", "Tokyo", None])),
        r"value.*None",
    ),
    "bytes as a value": (
        lambda: TextTemplateInput(TEMPLATE, ["Dave", b"Tokyo", "golf"]),
        r"value.*b'Tokyo'",
    ),
    "function that returns no text": (
        lambda: TextTemplateInput(lambda *v: list(v), VALUES),
        r"template.*list",
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_that_does_not_fit_is_refused(name: str, way: str) -> None:
    make, culprit = TEMPLATES[name]
    with pytest.raises(ValueError, match=f"(?s){culprit}"):
        WAYS[way](make())


PATHS: dict[str, tuple[Callable[[], Any], str]] = {
    "number as a baseline": (
        lambda: TextTemplateInput(TEMPLATE, VALUES, ["He", 5, "hiking"]),
        r"baseline.*5",
    ),
    "number drawn as a baseline": (
        lambda: TextTemplateInput(TEMPLATE, VALUES, lambda: ["He", "Tokyo", 7]),
        r"baseline.*7",
    ),
    "too few drawn": (lambda: TextTemplateInput(TEMPLATE, VALUES, lambda: ["He"]), r"baselines.*3"),
    "list drawn for a dict": (
        lambda: TextTemplateInput(KEYED, keyed(VALUES), lambda: ["He", "Tokyo", "hiking"]),
        r"baselines.*dict",
    ),
    "drawn without a key": (
        lambda: TextTemplateInput(KEYED, keyed(VALUES), lambda: {"name": "He", "sport": "a"}),
        r"baselines.*place",
    ),
}


@pytest.mark.parametrize("name", PATHS)
def test_baselines_that_do_not_fit_are_refused(name: str) -> None:
    make, culprit = PATHS[name]
    with pytest.raises(ValueError, match=f"(?s){culprit}"):
        by_gradient(make())


@pytest.mark.parametrize("neutral", ["nonsense", 9999])
def test_an_unknown_neutral_baseline_is_refused(neutral: Any) -> None:
    with pytest.raises(ValueError, match=f"baseline.*{neutral}|{neutral}.*baseline"):
        by_gradient(TextTemplateInput(TEMPLATE, VALUES), baselines=neutral)


def test_only_empty_values_are_refused() -> None:
    """Nothing can be attributed to values that have no token."""
    with pytest.raises(ValueError, match=r"value|feature|attribute"):
        by_gradient(TextTemplateInput("Dave{} lives{}", ["", ""]))


# --- segments -------------------------------------------------------------------------------------

SEGMENTS: dict[str, tuple[Callable[[], Any], str]] = {
    "spans that overlap": (
        lambda: segment_input(TEXT, by=[(0, 4), (5, 13), (11, 18)]),
        r"11.*18|5.*13",
    ),
    "spans that overlap, in no order": (
        lambda: segment_input(TEXT, by=[(20, 30), (0, 4), (25, 38)]),
        r"25.*38|20.*30",
    ),
    "span past the end": (lambda: segment_input(TEXT, by=[(0, 4), (30, 400)]), r"30.*400"),
    "span before the start": (lambda: segment_input(TEXT, by=[(-3, 4)]), r"-3.*4"),
    "span backwards": (lambda: segment_input(TEXT, by=[(9, 5)]), r"9.*5"),
    "regex that does not compile": (lambda: segment_input(TEXT, by="(lives"), r"\(lives"),
    "regex that matches nothing": (lambda: segment_input(TEXT, by="zebra"), "zebra"),
    "no span": (lambda: segment_input(TEXT, by=[]), r"span|segment|by"),
    "empty text": (lambda: segment_input("", by="word"), r"text|word|segment"),
    "by that is a number": (lambda: segment_input(TEXT, by=3), r"by.*3"),
    "too few baselines": (
        lambda: by_gradient(segment_input("Dave lives in", by="word", baselines=["He"])),
        r"baselines.*3",
    ),
    "text that is a number": (lambda: segment_input(5, by="word"), r"5|int"),
}


@pytest.mark.parametrize("name", SEGMENTS)
def test_segments_that_cannot_be_are_refused(name: str) -> None:
    make, culprit = SEGMENTS[name]
    kinds = (ValueError, TypeError) if name.endswith("is a number") else ValueError
    with pytest.raises(kinds, match=f"(?s){culprit}"):
        make()


# --- chats ----------------------------------------------------------------------------------------

MESSAGES = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Who is Dave?"}]


@pytest.mark.parametrize("by", ["token", "message", "sentence", "word"])
@pytest.mark.parametrize("roles", [("critic",), ("user", "critic"), ("assistant",)])
def test_an_unknown_role_is_named(roles: tuple[str, ...], by: str) -> None:
    with pytest.raises(ValueError, match=roles[-1]):
        chat_input(MESSAGES, chat_tokenizer(), by=by, roles=roles)


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        ({"by": "letter"}, "letter"),
        ({"by": "message", "roles": ()}, "role"),
        ({"by": "message", "baselines": ["a", "b"]}, r"baselines.*1"),
    ],
    ids=["by", "no role", "baselines"],
)
def test_other_mistakes_in_a_chat(change: Any, culprit: str) -> None:
    with pytest.raises(ValueError, match=culprit):
        by_gradient(chat_input(MESSAGES, chat_tokenizer(), **change), tokenizer=chat_tokenizer())


@pytest.mark.parametrize("by", ["token", "message"])
@pytest.mark.parametrize(
    ("message", "culprit"),
    [
        ({"role": "user", "content": None}, "content|None"),
        ({"role": "user", "content": ""}, "empty|content"),
        ({"role": "user", "content": " \n"}, "empty|content"),
        ({"content": "Who is Dave?"}, "role"),
    ],
    ids=["None", "empty", "spaces", "no role"],
)
def test_a_message_without_content_or_role(message: Any, culprit: str, by: str) -> None:
    with pytest.raises(ValueError, match=culprit):
        chat_input([message], chat_tokenizer(), by=by)
