"""`chat_input` with whole messages or their segments as features."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch

from captum_llm_ext import TextTemplateInput, chat_input
from tests.inputs.template_cases import (
    by_gradient,
    by_majority,
    chat_pieces,
    chat_tokenizer,
    expected_by_gradient,
    wide_toy,
)
from tests.models.families import CausalToy, tiny_tokenizer
from tests.oracles.cases import assert_close, in_pairs, target_ids
from tests.perturbations.cases import ablation, game, ours, rows


def test_words_of_messages() -> None:
    messages = [{"role": "user", "content": "Dave plays golf"}]
    inp = chat_input(messages, chat_tokenizer(), by="word")
    assert [value.strip() for value in inp.values] == ["Dave", "plays", "golf"]


MESSAGES = [
    {"role": "system", "content": "Be kind. Use {braces}."},
    {"role": "user", "content": "Dave lives in Palm Coast.\nHe plays golf."},
    {"role": "assistant", "content": "golf"},
    {"role": "user", "content": "golf"},
    {"role": "user", "content": "user"},
]
ROLES: list[tuple[str, ...]] = [
    ("user",),
    ("system",),
    ("assistant",),
    ("system", "user"),
    ("user", "assistant", "system"),
]
SEGMENTS: dict[str, list[str]] = {  # of the user's messages
    "message": ["Dave lives in Palm Coast.\nHe plays golf.", "golf", "user"],
    "line": ["Dave lives in Palm Coast.", "He plays golf.", "golf", "user"],
    "sentence": ["Dave lives in Palm Coast.", "He plays golf.", "golf", "user"],
}


def rendered(tokenizer: Any) -> str:
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)
    return text


def test_the_oracle_renders_as_the_template_does() -> None:
    text = "".join(part for part, _ in chat_pieces(MESSAGES, ()))
    assert text == rendered(chat_tokenizer())


@in_pairs(by=["message", "sentence", "word", "line"], adds=[True, False], writes=[True, False])
def test_the_chat_is_whole_and_begins_once(by: str, adds: bool, writes: bool) -> None:
    tokenizer = chat_tokenizer(adds, writes)
    inp = chat_input(MESSAGES, tokenizer, by=by)
    assert isinstance(inp, TextTemplateInput)
    ids = tokenizer.encode(inp.to_model_input())
    expected = tokenizer.encode(rendered(tokenizer), add_special_tokens=False)
    begins = int(adds or writes)
    assert ids.count(tokenizer.bos_token_id) == begins
    assert ids[begins:] == expected[int(writes) :]


@pytest.mark.parametrize("roles", ROLES, ids="-".join)
def test_each_message_of_the_roles_is_a_feature(roles: tuple[str, ...]) -> None:
    inp = chat_input(MESSAGES, chat_tokenizer(), by="message", roles=roles)
    assert inp.values == [m["content"] for m in MESSAGES if m["role"] in roles]
    prompt, (value_of,) = by_majority(chat_pieces(MESSAGES, roles), chat_tokenizer(False))
    expected = expected_by_gradient(wide_toy(), prompt, value_of, target_ids(2), len(inp.values))
    result = by_gradient(inp, chat_tokenizer(), target_ids(2))
    assert result.input_tokens == inp.values
    assert_close(result.token_attr, expected)


@pytest.mark.parametrize("by", SEGMENTS)
def test_segments_of_messages(by: str) -> None:
    inp = chat_input(MESSAGES, chat_tokenizer(), by=by)
    assert [value.strip() for value in inp.values] == SEGMENTS[by]


@pytest.mark.parametrize("by", ["message", "sentence"])
def test_feature_ablation_of_a_chat(by: str) -> None:
    inp = chat_input(MESSAGES, chat_tokenizer(), by=by)
    texts = SEGMENTS[by]

    def prompt_of(present: frozenset[int]) -> list[int]:
        parts = chat_pieces(MESSAGES, ("user",))
        text, position = "".join(part for part, _ in parts), 0
        for i, value in enumerate(texts):
            start = text.index(value, position)
            if value in ("golf", "user"):  # the message, not the role's name
                start = text.index(f"<|user|>\n{value}</s>", position) + len("<|user|>\n")
            keep = value if i in present else ""
            text = text[:start] + keep + text[start + len(value) :]
            position = start + len(keep)
        return list(chat_tokenizer(False).encode(text))

    target, model = target_ids(1), CausalToy()
    expected = ablation(game(model, prompt_of, target), len(texts))
    result = ours("feature_ablation", model, inp, target=target, tokenizer=chat_tokenizer())
    assert_close(rows(result), expected)


def test_baselines_of_messages() -> None:
    messages = MESSAGES[:2]
    inp = chat_input(
        messages, chat_tokenizer(), by="message", roles=("system", "user"), baselines=["{}", "b"]
    )
    changed = [{**m, "content": c} for m, c in zip(messages, ["{}", "b"], strict=True)]
    expected = "".join(part for part, _ in chat_pieces(changed, ()))
    absent = inp.to_model_input(torch.zeros(1, 2))
    assert tiny_tokenizer().encode(absent)[1:] == chat_tokenizer(False).encode(expected)[1:]


@pytest.mark.parametrize("by", ["message", "sentence", "line", "word"])
def test_one_message_like_its_surroundings(by: str) -> None:
    """The text of a message also stands in the template and in other messages."""
    messages = [
        {"role": "system", "content": "assistant"},
        {"role": "user", "content": "assistant"},
    ]
    inp = chat_input(messages, chat_tokenizer(), by=by)
    assert inp.values == ["assistant"]
    prompt, (value_of,) = by_majority(chat_pieces(messages, ("user",)), chat_tokenizer(False))
    expected = expected_by_gradient(wide_toy(), prompt, value_of, target_ids(2), 1)
    result = by_gradient(inp, chat_tokenizer(), target_ids(2))
    assert_close(result.token_attr, expected)


# As of thinking models: an earlier answer loses its thoughts, and calls of tools have no content.
THINKING = (
    "{% for m in messages %}{% set c = m.content or '' %}"
    "{% if m.role == 'assistant' %}{% set c = c.split('</think>')[-1].strip() %}{% endif %}"
    "{% if m.role == 'critic' %}{{ raise_exception('critics are not heard') }}{% endif %}"
    "<|{{ m.role }}|>\n{{ c }}"
    "{% for t in m.tool_calls or [] %}[{{ t.function.name }}]{% endfor %}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
THOUGHTS = [
    {"role": "user", "content": "Where is Paris?"},
    {"role": "assistant", "content": "<think>\nOf Paris.\n</think>\n\nIn France."},
    {"role": "user", "content": "And Tokyo?"},
]
CALL = [
    {"role": "user", "content": "Where is Paris?"},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "find"}}]},
    {"role": "assistant", "tool_calls": [{"function": {"name": "look"}}]},
    {"role": "tool", "content": "In France."},
]


def thinking_tokenizer() -> Any:
    tokenizer = deepcopy(chat_tokenizer())
    tokenizer.chat_template = THINKING
    return tokenizer


@pytest.mark.parametrize("by", ["token", "message", "word"])
@pytest.mark.parametrize("messages", [THOUGHTS, CALL])
def test_only_messages_that_hold_features_stand_as_they_are(messages: Any, by: str) -> None:
    tokenizer = thinking_tokenizer()
    inp = chat_input(messages, tokenizer, by=by)
    texts = [m["content"] for m in messages if m["role"] == "user"]
    joined = "" if by == "message" else "".join(inp.values).replace("Ġ", " ")
    assert inp.values == texts or joined.replace(" ", "") == "".join(texts).replace(" ", "")
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = inp.to_model_input()
    ids = tokenizer.encode(ids) if isinstance(ids, str) else ids[0].tolist()
    expected = tokenizer.encode(text, add_special_tokens=False)
    assert ids[-len(expected) :] == expected


def test_messages_that_hold_features_are_not_changed() -> None:
    tokenizer = thinking_tokenizer()
    with pytest.raises(ValueError, match="the template leaves out value 1, '<think>"):
        chat_input(THOUGHTS, tokenizer, roles=("user", "assistant"))
    with pytest.raises(ValueError, match="leave its role out of roles"):
        chat_input(CALL, tokenizer, roles=("user", "assistant"))


def test_what_a_template_refuses() -> None:
    tokenizer = thinking_tokenizer()
    with pytest.raises(ValueError, match="refuses the messages: critics are not heard"):
        chat_input([*THOUGHTS, {"role": "critic", "content": "No."}], tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ '<' + m.content }}{% endfor %}"
    with pytest.raises(ValueError, match="refuses the messages: can only concatenate str"):
        chat_input([*THOUGHTS[:1], {"role": "tool", "content": 3}], tokenizer)


def test_tokens_are_still_the_default() -> None:
    inp = chat_input(MESSAGES[:2], chat_tokenizer())
    expected = tiny_tokenizer().tokenize(MESSAGES[1]["content"])
    assert inp.values == expected
