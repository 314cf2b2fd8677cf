"""Attention weights equal the formula's, for every family, layer and head, over all keys."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_llm_ext import (
    LLMAttentionAttribution,
    LLMAttributionResult,
    LLMLayerAttributionResult,
    TextTemplateInput,
    chat_input,
    segment_input,
)
from tests.models.families import FAMILIES, PROMPT, tiny_model, tiny_tokenizer
from tests.oracles.attention import (
    ALL_FAMILIES,
    KINDS,
    eager_weights,
    family_model,
    skip_before_its_first_version,
    weights_by_hand,
)
from tests.oracles.cases import prompt_input, target_ids

COUNT = 4
GIVING = [name for name in ALL_FAMILIES if name != "mamba"]


def read(model: nn.Module, inp: Any = None, /, count: int = COUNT, **settings: Any) -> Any:
    options = {name: settings.pop(name) for name in list(settings) if name.startswith("include")}
    wrapper = LLMAttentionAttribution(model, tiny_tokenizer(), **settings)
    return wrapper.attribute(inp or prompt_input(), target=target_ids(count), **options)


def fed(inp: Any = None, count: int = COUNT) -> Tensor:
    """The ids that the model is fed: the prompt, and the target without its last token."""
    return torch.cat([(inp or prompt_input()).inp_tensor[0], target_ids(count)[:-1]])


def near(values: Tensor, expected: Tensor) -> bool:
    return values.shape == expected.shape and bool((values - expected).abs().max() <= 1e-5)


# --- the weights ---------------------------------------------------------------------------------


def test_one_target_token() -> None:
    """Its row is the softmax over the prompt, at the last token of the prompt."""
    model = tiny_model("llama")
    result = read(model, count=1)
    by_head = weights_by_hand(model, "llama", 0, fed(count=1))[:, -1]
    assert near(result.attention[0, :, 0], by_head)
    assert near(result.layer_token_attr[0, 0], by_head.mean(0))
    assert near(result.token_attr.sum(-1), torch.ones(1))


@pytest.mark.parametrize("family", KINDS)
def test_weights_are_the_softmax_of_queries_and_keys(family: str) -> None:
    skip_before_its_first_version(family)
    model = tiny_model(family)
    result = read(model, include_generated=True)
    for layer in range(4):
        expected = weights_by_hand(model, family, layer, fed())[:, -COUNT:]
        assert near(result.attention[layer, :, :, :-1], expected), layer
        assert expected.std() > 0.05, "attention is uniform: this case tests nothing"


@pytest.mark.parametrize("family", GIVING)
def test_weights_equal_those_of_transformers(family: str) -> None:
    skip_before_its_first_version(family)
    model = family_model(family)
    expected = eager_weights(model, fed())
    result = read(model, include_generated=True, include_prompt_attention=True)
    n_prompt = len(fed()) - COUNT + 1
    assert near(result.attention[..., :-1], expected[:, :, -COUNT:])
    assert near(result.prompt_attention, expected[:, :, :n_prompt, :n_prompt])
    assert result.prompt_tokens == prompt_input().values


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_sum_to_one_and_are_zero_on_the_future(family: str) -> None:
    result = read(tiny_model(family), include_generated=True, include_prompt_attention=True)
    n_prompt = len(result.prompt_tokens)
    assert result.attention.shape == (4, 4, COUNT, n_prompt + COUNT)
    assert (result.attention.sum(-1) - 1).abs().max() < 1e-6
    assert result.sink_attention.abs().max() < 1e-6
    assert (result.prompt_attention.sum(-1) - 1).abs().max() < 1e-6
    for token in range(COUNT):  # from the target token itself on
        assert (result.attention[:, :, token, n_prompt + token :] == 0).all()
    assert (result.prompt_attention.triu(1) == 0).all()


def test_a_sliding_window_ends_what_is_seen() -> None:
    result = read(tiny_model("gemma3"), include_prompt_attention=True)
    for layer, attention in enumerate(result.prompt_attention):
        beyond = attention.tril(-4)  # the window holds four positions
        assert (beyond == 0).all() == (layer % 2 == 0)


def test_sinks_take_what_the_tokens_do_not() -> None:
    """A head's sink raised by 1 has e times the odds against the tokens, in the first layer."""
    model = ALL_FAMILIES["gpt_oss"]()
    sinks = model.model.layers[0].self_attn.sinks
    before = read(model, include_generated=True).sink_attention[0]
    with torch.no_grad():
        sinks.add_(1.0)
    after = read(model, include_generated=True).sink_attention[0]
    assert (after - torch.e * before / (1 - before + torch.e * before)).abs().max() < 1e-5
    assert before.max() > 0.1
    with torch.no_grad():
        sinks.fill_(-1e4)
    assert (read(model, include_generated=True).attention[0].sum(-1) - 1).abs().max() < 1e-6


def test_the_target_token_itself_and_later_ones_do_not_matter() -> None:
    long, short = read(tiny_model("llama"), count=5), read(tiny_model("llama"), count=2)
    assert near(long.attention[:, :, :2], short.attention)
    other = LLMAttentionAttribution(tiny_model("llama"), tiny_tokenizer()).attribute(
        prompt_input(), target=torch.tensor([7])
    )
    assert near(other.attention, short.attention[:, :, :1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_as_float32(dtype: torch.dtype) -> None:
    model = tiny_model("llama", fresh=True)
    expected = read(model)
    result = read(model.to(dtype), include_generated=True)
    assert result.attention.dtype == result.token_attr.dtype == torch.float32
    assert (result.attention.sum(-1) - 1).abs().max() < 0.01
    assert (result.token_attr[:, : expected.token_attr.size(1)] - expected.token_attr).mean() < 0.05


# --- layers and heads ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "rows"),
    [
        (1, [1]),
        (-1, [3]),
        ([2, 0], [0, 2]),
        ("model.layers.1", [1]),
        ("model.layers.1.self_attn", [1]),
        ("self_attn", [0, 1, 2, 3]),
        ("model.layers.*", [0, 1, 2, 3]),
        ("model.layers.[13].self_attn", [1, 3]),
        (["model.layers.3", 1, "model.layers.1.self_attn"], [1, 3]),
    ],
)
def test_layers_by_name_pattern_and_index(layers: Any, rows: list[int]) -> None:
    model = tiny_model("llama")
    every, chosen = read(model), read(model, layers=layers)
    assert chosen.layer_names == [f"model.layers.{row}.self_attn" for row in rows]
    assert torch.equal(chosen.attention, every.attention[rows])
    assert torch.equal(chosen.layer_token_attr, every.layer_token_attr[rows])


def test_layers_by_module() -> None:
    model = tiny_model("gpt2")
    every = read(model)
    blocks = model.transformer.h
    for layers in (blocks[2], blocks[2].attn, [blocks[2].attn]):
        assert torch.equal(read(model, layers=layers).attention, every.attention[2:3])
    assert torch.equal(read(model, layers=blocks).attention, every.attention)


@pytest.mark.parametrize("heads", [[2], [3, 0], 1])
@pytest.mark.parametrize("reduction", ["mean", "max", "rollout", "value_norm"])
def test_heads(heads: Any, reduction: str) -> None:
    model = tiny_model("qwen2")
    listed = [heads] if isinstance(heads, int) else heads
    every = read(model, include_prompt_attention=True)
    chosen = read(model, heads=heads, reduction=reduction, include_prompt_attention=True)
    assert chosen.heads == listed
    assert every.heads == [0, 1, 2, 3]
    assert torch.equal(chosen.attention, every.attention[:, listed])
    assert torch.equal(chosen.prompt_attention, every.prompt_attention[:, listed])
    if reduction != "rollout":  # rollout averages the heads before the layers multiply
        alone = [read(model, heads=h, reduction=reduction).layer_token_attr for h in listed]
        stacked = torch.stack(alone)
        together = stacked.amax(0) if reduction == "max" else stacked.mean(0)
        assert near(chosen.layer_token_attr, together)


def test_layers_that_have_no_attention_are_left_out() -> None:
    result = read(ALL_FAMILIES["jamba"]())
    assert result.layer_names == ["model.layers.1.self_attn", "model.layers.3.self_attn"]


# --- the result ----------------------------------------------------------------------------------


def test_it_is_a_layered_result_with_the_same_plots() -> None:
    result = read(tiny_model("llama"))
    assert isinstance(result, LLMLayerAttributionResult)
    assert torch.equal(result.layer_token_attr, result.attention.mean(1))
    assert near(result.token_attr, result.attention.mean((0, 1)))
    assert near(result.seq_attr, result.token_attr.mean(0))
    layer = result["model.layers.2.self_attn"]
    assert isinstance(layer, LLMAttributionResult)
    assert near(layer.token_attr, result.attention[2].mean(0))
    assert near(layer.seq_attr, result.attention[2].mean((0, 1)))
    for plot in (result.plot_token_attr, result.plot_seq_attr, result.plot_layer_attr):
        plot()[0].canvas.draw()
    assert "attention, mean over 4 heads of 4 layers" in repr(result)
    assert "log probability" in result.to_text(color=False)


def test_equal_results_are_equal() -> None:
    first, second = read(tiny_model("llama")), read(tiny_model("llama"))
    assert first == second
    second.attention[0, 0, 0, 0] += 1
    assert first != second
    assert first != read(tiny_model("llama"), reduction="max")


def test_log_probabilities_come_with_it() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        log_p = model(fed()[None]).logits[0, -COUNT:].log_softmax(-1)
    expected = log_p[torch.arange(COUNT), target_ids(COUNT)]
    assert (read(model).output_probs - expected).abs().max() < 1e-4


def test_a_generated_target() -> None:
    wrapper = LLMAttentionAttribution(tiny_model("llama"), tiny_tokenizer())
    arguments = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    result = wrapper.attribute(prompt_input(), gen_args=arguments)
    ids = tiny_model("llama").generate(prompt_input().inp_tensor, **arguments)[0, -3:]
    assert result == wrapper.attribute(prompt_input(), target=ids)


# --- features ------------------------------------------------------------------------------------


def test_skipped_tokens_have_no_column() -> None:
    every, some = read(tiny_model("llama")), read(tiny_model("llama"), prompt_input("skip_tokens"))
    columns = [i for i, token in enumerate(every.input_tokens) if token in some.input_tokens]
    assert len(columns) == len(every.input_tokens) - 2
    assert torch.equal(some.attention, every.attention[..., columns])


@pytest.mark.parametrize("reduction", ["mean", "max", "rollout", "value_norm"])
def test_attention_to_a_span_is_the_sum_over_its_tokens(reduction: str) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    inp = segment_input(PROMPT, by="word")
    spans = read(model, inp, reduction=reduction)
    tokens = read(model, reduction=reduction)
    words = tokenizer.convert_tokens_to_string(tokens.input_tokens[1:]).split()
    assert [word.strip() for word in inp.values] == words
    starts = [i for i, t in enumerate(tokens.input_tokens) if i and (t[0] == "Ġ" or i == 1)]
    edges = [*starts, len(tokens.input_tokens)]

    def by_word(values: Tensor) -> Tensor:
        parts = [values[..., a:b].sum(-1) for a, b in itertools.pairwise(edges)]
        return torch.stack(parts, -1)

    assert near(spans.attention, by_word(tokens.attention))
    if reduction == "max":  # the largest sum, not the sum of the largest
        assert near(spans.token_attr, by_word(tokens.attention).amax((0, 1)))
    else:
        assert near(spans.token_attr, by_word(tokens.token_attr))


def test_values_of_one_mask_are_one_feature() -> None:
    template, values = "{} lives in {} and", ["Dave", "Palm Coast"]
    apart = read(tiny_model("llama"), TextTemplateInput(template, values))
    together = read(tiny_model("llama"), TextTemplateInput(template, values, mask=[0, 0]))
    total = apart.attention.sum(-1, keepdim=True)
    assert near(together.attention, total.expand(-1, -1, -1, 2))


def test_a_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    template = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    inp = chat_input([{"role": "user", "content": "Palm Coast"}], tokenizer)
    result = read(tiny_model("llama"), inp, include_prompt_attention=True)
    assert tokenizer.convert_tokens_to_string(result.input_tokens) == "Palm Coast"
    assert result.prompt_tokens[0] == "<s>"
    expected = eager_weights(tiny_model("llama"), fed(inp))
    inside = inp.itp_mask[0].nonzero().flatten()
    assert near(result.attention, expected[:, :, -COUNT:][..., inside])
