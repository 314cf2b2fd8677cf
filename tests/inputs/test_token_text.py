"""The text of tokens, exact and ready to print."""

from __future__ import annotations

import doctest
import importlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, pre_tokenizers

from captum_llm_ext.inputs.token_text import readable_token, token_text


def test_a_token_of_gpt2_is_its_text() -> None:
    assert token_text("ĠFrance") == " France"
    assert readable_token("Ċ") == "\\n"


def test_examples_in_docstrings_run() -> None:
    outcome = doctest.testmod(importlib.import_module("captum_llm_ext.inputs.token_text"))
    assert outcome.attempted
    assert not outcome.failed


@given(st.text(min_size=1))
def test_byte_level_tokens_are_decoded_as_the_tokenizer_encoded_them(text: str) -> None:
    encode = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ((token, _),) = encode.pre_tokenize_str(text)
    assert token_text(token) == text


@given(st.text("abé日 ", min_size=1))
def test_sentencepiece_tokens_are_decoded_as_their_decoder_does(text: str) -> None:
    token = text.replace(" ", "▁")
    assert token_text(token) == decoders.Metaspace(prepend_scheme="never").decode([token])


@pytest.mark.parametrize(
    ("token", "readable"),
    [
        ("ĠFrance", " France"),
        ("▁France", " France"),
        ("ĊĊ", "\\n\\n"),
        ("<0x0A>", "\\n"),
        ("a\tb", "a\\tb"),
        ("Ġ", "␣"),
        ("", ""),
        ("café", "café"),  # text already
        ("ãģ", "ãģ"),  # two of the three bytes of a character
        ("Ġãģ", " ãģ"),
        ("\x1b[31m", "\\x1b[31m"),
        ("\u202eevil", "\\u202eevil"),
    ],
)
def test_readable_token(token: str, readable: str) -> None:
    assert readable_token(token) == readable


@given(st.text())
def test_readable_tokens_are_printable_and_within_the_limit(text: str) -> None:
    assert readable_token(text).isprintable()
    assert len(readable_token(text, 8)) <= 8
