"""Information flow: shares of what each position brings into a block, by a direct loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, GraniteConfig

from captum_llm_ext import LLMAttentionAttribution, LLMAttributionResult, explain
from captum_llm_ext.attention.block_flow import running_blocks
from captum_llm_ext.attention.information_flow import BlockFlow, closeness
from captum_llm_ext.attention.interface import reading_heads
from captum_llm_ext.model.layers import decoder_blocks
from tests.attention.test_wrapper import COUNT, fed, near, read
from tests.models.encoder_decoder import tiny_seq2seq
from tests.models.families import (
    _GROUPED,
    FAMILIES,
    PROMPT,
    _randomise,
    tiny_model,
    tiny_tokenizer,
)
from tests.oracles.attention import KINDS, parts_by_hand, skip_before_its_first_version
from tests.oracles.cases import prompt_input, target_ids


def test_two_parts_by_hand() -> None:
    """The whole is (3, 1): the state (1, 1), and (2, 0) from position 1; position 0 has weight 0.

    Closeness of (2, 0) is 4 − ‖(1, 1)‖ = 2, of the state 4 − ‖(2, 0)‖ = 2: half each.
    """
    flow = BlockFlow(
        states=torch.tensor([[1.0, 1.0]]),
        weights=torch.tensor([[[0.0, 0.5]]]),
        carried=torch.tensor([[[7.0, 7.0], [4.0, 0.0]]]),
    )
    assert flow.whole.tolist() == [[3.0, 1.0]]
    assert flow.shares([0]).tolist() == [[0.0, 0.5]]
    assert flow.residual_share().tolist() == [0.5]


def test_what_points_away_from_the_whole_has_no_share() -> None:
    whole, parts = torch.tensor([[1.0, 0.0]]), torch.tensor([[[-1.0, 0.0], [0.5, 0.0]]])
    assert closeness(whole, parts).tolist() == [[0.0, 0.5]]


def shares_by_hand(states: Tensor, parts: Tensor, heads: list[int]) -> tuple[Tensor, Tensor]:
    """Shares (length,) of a whole, and of the residual; states (hidden,), parts (h, j, hidden)."""
    whole = states + parts.sum((0, 1))

    def close(part: Tensor) -> float:
        return max(0.0, float(whole.abs().sum() - (whole - part).abs().sum()))

    table = torch.tensor([[close(part) for part in head] for head in parts])
    residual = close(states)
    return table[heads].sum(0) / (table.sum() + residual), residual / (table.sum() + residual)


@pytest.mark.parametrize("heads", [None, [2, 0]])
@pytest.mark.parametrize("family", KINDS)
def test_equals_a_direct_loop(family: str, heads: list[int] | None) -> None:
    skip_before_its_first_version(family)
    model, chosen = tiny_model(family), heads or [0, 1, 2, 3]
    result = read(model, reduction="flow", heads=heads, include_generated=True)
    for layer in range(4):
        states, parts = parts_by_hand(model, family, layer, fed())
        rows = range(len(states) - COUNT, len(states))
        expected = torch.stack([shares_by_hand(states[i], parts[i], chosen)[0] for i in rows])
        assert near(result.layer_token_attr[layer, :, :-1], expected), layer
        span = shares_by_hand(states[-COUNT:].sum(0), parts[-COUNT:].sum(0), chosen)[0]
        assert near(result.layer_seq_attr[layer, :-1], span), layer
    assert near(result.seq_attr, result.layer_seq_attr.sum(0))
    assert near(result.token_attr, result.layer_token_attr.sum(0))


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_rollout_multiplies_the_shares_of_all_positions(family: str) -> None:
    skip_before_its_first_version(family)
    model = tiny_model(family)
    result = read(model, reduction="flow_rollout", include_generated=True)
    rolled = torch.eye(len(fed()))
    for layer in range(4):
        states, parts = parts_by_hand(model, family, layer, fed())
        rows = []
        for i, state in enumerate(states):
            by_position = parts[i].sum(0)
            by_position[i] += state
            whole = by_position.sum(0)
            close = (whole.abs().sum() - (whole - by_position).abs().sum(-1)).clamp(min=0)
            rows.append(close / close.sum())
        rolled = torch.stack(rows) @ rolled
        assert near(result.layer_token_attr[layer, :, :-1], rolled[-COUNT:]), layer
    assert near(result.seq_attr[:-1], rolled[-COUNT:].mean(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_and_residual_sum_to_one(family: str) -> None:
    """In every layer, for each row and for the span, whatever the family reads by."""
    skip_before_its_first_version(family)
    model, sums = tiny_model(family), []
    wrapper: Any = LLMAttentionAttribution(model, tiny_tokenizer(), reduction="flow")
    original = BlockFlow.shares

    def noted(flow: BlockFlow, heads: list[int]) -> Tensor:
        shares = original(flow, heads)
        sums.append(shares.sum(1) + flow.residual_share())
        return shares

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockFlow, "shares", noted)
        result = wrapper.attribute(prompt_input(), target=target_ids(3))
    assert len(sums) == 2 * 4
    assert all(near(total, torch.ones_like(total)) for total in sums)
    assert bool((result.layer_token_attr >= 0).all())


@pytest.mark.parametrize("family", ["llama", "falcon"])
def test_the_span_is_the_same_without_rows_per_token(family: str) -> None:
    skip_before_its_first_version(family)
    model = tiny_model(family)
    with_rows = read(model, reduction="flow")
    without = read(model, reduction="flow", include_per_token_attr=False)
    assert without.token_attr is None
    assert without.layer_token_attr is None
    assert torch.equal(without.seq_attr, with_rows.seq_attr)
    assert torch.equal(without.layer_seq_attr, with_rows.layer_seq_attr)
    assert not near(with_rows.seq_attr, with_rows.token_attr.mean(0))  # a span is no mean


@pytest.mark.parametrize("reduction", ["mean", "max", "value_norm", "flow"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
def test_the_model_keeps_its_kernel_and_its_scores(family: str, reduction: str) -> None:
    skip_before_its_first_version(family)
    model = tiny_model(family, fresh=True)
    kernels, implementation = dict(AttentionInterface._global_mapping), []
    hook = model.register_forward_pre_hook(
        lambda module, args: implementation.append(module.config._attn_implementation)
    )
    plain = torch.log_softmax(model(fed()[None]).logits[0, -COUNT:], -1)
    before = model.config._attn_implementation
    result = read(model, reduction=reduction)
    hook.remove()
    assert set(implementation) == {before}
    assert AttentionInterface._global_mapping == kernels
    expected = plain.gather(1, target_ids(COUNT)[:, None])[:, 0]
    torch.testing.assert_close(result.output_probs, expected.detach(), rtol=1e-6, atol=1e-6)


def test_kernels_are_put_back_after_an_exception() -> None:
    model = tiny_model("llama", fresh=True)
    kernels, blocks = dict(AttentionInterface._global_mapping), decoder_blocks(model)

    def fail(_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), reading_heads(list(model.modules()), fail):
        model(fed()[None])
    assert AttentionInterface._global_mapping == kernels
    with running_blocks(blocks, fail):
        pass
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("factor", [1.0, 0.22])
def test_a_factor_of_the_residual_connection_counts(factor: float) -> None:
    """Granite multiplies the attention's output before it adds it; the loop here does too."""
    config = GraniteConfig(**_GROUPED, residual_multiplier=factor)
    model = _randomise(AutoModelForCausalLM.from_config(config))
    flows: list[BlockFlow] = []
    original = BlockFlow.shares

    def noted(flow: BlockFlow, heads: list[int]) -> Tensor:
        flows.append(flow)
        return original(flow, heads)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockFlow, "shares", noted)
        read(model, reduction="flow")
    mid: list[Tensor] = []
    for block in model.model.layers:
        block.post_attention_layernorm.register_forward_pre_hook(
            lambda module, args: mid.append(args[0][0, -COUNT:])
        )
    model(fed()[None])
    rows = [flow for flow in flows if len(flow.states) == COUNT]
    for flow, state in zip(rows, mid, strict=True):
        torch.testing.assert_close(flow.whole, state.detach(), rtol=1e-4, atol=1e-4)


class Adapted(nn.Module):
    """A linear layer and what an adapter adds to it, as LoRA's layers have both."""

    def __init__(self, base_layer: Any) -> None:
        super().__init__()
        self.base_layer, self.drop = base_layer, nn.Dropout(0.1)
        self.added = nn.Linear(base_layer.in_features, base_layer.out_features, bias=False)
        torch.nn.init.normal_(self.added.weight, std=0.3)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.base_layer(x, *args, **kwargs) + self.added(self.drop(x))


@pytest.mark.parametrize("reduction", ["flow", "flow_rollout", "value_norm"])
def test_an_adapter_of_the_output_projection_counts(reduction: str) -> None:
    """The same as a model whose projection has both weights in one."""
    torch.manual_seed(0)
    adapted, merged = tiny_model("llama", fresh=True), tiny_model("llama", fresh=True)
    for i in range(4):
        attention = adapted.get_submodule(f"model.layers.{i}.self_attn")
        attention.o_proj = Adapted(attention.o_proj)
        with torch.no_grad():
            projection = merged.get_submodule(f"model.layers.{i}.self_attn.o_proj")
            projection.weight.add_(attention.o_proj.added.weight)
    adapted.eval()
    found, expected = (read(model, reduction=reduction) for model in (adapted, merged))
    torch.testing.assert_close(found.token_attr, expected.token_attr, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.seq_attr, expected.seq_attr, rtol=1e-4, atol=1e-5)


def test_a_result_is_stored_and_read() -> None:
    for options in ({}, {"include_per_token_attr": False}):
        result = read(tiny_model("llama"), reduction="flow", **options)
        again = LLMAttributionResult.from_json(result.to_json())
        assert again == result
        assert torch.equal(again.layer_seq_attr, result.layer_seq_attr)


@pytest.mark.parametrize("method", ["flow", "flow_rollout"])
def test_by_name(method: str) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    result: Any = explain(model, tokenizer, PROMPT, target_ids(3), method)
    expected = read(model, count=3, reduction=method)
    assert torch.equal(result.seq_attr, expected.seq_attr)
    words = result.merge("word")
    torch.testing.assert_close(words.seq_attr.sum(), result.seq_attr.sum())


@pytest.mark.parametrize("reduction", ["flow", "flow_rollout"])
def test_encoder_decoder_models_refuse_it(reduction: str) -> None:
    with pytest.raises(ValueError, match="not defined for the attention of a decoder"):
        read(tiny_seq2seq("t5"), reduction=reduction)
