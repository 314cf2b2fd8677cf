"""Models in a wrapper: the options that it hands on are used, and the numbers are the model's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from captum.attr import FeatureAblation, LayerIntegratedGradients, TextTemplateInput
from torch import Tensor, nn

from captum_llm_ext import LayerSaliency, LLMAttribution, LLMGradientAttribution, explain
from tests.models.encoder_decoder import tiny_seq2seq
from tests.models.families import tiny_model, tiny_tokenizer
from tests.models.question_answering import answer_span, qa_tokenizer, question_input, tiny_qa
from tests.oracles.cases import target_ids

PREFIX = "The capital of France is Paris and the capital of Japan is Tokyo. "


class HandsOn(nn.Module):
    """Hands everything on, as PEFT and DataParallel do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


class Refuses(HandsOn):
    """Takes any option, and fails on some of them."""

    refused: tuple[str, ...] = ("logits_to_keep",)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if wrong := [name for name in self.refused if name in kwargs]:
            raise TypeError(f"unexpected {wrong}")
        return super().forward(*args, **kwargs)


class RefusesAll(Refuses):
    refused = ("logits_to_keep", "use_cache", "past_key_values", "output_attentions")


class Drops(HandsOn):
    """Takes any option, and reads none."""

    def forward(self, ids: Tensor, **kwargs: Any) -> Any:
        return SimpleNamespace(logits=self.model(ids, use_cache=False).logits)


class DropsTheCache(HandsOn):
    """Gives a cache, and does not read one."""

    def forward(self, ids: Tensor, **kwargs: Any) -> Any:
        kwargs.pop("past_key_values", None)
        return self.model(ids, **kwargs)


class Shifts(HandsOn):
    """Puts virtual tokens of its own before the prompt, as prefix tuning does."""

    def forward(self, ids: Tensor, **kwargs: Any) -> Any:
        embedded = self.model.get_input_embeddings()(ids)
        virtual = torch.full_like(embedded[:, :2], 0.3)
        if kwargs.get("past_key_values") is not None:
            raise ValueError("no cache with virtual tokens")
        output = self.model(inputs_embeds=torch.cat([virtual, embedded], dim=1), **kwargs)
        return SimpleNamespace(logits=output.logits[:, -ids.size(1) :])


WRAPPERS = [HandsOn, Refuses, RefusesAll, Drops, DropsTheCache]


def template() -> TextTemplateInput:
    return TextTemplateInput(PREFIX + "{} lives in {} and", ["Dave", "Palm Coast"], ["He", "Rome"])


def saliency(model: nn.Module, **options: Any) -> Any:
    method = LayerSaliency(model, "*layers.1")
    return LLMGradientAttribution(method, tiny_tokenizer()).attribute(
        template(), target_ids(3), **options
    )


def ig(model: nn.Module, **options: Any) -> Any:
    method = LayerIntegratedGradients(model, "*embed_tokens")
    return LLMGradientAttribution(method, tiny_tokenizer()).attribute(
        template(), target_ids(3), n_steps=4, **options
    )


def ablation(model: nn.Module, **options: Any) -> Any:
    wrapper = LLMAttribution(FeatureAblation(model), tiny_tokenizer())
    return wrapper.attribute(template(), target_ids(3), **options)


METHODS = [saliency, ig, ablation]


def tokens_run(model: nn.Module, method: Any, layer: str = "layers.0") -> int:
    """How many tokens a layer sees in a call."""
    seen: list[int] = []
    (module,) = (module for name, module in model.named_modules() if name.endswith(layer))
    hook = module.register_forward_hook(lambda _, args, out: seen.append(args[0][..., 0].numel()))
    try:
        method(model)
    finally:
        hook.remove()
    return sum(seen)


@pytest.mark.parametrize("method", METHODS)
def test_as_few_tokens_as_without_the_wrapper(method: Any) -> None:
    model = tiny_model("llama")
    # One token shows what the wrapper hands on, and two rows of two that it takes rows.
    fewest = tokens_run(model, method) + (4 if method is ablation else 0)
    assert tokens_run(HandsOn(model), method) == fewest + 1
    assert tokens_run(HandsOn(HandsOn(model)), method) == fewest + 1


def test_logits_of_the_target_alone() -> None:
    model = tiny_model("llama")
    fewest = tokens_run(model, saliency, "lm_head")
    assert tokens_run(HandsOn(model), saliency, "lm_head") == fewest + 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_numbers_of_the_model(wrapper: Any, method: Any) -> None:
    model = tiny_model("llama")
    expected, result = method(model), method(wrapper(model))
    torch.testing.assert_close(result.token_attr, expected.token_attr, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", [ig, ablation])
def test_a_wrapper_that_changes_the_model_has_numbers_of_its_own(method: Any) -> None:
    model = Shifts(tiny_model("llama"))
    result, plain = method(model), method(model, reuse_prefix=False)
    torch.testing.assert_close(result.token_attr, plain.token_attr, atol=1e-5, rtol=1e-4)
    assert (result.token_attr - method(model.model).token_attr).abs().max() > 1e-3


def test_dataparallel_and_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate.hooks")
    model = tiny_model("llama", fresh=True)
    expected, fewest = ablation(model), tokens_run(model, ablation)
    parallel = nn.DataParallel(model).eval()
    assert tokens_run(parallel, ablation) == fewest + 5
    torch.testing.assert_close(ablation(parallel).token_attr, expected.token_attr)
    accelerate.add_hook_to_module(model, accelerate.ModelHook())
    assert tokens_run(model, ablation) == fewest
    torch.testing.assert_close(ablation(model).token_attr, expected.token_attr)


def test_peft() -> None:
    peft = pytest.importorskip("peft")
    plain = tiny_model("llama")
    fewest = tokens_run(plain, ablation)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])
    model = peft.get_peft_model(tiny_model("llama", fresh=True), config).eval()
    assert tokens_run(model, ablation) == fewest + 5
    torch.testing.assert_close(ablation(model).token_attr, ablation(plain).token_attr)
    prefix = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(tiny_model("llama", fresh=True), prefix).eval()
    with_cache, without = ablation(model), ablation(model, reuse_prefix=False)
    torch.testing.assert_close(with_cache.token_attr, without.token_attr, atol=1e-5, rtol=1e-4)


def test_attention_of_a_wrapped_model() -> None:
    model = tiny_model("llama")
    for reduction in ("mean", "value_norm", "rollout"):
        options = {"method": "attention", "reduction": reduction}
        expected, result = (
            explain(m, tiny_tokenizer(), template(), target_ids(3), **options)
            for m in (model, HandsOn(model))
        )
        torch.testing.assert_close(result.token_attr, expected.token_attr)


def test_a_wrapped_question_answering_model_gets_token_types() -> None:
    model, tokenizer = tiny_qa("bert"), qa_tokenizer("bert")
    target = answer_span("bert")
    expected, result = (
        explain(m, tokenizer, question_input("bert"), target, "ablation")
        for m in (model, HandsOn(model))
    )
    torch.testing.assert_close(result.token_attr, expected.token_attr)


def test_a_wrapped_encoder_decoder_model_is_one() -> None:
    model = tiny_seq2seq("bart")
    for method in ("ablation", "saliency"):
        expected, result = (
            explain(m, tiny_tokenizer(), "Dave lives in Palm Coast", target_ids(2), method)
            for m in (model, HandsOn(model))
        )
        torch.testing.assert_close(result.token_attr, expected.token_attr)
