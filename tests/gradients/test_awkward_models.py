"""Models and layers that once gave wrong numbers without a word: each is right now, or refused."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from captum.attr import (
    FeatureAblation,
    LayerGradientShap,
    LayerGradientXActivation,
    LayerIntegratedGradients,
)
from torch import Tensor, nn

from captum_llm_ext import LayerSaliency, LLMAttribution, LLMGradientAttribution, TextTokenInput
from captum_llm_ext.perturbations.scorer import MOST_ROWS, batches
from tests.models.families import VOCAB_SIZE, tiny_model, tiny_tokenizer
from tests.oracles.cases import assert_close, prompt_input, target_ids


def attribute(method: Any, target: Tensor | None = None, inp: Any = None, **options: Any) -> Any:
    wrapper = LLMGradientAttribution(method, tiny_tokenizer())
    inp = prompt_input() if inp is None else inp
    return wrapper.attribute(inp, target_ids(2) if target is None else target, **options)


def ablated(model: nn.Module, **options: Any) -> Any:
    wrapper = LLMAttribution(FeatureAblation(model), tiny_tokenizer())
    return wrapper.attribute(prompt_input(), target_ids(2), **options)


def hybrid(name: str) -> nn.Module:
    """Attention and recurrent layers together, whose caches cannot be cut to a prefix."""
    common = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 4}
    options: dict[str, Any] = {
        "Jamba": {"intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2},
        "Lfm2": {"intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2},
    }[name]
    if name == "Jamba":
        options |= {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4}
        options |= {"num_experts": 2, "use_mamba_kernels": False}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**common, **options)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@pytest.mark.parametrize("name", ["Jamba", "Lfm2"])
def test_states_of_recurrent_layers_are_not_cut(name: str) -> None:
    model = hybrid(name)
    expected = ablated(model, reuse_prefix=False, internal_batch_size=1)
    assert_close(ablated(model).token_attr, expected.token_attr)
    assert_close(ablated(model, internal_batch_size=1).token_attr, expected.token_attr)


def test_a_layer_that_sees_no_tokens_leaves_the_other_deltas() -> None:
    model, names = tiny_model("llama"), ["model.embed_tokens", "model.layers.1.mlp"]
    without = attribute(LayerIntegratedGradients(model, names), n_steps=3)
    result = attribute(LayerIntegratedGradients(model, [*names, "model.rotary_emb"]), n_steps=3)
    assert_close(result.convergence_delta[:2], without.convergence_delta)
    assert not result.convergence_delta[2].any()
    saliency = attribute(LayerSaliency(model, ["q_proj", "model.rotary_emb"], norm="linf"))
    assert not saliency["model.rotary_emb"].token_attr.any()


class Named(NamedTuple):
    states: Tensor
    more: None = None


@pytest.mark.parametrize("made", [Named, lambda states: {"states": states}, lambda x: [x]])
@pytest.mark.parametrize("method", [LayerGradientXActivation, LayerIntegratedGradients])
def test_a_block_that_returns_something_else(made: Any, method: Any) -> None:
    """Blocks that give a named tuple, a dict or a list, read by a model that knows it."""
    plain, other = tiny_model("llama"), tiny_model("llama", fresh=True)
    for block in other.model.layers[:3]:
        block.register_forward_hook(
            lambda module, args, out: made(out) if isinstance(out, Tensor) else out
        )
    for block in other.model.layers[1:]:
        block.register_forward_pre_hook(lambda module, args: (states_in(args[0]), *args[1:]))
    name, options = "model.layers.1", {"n_steps": 3} if "Int" in method.__name__ else {}
    expected = attribute(method(plain, name), **options)
    assert_close(attribute(method(other, name), **options).token_attr, expected.token_attr)


def states_in(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    return output["states"] if isinstance(output, dict) else output[0]


class PositionsFirst(nn.Module):
    """A plain model whose first embedding is not that of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.positions = nn.Embedding(64, 16)
        self.tokens = nn.Embedding(VOCAB_SIZE, 16)
        self.head = nn.Linear(16, VOCAB_SIZE)

    def forward(self, ids: Tensor) -> SimpleNamespace:
        hidden = self.tokens(ids) + self.positions(torch.arange(ids.size(1))[None])
        return SimpleNamespace(logits=self.head(torch.tanh(hidden.cumsum(1))))


def test_the_token_embedding_is_not_the_first_one() -> None:
    model = PositionsFirst()
    attribute(LayerSaliency(model, "tokens"))
    with pytest.raises(ValueError, match="cannot tell which embedding"):
        attribute(LayerIntegratedGradients(model, "tokens"), n_steps=3, baselines="zero")


def test_gradient_checkpointing_is_off_meanwhile() -> None:
    model = tiny_model("llama", fresh=True)
    expected = attribute(LayerSaliency(model, "model.layers.1.mlp")).token_attr
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.train()
    assert_close(attribute(LayerSaliency(model, "model.layers.1.mlp")).token_attr, expected)
    assert all(block.gradient_checkpointing for block in model.model.layers)


class Wrapped(nn.Module):
    """An embedding inside another, as adapters make it."""

    def __init__(self, base: nn.Embedding) -> None:
        super().__init__()
        self.base = base

    def forward(self, ids: Tensor) -> Tensor:
        return 2 * self.base(ids)


@pytest.mark.parametrize("method", [LayerSaliency, LayerGradientXActivation])
def test_an_embedding_inside_a_wrapper(method: Any) -> None:
    model = tiny_model("llama", fresh=True)
    model.model.embed_tokens = Wrapped(model.model.embed_tokens)
    outer = attribute(method(model, model.model.embed_tokens)).token_attr
    inner = attribute(method(model, model.model.embed_tokens.base)).token_attr
    assert_close(inner, outer * (2 if method is LayerSaliency else 1))


def test_as_many_heads_as_tokens_are_not_taken_for_tokens() -> None:
    inp = TextTokenInput("Dave lives", tiny_tokenizer())
    model = tiny_model("gemma3")
    heads = model.config.num_attention_heads
    layer = "model.layers.1.self_attn.q_norm"
    target = target_ids(1 + max(0, heads - inp.inp_tensor.size(1)))
    with pytest.raises(ValueError, match="choose another layer"):
        attribute(LayerGradientXActivation(model, layer), target, inp)


@pytest.mark.parametrize("stdevs", [(0.0, 5.0), [0.1], "0.1", -1.0])
def test_noise_of_each_layer_alone_cannot_be_given(stdevs: Any) -> None:
    method = LayerGradientShap(tiny_model("llama"), "model.embed_tokens")
    with pytest.raises(ValueError, match="stdevs"):
        attribute(method, stdevs=stdevs)


def test_noise_of_a_layer_in_a_list_is_as_if_alone() -> None:
    model, names = tiny_model("llama"), ["model.embed_tokens", "model.layers.1.mlp"]
    torch.manual_seed(0)
    together = attribute(LayerGradientShap(model, names), stdevs=0.1)
    for name in names:
        torch.manual_seed(0)
        alone = attribute(LayerGradientShap(model, name), stdevs=0.1)
        assert_close(together[name].token_attr, alone.token_attr)


@pytest.mark.parametrize("run", [lambda m: attribute(LayerSaliency(m, "model.layers.1")), ablated])
def test_scores_that_are_no_numbers_are_refused(run: Any) -> None:
    model = tiny_model("llama", fresh=True)
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.inf)
    with pytest.raises(ValueError, match="not finite"):
        run(model)


@pytest.mark.parametrize(
    "baselines",
    [torch.tensor(99999), torch.tensor(-1), torch.zeros(7), ("nearest", "x"), ("nearest", 0)],
)
def test_baselines_that_the_model_cannot_take(baselines: Any) -> None:
    method = LayerIntegratedGradients(tiny_model("llama"), "model.embed_tokens")
    with pytest.raises(ValueError, match=r"baseline|rank"):
        attribute(method, n_steps=2, baselines=baselines)


def test_a_tensor_of_ids_as_long_as_the_prompt_serves_both_wrappers() -> None:
    inp = prompt_input("skip_tokens")
    ids = torch.arange(10, 10 + inp.inp_tensor.size(1))
    model = tiny_model("llama")
    method = LayerIntegratedGradients(model, "model.embed_tokens")
    assert attribute(method, inp=inp, n_steps=2, baselines=ids).seq_attr.isfinite().all()
    wrapper = LLMAttribution(FeatureAblation(model), tiny_tokenizer())
    assert wrapper.attribute(inp, target_ids(2), baselines=ids).seq_attr.isfinite().all()


def test_unknown_options_are_refused() -> None:
    with pytest.raises(TypeError, match="bogus"):
        ablated(tiny_model("llama"), bogus=4)
    method = LayerSaliency(tiny_model("llama"), "model.layers.1")
    with pytest.raises(ValueError, match="retain_graph"):
        attribute(method, grad_kwargs={"retain_graph": True})


def test_trials_of_a_method_that_draws_nothing_are_one_run() -> None:
    model, calls = tiny_model("llama"), []
    hook = model.model.embed_tokens.register_forward_hook(lambda *_: calls.append(1))
    method = LayerIntegratedGradients(model, "model.layers.1", multiply_by_inputs=False)
    try:
        counts = []
        for trials in (1, 1, 5):
            calls.clear()
            attribute(method, n_steps=3, num_trials=trials)
            counts.append(len(calls))
    finally:
        hook.remove()
    assert counts[1] == counts[2]  # the first call checks the model too


def test_batches_of_many_prompts_are_bounded() -> None:
    """What a pass takes is bounded, and so is what the planner weighs for each prompt."""
    found = batches([20] * 2000, [0] * 2000, 3, 10**9, None)
    assert sorted(i for batch in found for i in batch) == list(range(2000))
    assert max(map(len, found)) <= MOST_ROWS


class CutOff(nn.Module):
    """A layer whose product has no backward, as of packed 4-bit weights."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.layer(hidden.detach().requires_grad_(), *args, **kwargs)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (LayerSaliency, {}),
        (LayerGradientXActivation, {}),
        (LayerIntegratedGradients, {"n_steps": 2}),
    ],
)
def test_a_gradient_that_is_cut_off_is_said(method: Any, options: dict[str, Any]) -> None:
    model = tiny_model("llama", fresh=True)
    blocks: Any = model.model.layers
    blocks[2] = CutOff(blocks[2])
    with pytest.warns(UserWarning, match="no gradient reaches model.embed_tokens"):
        attribute(method(model, "model.embed_tokens"), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attribute(LayerSaliency(tiny_model("llama"), ["q_proj", "model.rotary_emb"]))
