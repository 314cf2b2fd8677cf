"""What a model was found to be is asked once, and again when the model changes."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaAttention

from captum_llm_ext import FeatureAblation, LLMAttribution, TextTokenInput, explain
from captum_llm_ext.model import check_cache
from captum_llm_ext.model.check_cache import check_cache_of
from captum_llm_ext.perturbations.stand_in import HIDDEN
from tests.models.families import (
    PROMPT,
    TARGET,
    BidirectionalToy,
    MinimalTokenizer,
    tiny_model,
    tiny_tokenizer,
)

NO_MASK = torch.zeros(1, 1, 1, 1)  # added to the scores of all places
LONG = "Rain is due. The Louvre is in Paris. Cats sleep"
METHODS = ("saliency", "ablation", "ig")


def attributed(model: nn.Module, method: str, **options: Any) -> Tensor:
    given: dict[str, Any] = {} if method == "saliency" else {"baselines": "pad"}
    given |= {"n_steps": 3} if method == "ig" else {}
    result = explain(model, tiny_tokenizer(), PROMPT, TARGET, method, **{**given, **options})
    assert result.token_attr is not None
    return result.token_attr


# --- a second call -------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "first", "second"), [("saliency", 2, 1), ("ablation", 3, 2)])
def test_a_second_call_runs_no_pass_for_checks(method: str, first: int, second: int) -> None:
    """By hand, saliency is one pass; ablation one for the cache and one of masked prompts."""
    model = tiny_model("llama", fresh=True)
    counts, results = [], []
    hook = model.register_forward_pre_hook(lambda *_: counts.append(1))
    for expected in (first, second, second):
        counts.clear()
        options = {"baselines": "remove"} if method == "ablation" else {}
        results.append(attributed(model, method, **options))
        assert len(counts) == expected
    hook.remove()
    assert torch.equal(results[0], results[1])


def test_a_first_call_gives_the_numbers_of_a_second() -> None:
    """To the last bit, so that a batch that goes on writes the same file."""
    model, inp = tiny_model("llama", fresh=True), TextTokenInput(LONG, tiny_tokenizer())
    wrapper = LLMAttribution(FeatureAblation(model), tiny_tokenizer())
    results = [wrapper.attribute(inp, TARGET).token_attr for _ in range(2)]
    assert inp.n_itp_features >= max(HIDDEN)
    assert torch.equal(*results)


@pytest.mark.parametrize("method", METHODS)
def test_calls_leave_the_model_as_it_looks(method: str) -> None:
    model = tiny_model("llama", fresh=True)
    answers = check_cache_of(model)
    attributed(model, method)
    model.generate(torch.tensor([[5, 6]]), max_new_tokens=2, do_sample=False)
    assert check_cache_of(model) is answers
    assert answers


def test_what_was_warned_of_is_warned_of_again() -> None:
    tokenizer = MinimalTokenizer()
    model = BidirectionalToy(len(tokenizer.words))
    inp = TextTokenInput("Dave lives in Palm Coast", tokenizer)
    wrapper = LLMAttribution(FeatureAblation(model), tokenizer)
    for _ in range(3):
        with pytest.warns(UserWarning, match="BidirectionalToy is not causal"):
            wrapper.attribute(inp, "plays golf,")
    dropping = tiny_model("gpt2", fresh=True).train()
    for _ in range(2):
        with pytest.warns(UserWarning, match="dropout"):
            attributed(dropping, "saliency", layers="*wte")


# --- a model that changes ------------------------------------------------------------------------


def attentions(model: Any) -> list[Any]:
    return [block.self_attn for block in model.model.layers]


def without_mask(forward: Any, *args: Any, **kwargs: Any) -> Any:
    return forward(*args, **{**kwargs, "attention_mask": NO_MASK})


class BothWays(LlamaAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return without_mask(super().forward, *args, **kwargs)


def swap_modules(model: Any) -> None:
    """Attention that looks both ways in the place of the model's."""
    for block in model.model.layers:
        block.self_attn = copy.deepcopy(block.self_attn)
        block.self_attn.__class__ = BothWays


def replace_forward(model: Any) -> None:
    for attention in attentions(model):
        attention.forward = partial(without_mask, attention.forward)


def hook_inputs(model: Any) -> None:
    for attention in attentions(model):
        attention.register_forward_pre_hook(
            lambda _, args, kwargs: (args, {**kwargs, "attention_mask": NO_MASK}),
            with_kwargs=True,
        )


def swap_class(model: Any) -> None:
    for attention in attentions(model):
        attention.__class__ = BothWays


BOTH_WAYS = (swap_modules, replace_forward, hook_inputs, swap_class)


@pytest.mark.parametrize("change", BOTH_WAYS)
@pytest.mark.parametrize("method", ["saliency", "ablation"])
def test_attention_that_looks_both_ways_is_noticed(
    change: Callable[[Any], None], method: str
) -> None:
    model = tiny_model("llama", fresh=True)
    before = attributed(model, method)
    change(model)
    with pytest.warns(UserWarning, match="not causal"):
        found = attributed(model, method)
    with pytest.warns(UserWarning, match="not causal"):
        expected = attributed(copy.deepcopy(model), method)  # which no call has seen
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, before)


def a_step_of_training(model: Any) -> None:
    with torch.no_grad():
        next(model.parameters()).mul_(1.5)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "training mode": lambda model: model.train(),
    "one module in training mode": lambda model: model.model.layers[1].mlp.train(),
    "attention": lambda model: model.set_attn_implementation("eager"),
    "a nested flag": lambda model: setattr(model.model.layers[0].self_attn, "is_causal", False),
    "configuration": lambda model: setattr(model.config, "sliding_window", 3),
    "precision": lambda model: model.to(torch.bfloat16),
    "weights": a_step_of_training,
    "a hook": lambda model: model.model.norm.register_forward_hook(lambda *_: None),
    "a layer": lambda model: setattr(model.model, "norm", nn.Identity()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_it_is_asked_again_after(change: str) -> None:
    model = tiny_model("llama", fresh=True)
    check_cache_of(model)["causal"] = True
    assert "causal" in check_cache_of(model)
    CHANGES[change](model)
    assert check_cache_of(model) == {}


def test_adapters_that_are_switched_off() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    model = peft.get_peft_model(tiny_model("llama", fresh=True), config)
    check_cache_of(model)["causal"] = True
    with model.disable_adapter():
        assert check_cache_of(model) == {}


def mixed(states: Tensor) -> Tensor:
    return states.cumsum(1)


class CallsAFunction(nn.Module):
    """A causal toy whose module calls a function of this file."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(400, 8), nn.Linear(8, 400)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: Tensor) -> Any:
        return SimpleNamespace(logits=self.head(mixed(self.embedding(input_ids))))


def test_code_that_changes_elsewhere_is_noticed_with_check(monkeypatch: Any) -> None:
    model = CallsAFunction().eval()
    attributed(model, "saliency")
    monkeypatch.setitem(globals(), "mixed", lambda states: states + states.sum(1, keepdim=True))
    with pytest.warns(UserWarning, match="not causal"):
        attributed(model, "saliency", check=True)
    with pytest.warns(UserWarning, match="not causal"):
        attributed(model, "ablation")


# --- what is kept --------------------------------------------------------------------------------


def held_by(thing: Any) -> list[Any]:
    """All that a thing keeps alive, but for classes and modules of code."""
    found: dict[int, Any] = {}
    waiting = [thing]
    while waiting:
        one = waiting.pop()
        if id(one) not in found and not isinstance(one, type | type(gc)):
            found[id(one)] = one
            waiting += gc.get_referents(one)
    return list(found.values())


def test_the_memory_holds_no_tensor_and_no_model() -> None:
    model = tiny_model("llama", fresh=True)
    for method in METHODS:
        attributed(model, method)
    held = held_by(check_cache._CACHES[model])
    assert not [thing for thing in held if isinstance(thing, Tensor | nn.Module)]
    gone = weakref.ref(model)
    del model, held
    gc.collect()
    assert gone() is None
