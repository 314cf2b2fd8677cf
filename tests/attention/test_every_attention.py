"""Every attention that runs is read, with the weights under which the model scores, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from captum_llm_ext import LLMAttentionAttribution
from tests.models.encoder_decoder import fresh_seq2seq
from tests.models.families import VOCAB_SIZE, tiny_model, tiny_tokenizer
from tests.models.shared_states import SHARING, sharing_model
from tests.oracles.attention import eager_weights
from tests.oracles.cases import assert_close, prompt_input, target_ids
from tests.scoring.test_wrapped_models import Shifts

REDUCTIONS = ["mean", "max", "rollout", "flow"]


def read(model: nn.Module, n_target: int = 2, **options: Any) -> Any:
    reduction = options.pop("reduction", "mean")
    wrapper = LLMAttentionAttribution(model, tiny_tokenizer(), reduction=reduction)
    return wrapper.attribute(prompt_input(), target=target_ids(n_target), **options)


# --- layers that share keys and values -----------------------------------------------------------


def test_all_four_layers_of_gemma_4() -> None:
    model, n_target = sharing_model("gemma4", "eager"), 2
    result = read(model, n_target, include_generated=True)
    fed = torch.cat([prompt_input().inp_tensor[0], target_ids(n_target)[:-1]])
    assert result.layer_names == [f"model.layers.{i}.self_attn" for i in range(4)]
    assert_close(result.attention[..., :-1], eager_weights(model, fed)[:, :, -n_target:])


@pytest.mark.parametrize("family", SHARING)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("n_target", [1, 3])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_layer_of_a_model_that_shares(
    family: str, implementation: str, n_target: int, reduction: str
) -> None:
    if (family, reduction) == ("gemma3n", "flow"):
        pytest.skip("its residual stream is of four states")
    result = read(sharing_model(family, implementation), n_target, reduction=reduction)
    assert len(result.layer_names) == 4


# --- models of which some blocks are read otherwise ----------------------------------------------


class ByHand(nn.Module):
    """Attention of a class of its own that calls no kernel and returns its weights."""

    def __init__(self, weights: str = "returned") -> None:
        super().__init__()
        self.returns = weights
        self.mixed = nn.Linear(32, 32, bias=False)

    def forward(self, hidden_states: Tensor, **options: Any) -> tuple[Tensor, Any]:
        length = hidden_states.size(1)
        scores = hidden_states @ hidden_states.transpose(1, 2) / 32
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        weights = scores.softmax(-1)[:, None]
        mixed = self.mixed(weights[:, 0] @ hidden_states)
        return mixed, weights.expand(-1, 4, -1, -1) if self.returns == "returned" else None


def test_one_block_without_the_kernel() -> None:
    model: Any = tiny_model("llama", fresh=True)
    model.model.layers[2].self_attn = ByHand()
    assert len(read(model).layer_names) == 4


class Folded(nn.Module):
    """Attention in chunks, which are rows for the kernel."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states: Tensor, position_embeddings: Any, **_: Any) -> Any:
        length, half = hidden_states.size(1), hidden_states.size(1) // 2
        folded = hidden_states[:, : 2 * half].reshape(2, half, -1)
        cos, sin = (x[:, :half].expand(2, -1, -1) for x in position_embeddings)
        mask = torch.full((half, half), -torch.inf).triu(1).expand(2, 1, -1, -1)
        mixed, _ = self.inner(folded, (cos, sin), mask)
        mixed = mixed.reshape(1, 2 * half, -1)
        return nn.functional.pad(mixed, (0, 0, 0, length - 2 * half)), None


@pytest.mark.parametrize("reduction", ["mean", "rollout"])
def test_attention_in_chunks_is_refused(reduction: str) -> None:
    model: Any = tiny_model("llama", fresh=True)
    model.model.layers[1].self_attn = Folded(model.model.layers[1].self_attn)
    with pytest.raises(ValueError, match=r"attention of model.layers.1.self_attn.inner cannot be"):
        read(model, reduction=reduction)
    others = LLMAttentionAttribution(model, tiny_tokenizer(), layers=[0, 2])
    assert len(others.attribute(prompt_input(), target=target_ids(2)).layer_names) == 2


class Two(nn.Module):
    """Two attentions in one block."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, hidden_states: Tensor, **options: Any) -> Any:
        first, weights = self.first(hidden_states, **options)
        return first + self.second(hidden_states, **options)[0], weights


@pytest.mark.parametrize("reduction", ["mean", "rollout"])
def test_two_attentions_in_a_block_are_refused(reduction: str) -> None:
    model: Any = tiny_model("llama", fresh=True)
    layers = model.model.layers
    layers[1].self_attn = Two(layers[1].self_attn, layers[2].self_attn)
    layers[2].self_attn = ByHand()
    with pytest.raises(ValueError, match="block 1 holds two attentions"):
        read(model, reduction=reduction)


@pytest.mark.parametrize("reduction", [*REDUCTIONS, "value_norm"])
def test_tokens_that_the_model_adds_are_refused(reduction: str) -> None:
    """Virtual tokens, as of prompt tuning, stand where the prompt's first ones are looked for."""
    with pytest.raises(ValueError, match=r"Shifts .*adds tokens|no weights .* of all tokens to"):
        read(Shifts(tiny_model("llama")), reduction=reduction)


class WithValues(nn.Module):
    """Values (1, n_heads, length, head_dim) beside what they give; shaped as weights where
    length = head_dim."""

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        return 0.5 * hidden_states, hidden_states.unflatten(-1, (4, 8)).transpose(1, 2)


@pytest.mark.parametrize("reduction", ["mean", "rollout"])
def test_values_shaped_as_weights_are_none(reduction: str) -> None:
    model: Any = tiny_model("llama", fresh=True)
    model.model.layers[2].self_attn = WithValues()
    n_target = 8 + 1 - prompt_input().inp_tensor.size(1)
    assert n_target > 0
    result = read(model, n_target, reduction=reduction)
    assert result.layer_names == [f"model.layers.{i}.self_attn" for i in (0, 1, 3)]


def test_a_mask_that_is_passed_by_name() -> None:
    if not hasattr(transformers, "DogeConfig"):
        pytest.skip("this version of transformers has no Doge")
    config = transformers.DogeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for reduction in ("mean", "rollout"):
        assert len(read(model, reduction=reduction).layer_names) == 2


# --- eager attention that is not the model's -----------------------------------------------------


@pytest.mark.parametrize("options", [{"reduction": "rollout"}, {"include_prompt_attention": True}])
def test_eager_attention_with_other_scores(options: dict[str, Any]) -> None:
    class Warmer(torch.nn.Module):
        """Scales its input where the model does not run with eager attention."""

        def __init__(self, config: Any) -> None:
            super().__init__()
            self.config = config

        def forward(self, hidden: Tensor) -> Tensor:
            return hidden * (1.0 if self.config._attn_implementation == "eager" else 1.01)

    model: Any = tiny_model("llama", fresh=True)
    model.model.norm = nn.Sequential(model.model.norm, Warmer(model.config))
    assert len(read(model).layer_names) == 4  # the model's own kernel
    with pytest.raises(ValueError, match="other scores with eager attention"):
        read(model, **options)


@pytest.mark.parametrize("reduction", ["mean", "rollout"])
def test_falcon_adds_its_biases_twice_in_eager_attention(reduction: str) -> None:
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2}
    config = transformers.FalconConfig(**sizes, num_attention_heads=4, alibi=True)
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(10 if parameter.dim() > 1 else 1)
    with torch.no_grad():
        ids = prompt_input().inp_tensor
        own = model(ids).logits
        eager = model(ids, output_attentions=True).logits
    if torch.allclose(own, eager, atol=1e-3):
        pytest.skip("mended in this version of transformers")
    with pytest.raises(ValueError, match="other scores with eager attention"):
        read(model, reduction=reduction)


def test_dropout_makes_both_passes_random() -> None:
    model: Any = tiny_model("llama", fresh=True)
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    with pytest.warns(UserWarning, match="the attribution is random"):
        assert len(read(model, reduction="rollout").layer_names) == 4


def test_cross_attention_is_compared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = fresh_seq2seq("bart")
    before = model.lm_head.forward

    def warmer(hidden: Tensor) -> Tensor:
        eager = model.config._attn_implementation == "eager"
        return before(hidden) * (1.0 if eager else 1.01)

    monkeypatch.setattr(model.lm_head, "forward", warmer)
    with pytest.raises(ValueError, match="other scores with eager attention"):
        read(model)
