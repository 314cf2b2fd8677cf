"""Which tokens form a word."""

from __future__ import annotations

import doctest
import importlib

import pytest

from captum_llm_ext.display import word_spans, word_texts
from captum_llm_ext.inputs.token_text import token_texts
from tests.models.families import tiny_tokenizer


def words(*tokens: str) -> list[str]:
    texts = word_texts(tokens)
    return ["".join(texts[start:stop]) for start, stop in word_spans(texts)]


def test_sub_words_form_a_word():
    assert words("Ġun", "believ", "able", "Ġnews") == [" unbelievable", " news"]


def test_examples_in_docstrings_run():
    assert not doctest.testmod(importlib.import_module("captum_llm_ext.display.words")).failed


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["The", "Ġun", "believ", "able", "Ġcat"], ["The", " unbelievable", " cat"]),
        (["▁un", "believ", "able", "▁cat"], [" unbelievable", " cat"]),
        (["[CLS]", "un", "##believ", "##able", ","], [" [CLS]", " unbelievable", " ,"]),
        (["#", "##", "ĠTitle"], ["#", "##", " Title"]),  # a heading, not WordPiece
        (["Ġdon", "'", "t", "Ġstop", "'", "Ġit"], [" don't", " stop", "'", " it"]),
        (["Ġwell", "-", "known", ",", "Ġ1", "0", "."], [" well", "-", "known", ",", " 10", "."]),
        (["a", "Ċ", "b", "ĊĊ", "c", "<0x0A>", "d"], ["a", "\n", "b", "\n\n", "c", "\n", "d"]),
        (["<|im_start|>", "user", "Ċ", "Hi"], ["<|im_start|>", "user", "\n", "Hi"]),
        (["Ġx", "_", "1", "Ġ", "Ġ", "y"], [" x_1", " ", " y"]),
        (["日本", "語", "の", "cat", "s"], ["日本", "語", "の", "cats"]),
        (["한국", "어", " 책"], ["한국어", " 책"]),
        (["हि", "न्", "दी"], ["हिन्दी"]),
        (["مر", "حبا", " بك"], ["مرحبا", " بك"]),
        (["ĠHi", "ðŁ", "ĺ", "Ģ", "Ġyou"], [" Hi", "😀", " you"]),
        (["ĠðŁ", "ĺ", "Ģ", "x"], [" 😀", "x"]),
        (["caf", "Ã", "©", "s"], ["cafés"]),
        (["<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "!"], ["😀", "!"]),
        ([""], [""]),
        (["a"], ["a"]),
    ],
)
def test_words(tokens, expected):
    assert words(*tokens) == expected


@pytest.mark.parametrize("text", ["Hi 😀😀 日本語 — naïve", "Zoë’s “résumé” 🇫🇷\n\nمرحبا بك"])
@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.real_model)])
def test_texts_of_tokens_make_the_text_again(text, real, request):
    tokenizer = request.getfixturevalue("demo_model")[1] if real else tiny_tokenizer()
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert "".join(token_texts(tokens)) == text
    assert "".join(words(*tokens)) == text
