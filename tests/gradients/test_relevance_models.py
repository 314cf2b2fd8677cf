"""Relevance on every family: scores to the bit, layers, inputs, what is left, bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_llm_ext import (
    LayerRelevance,
    LLMGradientAttribution,
    TextTemplateInput,
    explain,
    segment_input,
)
from captum_llm_ext.model.hooks import differentiable
from captum_llm_ext.model.relevance_rules import relevance_rules
from tests.models.encoder_decoder import tiny_seq2seq
from tests.models.families import FAMILIES, PROMPT, layer_names, tiny_model, tiny_tokenizer
from tests.models.question_answering import qa_tokenizer, question_input, tiny_qa
from tests.models.shared_states import sharing_model
from tests.oracles.cases import assert_close, our_attribution, prompt_input, target_ids

RULES = ("cp", "attnlrp")


def relevance(rules: str) -> Any:
    return lambda model, layer: LayerRelevance(model, layer, rules)


# --- every family --------------------------------------------------------------------------------


def models() -> dict[str, Callable[[], Any]]:
    families = {name: lambda name=name: tiny_model(name) for name in FAMILIES}
    return {**families, "gemma4": lambda: sharing_model("gemma4"), "t5": lambda: tiny_seq2seq("t5")}


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("family", models())
def test_scores_are_the_same_to_the_bit(family: str, rules: str) -> None:
    model, ids = models()[family](), prompt_input().inp_tensor
    more = {"decoder_input_ids": ids[:, :2]} if family == "t5" else {}
    with differentiable(model):
        model.get_input_embeddings().weight.requires_grad_()
        expected = model(ids, **more).logits
        with relevance_rules(model, rules):
            logits = model(ids, **more).logits
        assert torch.equal(logits, expected)
        (gradient,) = torch.autograd.grad(logits.sum(), model.get_input_embeddings().weight)
    assert torch.isfinite(gradient).all()
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2", "gpt_neox", "mixtral"])
def test_both_attentions_of_a_family_agree(family: str, rules: str) -> None:
    """The rules reach sdpa as one operation, and eager attention as five."""
    results = []
    for implementation in ("sdpa", "eager"):
        model: Any = tiny_model(family, fresh=True)
        model.set_attn_implementation(implementation)
        layers = [layer_names(family)[kind] for kind in ("embedding", "mlp")]
        results.append(
            our_attribution(relevance(rules), model, layers, prompt_input(), target=target_ids(3))
        )
    assert_close(results[0].layer_token_attr, results[1].layer_token_attr)


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "gpt2"])
def test_layers_in_one_call_equal_one_at_a_time(family: str) -> None:
    model, names = tiny_model(family), list(layer_names(family).values())
    request = (prompt_input(),)
    together = our_attribution(relevance("attnlrp"), model, names, *request, target=target_ids(3))
    for i, name in enumerate(names):
        alone = our_attribution(relevance("attnlrp"), model, name, *request, target=target_ids(3))
        assert torch.equal(together.layer_token_attr[i], alone.token_attr)
        assert torch.equal(together.layer_seq_attr[i], alone.seq_attr)


def test_queries_and_keys_get_nothing_under_cp() -> None:
    model = tiny_model("llama")
    layers = [f"model.layers.1.self_attn.{name}_proj" for name in "qkv"]
    request = (model, layers, prompt_input())
    with pytest.warns(UserWarning, match="under the rules 'cp' of relevance, for queries and keys"):
        cp = our_attribution(relevance("cp"), *request, target=target_ids(2)).layer_token_attr
    assert (cp[:2] == 0).all()
    assert cp[2].abs().max() > 0
    shared = our_attribution(relevance("attnlrp"), *request, target=target_ids(2))
    assert (shared.layer_token_attr.abs().amax((1, 2)) > 0).all()


# --- as any method -------------------------------------------------------------------------------


def test_every_kind_of_input_and_target() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    tokens = explain(model, tokenizer, PROMPT, " golf", "relevance", "model.layers.1")
    words = explain(
        model, tokenizer, segment_input(PROMPT, by="word"), " golf", "relevance", "model.layers.1"
    )
    assert_close(words.seq_attr.sum(), tokens.seq_attr[1:].sum())  # all but the token "<s>"
    template = TextTemplateInput("{} lives in {} and", ["Dave", "Palm Coast"], ["Anna", "Rome"])
    result = explain(model, tokenizer, template, " golf", "relevance", "model.layers.1")
    assert_close(
        result.seq_attr, words.seq_attr[[0, 3, 4]] @ torch.tensor([[1.0, 0], [0, 1], [0, 1]])
    )
    options: dict[str, Any] = {"attr_target": "logit", "include_generated": True}
    golf, paris = (
        explain(model, tokenizer, PROMPT, ids, "relevance", **options).token_attr
        for ids in (torch.tensor([40, 41]), torch.tensor([40, 50]))
    )
    contrast = explain(
        model, tokenizer, PROMPT, torch.tensor([40, 41]), "relevance",
        contrast_target=torch.tensor([60, 50]), **options,
    )  # fmt: skip
    assert_close(contrast.token_attr[1], golf[1] - paris[1])


def test_questions_and_translations() -> None:
    answer = explain(
        tiny_qa("bert"), qa_tokenizer("bert"), question_input("bert"), method="relevance"
    )
    translation = explain(
        tiny_seq2seq("t5"), tiny_tokenizer(), PROMPT, target_ids(2), "relevance", rules="attnlrp"
    )
    for result in (answer, translation):
        assert torch.isfinite(result.token_attr).all()
        assert (result.token_attr.abs().amax(1) > 0).all()


class Logits(nn.Module):
    """A model as Captum's methods take it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(ids).logits[:, -1]
        return logits


def test_captums_way_without_a_wrapper() -> None:
    """Parameters that require gradients are no factors."""
    model = tiny_model("llama", fresh=True)
    ids, token = prompt_input().inp_tensor, int(target_ids(1)[0])
    expected = our_attribution(
        LayerRelevance, model, "model.layers.1.mlp", prompt_input(), "logit", target=target_ids(1)
    )
    mlps = [model.model.layers[i].mlp for i in (1, 2)]
    alone = LayerRelevance(Logits(model), mlps[0]).attribute(ids, target=token)
    assert_close(alone[0], expected.seq_attr)
    several = LayerRelevance(Logits(model), mlps).attribute(ids, target=token)
    assert torch.equal(several[0], alone)
    with pytest.raises(TypeError, match=r"expected a module as forward_func, .*; got function"):
        LayerRelevance(lambda x: model(x).logits[:, -1], mlps[0]).attribute(ids, target=token)


def test_16_bits_and_autocast_are_near() -> None:
    model = tiny_model("gpt2", fresh=True)
    request = (relevance("attnlrp"), model, "transformer.h.1", prompt_input())
    exact = our_attribution(*request, target=target_ids(2))
    cast = our_attribution(*request, target=target_ids(2), dtype=torch.bfloat16)
    model.to(torch.bfloat16)
    low = our_attribution(*request, target=target_ids(2))
    for result in (cast, low):
        attr = result.token_attr.flatten(), exact.token_attr.flatten()
        assert torch.nn.functional.cosine_similarity(*attr, dim=0) > 0.98


# --- nothing is left, and bad input --------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_of_the_rules(error: type[BaseException]) -> None:
    model = tiny_model("gpt2", fresh=True)
    activation = model.transformer.h[0].mlp.act

    def stop(*_: Any) -> None:
        raise error("stopped by the test")

    def native() -> Tensor:
        x = torch.linspace(-2, 2, 7, requires_grad=True)
        return torch.autograd.grad((activation(x) * x).sum(), x)[0]

    before = native()
    with relevance_rules(model, "cp"):
        assert not torch.allclose(native(), before)
    hook = model.transformer.h[1].mlp.register_forward_hook(stop)
    with pytest.raises(error, match="stopped by the test"), relevance_rules(model, "cp"):
        model(prompt_input().inp_tensor)
    hook.remove()
    assert torch.equal(native(), before)
    assert all("forward" not in vars(module) for module in model.modules())


def test_unknown_rules() -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="rules must be 'cp' or 'attnlrp', got 'lrp'"):
        LayerRelevance(model, model.model.embed_tokens, rules="lrp")
    with pytest.raises(ValueError, match="rules must be 'cp' or 'attnlrp', got 'lrp'"):
        explain(model, tiny_tokenizer(), PROMPT, " golf", method="relevance", rules="lrp")


def test_a_layer_that_is_not_in_the_model() -> None:
    with pytest.raises(ValueError, match="no_such_layer"):
        LLMGradientAttribution(
            LayerRelevance(tiny_model("llama"), "no_such_layer"), tiny_tokenizer()
        )


def test_an_attention_kernel_that_the_rules_do_not_reach() -> None:
    model: Any = tiny_model("llama", fresh=True)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"expected attention 'sdpa' or 'eager', got 'flash_att"):
        relevance_rules(model, "cp")
