"""Names made distinct, and layer names made short."""

from __future__ import annotations

import doctest
import importlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from captum_llm_ext.display import distinct_names, short_layer_names


def test_a_repeated_token_gets_a_number():
    assert distinct_names(["the", "cat", "the"]) == ["the", "cat", "the (2)"]


def test_examples_in_docstrings_run():
    outcome = doctest.testmod(importlib.import_module("captum_llm_ext.display.names"))
    assert outcome.attempted
    assert not outcome.failed


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
