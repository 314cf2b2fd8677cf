"""The tokens of each value, by the characters that each token holds."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from typing import Any

import pytest
import torch

from captum_llm_ext import TextTemplateInput
from tests.inputs.template_cases import (
    VALUE,
    Frame,
    by_gradient,
    by_majority,
    expected_by_gradient,
    filled,
    merging_tokenizer,
    pieces,
    template_of,
    wide_toy,
)
from tests.models.families import tiny_tokenizer
from tests.oracles.cases import assert_close, in_pairs, target_ids

V = VALUE
CASES: dict[str, tuple[Frame, list[str]]] = {
    "whole words": ((V, " lives in", V, " and plays", V), ["Dave", " Palm Coast", " golf"]),
    "space in the template": ((V, " lives in ", V, " and ", V), ["Dave", "Palm Coast", "plays"]),
    "values side by side": ((V, V, V), ["Dave lives", " in Palm Co", "ast and plays golf"]),
    "border inside a word": (("Da", V, "ves in Pa", V), ["ve li", "lm Coast"]),
    "same text twice": ((V, " and", V, " and", V), ["golf", " golf", " golf"]),
    "substring of another value": ((V, ", ", V, ", ", V), ["golf", "golf with friends", "gol"]),
    "substring of the template": (("golf and hiking: ", V, " and golf"), ["golf"]),
    "empty value": ((V, " lives in", V, " and", V), ["Dave", "", " golf"]),
    "all text is one value": ((V,), ["Dave lives in Palm Coast"]),
    "braces in the template": (("{ ", V, " }{{", V, "}"), ["Dave", "Palm Coast"]),
    "braces in the values": ((V, " is ", V), ["{name}", "{} {{0}}"]),
    "bytes of one character": (("日本 ", V, "🙂🙂 ", V, "é"), ["日本語", "éé golf"]),
    "new lines": (("interests:\n", V, "\n\n", V, "\n"), ["golf\nand hiking", " friends"]),
    "one letter each": ((V, V, V, V, V), list("Paris")),
    "what a mark might look like": ((V, " <0> [1] ", V), ["<1>", "\x00 \ue000 [0]"]),
    "private use in a value": ((V, " and ", V), ["golf \U000f0000 \U000f0003", "\U0010fffd"]),
    "private use in the template": (("\U000f0001 ", V, " and \U000f0000", V), ["golf", "Dave"]),
}
TOKENIZERS: dict[str, Callable[[], Any]] = {
    "words": tiny_tokenizer,
    "merging a little": lambda: merging_tokenizer(300),
    "merging a lot": lambda: merging_tokenizer(330),
    "merging everything": lambda: merging_tokenizer(700),
}


def expected(parts: Sequence[tuple[str, int]], tokenizer: Any, n_values: int) -> list[torch.Tensor]:
    """(T, n_values) by each way of deciding the ties."""
    prompt, choices = by_majority(parts, tokenizer)
    assert len(choices) <= 8
    return [
        expected_by_gradient(wide_toy(), prompt, value_of, target_ids(2), n_values)
        for value_of in choices
    ]


def check(inp: Any, tokenizer: Any, truths: Sequence[torch.Tensor]) -> None:
    result = by_gradient(inp, tokenizer, target_ids(2))
    assert result.input_tokens == inp.values
    nearest = min(truths, key=lambda truth: float((result.token_attr - truth).abs().max()))
    assert_close(result.token_attr, nearest)


def test_a_value_has_its_tokens_and_the_template_has_the_others() -> None:
    truths = expected(pieces((V, " lives in", V), ["Dave", " Palm Coast"]), tiny_tokenizer(), 2)
    assert len(truths) == 1
    inp = TextTemplateInput("{} lives in{}", ["Dave", " Palm Coast"])
    check(inp, tiny_tokenizer(), truths)


@in_pairs(
    case=list(CASES),
    tokenizer=list(TOKENIZERS),
    form=["string", "function", "dict", "function of keywords"],
)
def test_each_token_belongs_to_the_value_that_it_mostly_covers(
    case: str, tokenizer: str, form: str
) -> None:
    frame, values = CASES[case]
    has_none = without_token(frame, values, TOKENIZERS[tokenizer]())
    if has_none:
        named = pytest.raises(ValueError, match=f"value.*({'|'.join(map(re.escape, has_none))})")
    truths = expected(pieces(frame, values), TOKENIZERS[tokenizer](), len(values))
    keys = [f"key{i}" for i in range(len(values))]
    inputs = {
        "string": lambda: TextTemplateInput(template_of(frame), list(values)),
        "function": lambda: TextTemplateInput(lambda *texts: filled(frame, texts), list(values)),
        "dict": lambda: TextTemplateInput(
            template_of(frame, keys), dict(zip(keys, values, strict=True))
        ),
        "function of keywords": lambda: TextTemplateInput(
            lambda **texts: filled(frame, [texts[key] for key in keys]),
            dict(zip(keys, values, strict=True)),
        ),
    }
    inp = inputs[form]()
    assert inp.to_model_input() == filled(frame, values)
    with named if has_none else nullcontext():
        check(inp, TOKENIZERS[tokenizer](), truths)


def without_token(frame: Frame, values: Sequence[str], tokenizer: Any) -> set[str]:
    """The values that have no token to themselves; the error names them."""
    _, choices = by_majority(pieces(frame, values), tokenizer)
    filled_in = {i for i, value in enumerate(values) if value}
    return {repr(values[i]) for value_of in choices for i in filled_in - set(value_of.tolist())}


def test_a_token_half_of_the_value_is_the_values() -> None:
    """ " I" with the space in the template: the value would have no token otherwise."""
    tokenizer = merging_tokenizer(300)
    text = "Dave lives in"
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    start, stop = next((a, b) for a, b in offsets if b - a == 2)
    frame = (text[: start + 1], VALUE, text[stop:])
    prompt = torch.tensor(tokenizer.encode(text))
    value_of = torch.full((len(prompt),), -1)
    value_of[offsets.index((start, stop))] = 0
    truth = expected_by_gradient(wide_toy(), prompt, value_of, target_ids(2), 1)
    check(TextTemplateInput(template_of(frame), [text[start + 1]]), tokenizer, [truth])


def test_keys_in_another_order_than_the_template() -> None:
    frame = (VALUE, " lives in", VALUE)
    parts = pieces(frame, ["Dave", " Palm Coast"])
    truths = [truth.flip(1) for truth in expected(parts, tiny_tokenizer(), 2)]
    values = {"place": " Palm Coast", "name": "Dave"}
    check(TextTemplateInput("{name} lives in{place}", values), tiny_tokenizer(), truths)
    numbered = TextTemplateInput("{1} lives in{0}", list(values.values()))
    check(numbered, tiny_tokenizer(), truths)


# --- functions ------------------------------------------------------------------------------------

EXAMPLES = ["'golf' -> Positive", "'hiking' -> Negative", "'golf' -> Negative"]


def few_shot(*examples: str) -> str:
    """As in the notebook: only examples that are not empty are joined."""
    question = "Decide if 'golf' is Positive or Negative"
    subset = [example for example in examples if example]
    if not subset:
        return "[INST] " + question + "[/INST]"
    return "[INST] Here are examples:\n" + " \n".join(subset) + "\n " + question + "[/INST]"


def few_shot_pieces(examples: Sequence[str]) -> list[tuple[str, int]]:
    parts = [("[INST] Here are examples:\n", -1)]
    values = [(example, i) for i, example in enumerate(examples) if example]
    for i, value in enumerate(values):
        parts += [(" \n", -1)] * (i > 0) + [value]
    return [*parts, ("\n Decide if 'golf' is Positive or Negative[/INST]", -1)]


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize(
    "examples",
    [EXAMPLES, [EXAMPLES[0], EXAMPLES[0], EXAMPLES[2]], ["", *EXAMPLES[1:]], EXAMPLES[1:2]],
    ids=["three", "one of them twice", "one empty", "one"],
)
def test_few_shot_prompt_function(examples: list[str], tokenizer: str) -> None:
    parts = few_shot_pieces(examples)
    assert "".join(text for text, _ in parts) == few_shot(*examples)
    truths = expected(parts, TOKENIZERS[tokenizer](), len(examples))
    check(TextTemplateInput(few_shot, list(examples)), TOKENIZERS[tokenizer](), truths)


USABLE: dict[str, tuple[Callable[..., str], Frame, list[str]]] = {
    "join": (lambda *v: ", ".join(v), (V, ", ", V), ["golf", "hiking"]),
    "reversed": (lambda a, b: f"{b} and {a}", (V, " and ", V), ["hiking", "golf"]),
    "strips what has no space": (
        lambda *v: " and ".join(x.strip() for x in v),
        (V, " and ", V),
        ["golf", "hiking"],
    ),
    "choice by a value's text": (
        lambda a, b: f"{a} plays {b}" if b == "golf" else "nothing",
        (V, " plays ", V),
        ["Dave", "golf"],
    ),
    "json": (
        lambda a, b: json.dumps({"name": a, "sport": b}),
        ('{"name": "', V, '", "sport": "', V, '"}'),
        ["Dave", "golf"],
    ),
    "numbered lines": (
        lambda *v: "\n".join(f"{i}. {x}" for i, x in enumerate(v)),
        ("0. ", V, "\n1. ", V),
        ["golf", "hiking"],
    ),
    "sorted": (lambda *v: " ".join(sorted(v)), (V, " ", V), ["hiking", "golf"]),
    "cut to a length": (lambda a, b: f"{a[:6]} {b[:6]}", (V, " ", V), ["golf", "hiking"]),
    "length of a value": (
        lambda a, b: f"{a} has {len(a)} and {b} {len(b)}",
        (V, " has 4 and ", V, " 6"),
        ["golf", "hiking"],
    ),
    "capitals that are there": (
        lambda a, b: f"{a.capitalize()} and {b}",
        (V, " and ", V),
        ["Dave", "golf"],
    ),
    "only known values": (
        lambda *v: " and ".join(x for x in v if x in ("golf", "hiking")),
        (V, " and ", V),
        ["golf", "hiking"],
    ),
}
MUST_WORK = ("join", "reversed", "numbered lines")


@pytest.mark.parametrize("name", USABLE)
def test_a_function_is_read_rightly_or_refused(name: str) -> None:
    """Marks change what a function sees; where that matters, no wrong columns may come out."""
    function, frame, values = USABLE[name]
    order = [1, 0] if name in ("reversed", "sorted") else [0, 1]
    in_place = [values[i] for i in order]
    assert filled(frame, in_place) == function(*values)
    truths = [t[:, order] for t in expected(pieces(frame, in_place), tiny_tokenizer(), 2)]
    inp = TextTemplateInput(function, list(values))
    refused = nullcontext() if name in MUST_WORK else suppress(ValueError)
    with refused:
        check(inp, tiny_tokenizer(), truths)


UNUSABLE: dict[str, tuple[Callable[..., str], str]] = {
    "used twice": (lambda a, b, c: f"{a} {b} {b} {c}", "Palm"),
    "used twice, apart": (lambda a, b, c: f"{b}: {a} {c}, {b}", "Palm"),
    "dropped": (lambda a, b, c: f"{a} and {c}", "Palm"),
    "upper case": (lambda a, b, c: f"{a} {b.upper()} {c}", "Palm"),
    "reversed letters": (lambda a, b, c: f"{a} {b[::-1]} {c}", "Palm"),
    "first half": (lambda a, b, c: f"{a} {b[:2]} {c}", "Palm"),
    "last half": (lambda a, b, c: f"{a} {b[2:]} {c}", "Palm"),
    "one letter replaced": (lambda a, b, c: f"{a} {b.replace('l', 'r')} {c}", "Palm"),
    "dropped, though the template holds its text": (lambda a, b, c: f"{a} Palm {c}", "Palm"),
    "changed for the same text elsewhere": (lambda a, b, c: f"{a} Palm {b.lower()} {c}", "Palm"),
}


@pytest.mark.parametrize("keywords", [False, True])
@pytest.mark.parametrize("name", UNUSABLE)
def test_an_unusable_function_names_the_value(name: str, keywords: bool) -> None:
    function, culprit = UNUSABLE[name]
    values: Any = ["Dave", "Palm", "golf"]
    if keywords:
        values = dict(zip("abc", values, strict=True))
    inp = TextTemplateInput(function, values)
    with pytest.raises(ValueError, match=rf"(?s)(?=.*template).*({culprit}|'b')") as caught:
        by_gradient(inp, tiny_tokenizer(), target_ids(2))
    assert "Dave" not in str(caught.value)  # the others are not to blame


@pytest.mark.parametrize("last", ["golf", " and golf"])
def test_an_empty_value_has_no_attribution(last: str) -> None:
    inp = TextTemplateInput("{} lives{}{}", ["Dave", "", last])
    result = by_gradient(inp, tiny_tokenizer(), target_ids(2))
    assert result.token_attr[:, 1].tolist() == [0, 0]
    assert (result.token_attr[:, [0, 2]].abs() > 1e-4).all()
