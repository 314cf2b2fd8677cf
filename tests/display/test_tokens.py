"""Tokens and layer names as people read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, pre_tokenizers

from captum_llm_ext.display import distinct_names, readable_token, short_layer_names, token_text


@given(st.text(min_size=1))
def test_byte_level_tokens_are_decoded_as_the_tokenizer_encoded_them(text):
    encode = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ((token, _),) = encode.pre_tokenize_str(text)
    assert token_text(token) == text


@given(st.text("abé日 ", min_size=1))
def test_sentencepiece_tokens_are_decoded_as_their_decoder_does(text):
    token = text.replace(" ", "▁")
    assert token_text(token) == decoders.Metaspace(prepend_scheme="never").decode([token])


@pytest.mark.parametrize(
    ("token", "shown"),
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
def test_readable_token(token, shown):
    assert readable_token(token) == shown


@given(st.text())
def test_readable_tokens_are_printable_and_as_short_as_asked_for(text):
    assert readable_token(text).isprintable()
    assert len(readable_token(text, 8)) <= 8


@given(st.lists(st.sampled_from(["a", "b", "a (2)", "a (3)", "a (2) (2)"])))
def test_distinct_names_lose_nothing_and_keep_first_names(names):
    distinct = distinct_names(names)
    assert len(distinct) == len(names) == len(set(distinct))
    for name in set(names):
        assert distinct[names.index(name)] == name


@pytest.mark.parametrize(
    ("names", "shorts"),
    [
        (["model.layers.15.self_attn.q_proj", "model.layers.15.mlp"], ["15 q_proj", "15 mlp"]),
        (["model.embed_tokens", "model.layers.0"], ["embed_tokens", "block 0"]),
        (["h.3.attn.c_proj", "h.3.mlp.c_proj"], ["3 attn.c_proj", "3 mlp.c_proj"]),
        (["vision.layers.0", "text.layers.0"], ["vision.layers.0", "text.layers.0"]),
        (["lm_head"], ["lm_head"]),
        ([], []),
    ],
)
def test_short_layer_names(names, shorts):
    assert short_layer_names(names) == shorts
