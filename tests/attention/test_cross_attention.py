"""The attention of a decoder to the encoder's tokens equals the model's own output."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from captum_llm_ext import LLMAttentionAttribution, segment_input
from captum_llm_ext.attention.hooks import configs
from tests.models.encoder_decoder import (
    FAMILIES,
    decoder_ids,
    fresh_seq2seq,
    target_of,
    tiny_seq2seq,
)
from tests.models.families import tiny_tokenizer
from tests.oracles.cases import assert_close, prompt_input

N_PROMPT, N_LAYERS, N_HEADS = 8, 3, 4
MODULES = {
    "t5": "decoder.block.{}.layer.1.EncDecAttention",
    "bart": "model.decoder.layers.{}.encoder_attn",
    "marian": "model.decoder.layers.{}.encoder_attn",
}


def read(family: str, inp: Any = None, count: int = 3, how: Any = None, **settings: Any) -> Any:
    wrapper = LLMAttentionAttribution(tiny_seq2seq(family), tiny_tokenizer(), **settings)
    return wrapper.attribute(inp or prompt_input(), target=target_of(count), **(how or {}))


def models_own(family: str, ids: Tensor, count: int) -> Tensor:
    """(n_layers, n_heads, n_output, n_input) of an eager copy of the model."""
    model: Any = fresh_seq2seq(family)
    model.set_attn_implementation("eager")
    fed = decoder_ids(model, target_of(count), count - 1)
    with torch.no_grad():
        output = model(input_ids=ids, decoder_input_ids=fed, output_attentions=True)
    return torch.stack([layer[0] for layer in output.cross_attentions])


def state(model: Any) -> Any:
    hooks = [len(module._forward_hooks) for module in model.modules()]
    return hooks, [config._attn_implementation for config in configs(model)]


def test_one_translation() -> None:
    result = read("marian")
    expected = models_own("marian", prompt_input().inp_tensor, 3)
    assert_close(result.token_attr, expected.mean((0, 1)), 1e-6)
    assert_close(result.token_attr.sum(-1), torch.ones(3), 1e-5)


@pytest.mark.parametrize("count", [1, 3, N_PROMPT])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_models_own_output(family: str, count: int) -> None:
    inp = prompt_input()
    result = read(family, inp, count)
    expected = models_own(family, inp.inp_tensor, count)
    assert expected.shape == (N_LAYERS, N_HEADS, count, N_PROMPT)
    assert_close(result.attention, expected, 1e-6)
    assert_close(result.token_attr, expected.mean((0, 1)), 1e-6)
    assert_close(result.seq_attr, expected.mean((0, 1, 2)), 1e-6)
    assert (result.attention.sum(-1) - 1).abs().max() < 1e-5
    assert result.layer_names == [MODULES[family].format(i) for i in range(N_LAYERS)]


@pytest.mark.parametrize("family", ["bart", "marian"])
def test_equals_queries_times_keys(family: str) -> None:
    """Computed from the weights, without the attention of the model itself."""
    model: Any = tiny_seq2seq(family)
    inp, target = prompt_input(), target_of(3)
    layer = model.get_submodule(MODULES[family].format(1))
    outputs: dict[str, Tensor] = {}
    hooks = [
        getattr(layer, name).register_forward_hook(
            lambda module, args, output, name=name: outputs.update({name: output[0]})
        )
        for name in ("q_proj", "k_proj")
    ]
    with torch.no_grad():
        model(input_ids=inp.inp_tensor, decoder_input_ids=decoder_ids(model, target, 2))
    for hook in hooks:
        hook.remove()
    queries, keys = (outputs[name].unflatten(-1, (N_HEADS, -1)) for name in ("q_proj", "k_proj"))
    products = torch.einsum("qhd,khd->hqk", queries, keys) / queries.size(-1) ** 0.5
    assert_close(read(family).attention[1], products.softmax(-1), 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_chosen_layers_and_heads(family: str) -> None:
    whole = read(family)
    name = MODULES[family].format(2)
    block = name.rsplit(".layer.", 1)[0] if family == "t5" else name.rsplit(".", 1)[0]
    for layers in (name, 2, block, [2]):
        result = read(family, layers=layers, heads=[3, 1])
        assert result.layer_names == [name]
        assert torch.equal(result.attention, whole.attention[[2]][:, [3, 1]])


def test_the_largest_head_and_layer() -> None:
    whole = read("t5")
    assert_close(read("t5", reduction="max").token_attr, whole.attention.amax((0, 1)))


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_to_a_part_is_the_sum_over_its_tokens(family: str) -> None:
    text = "Dave plays golf. The capital of France is Paris."
    ids = tiny_tokenizer().encode(text, return_tensors="pt")
    result = read(family, segment_input(text))
    expected = models_own(family, ids, 3)
    first = len(tiny_tokenizer().encode("Dave plays golf."))
    assert_close(result.attention[..., 0], expected[..., 1:first].sum(-1), 1e-5)
    assert_close(result.attention[..., 1], expected[..., first + 1 :].sum(-1), 1e-5)


def test_the_model_is_as_it_was() -> None:
    model = tiny_seq2seq("bart")
    ids = prompt_input().inp_tensor
    model(input_ids=ids, decoder_input_ids=ids, output_attentions=True)  # leaves its own hooks
    before = state(model)
    read("bart")
    assert state(model) == before


@pytest.mark.parametrize("reduction", ["rollout", "value_norm"])
def test_reductions_of_one_stack_alone(reduction: str) -> None:
    with pytest.raises(ValueError, match="not defined for the attention of a decoder"):
        read("t5", reduction=reduction)


@pytest.mark.parametrize("name", ["include_generated", "include_prompt_attention"])
def test_what_cross_attention_does_not_have(name: str) -> None:
    with pytest.raises(ValueError, match="leave out include_generated"):
        read("t5", how={name: True})


@pytest.mark.parametrize("layers", ["encoder.block.0", "decoder.block.0.layer.0", 3])
def test_a_layer_without_cross_attention(layers: Any) -> None:
    with pytest.raises(ValueError, match=r"holds no attention|0…2"):
        read("t5", layers=layers)


def test_a_head_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="heads must be in 0…3"):
        read("t5", heads=4)
