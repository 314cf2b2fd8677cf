"""Every mistake of the user is a ValueError that says what was expected and what came."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import captum.attr
import pytest
import torch
from captum.attr import LayerGradientXActivation, LayerIntegratedGradients, TextTokenInput
from torch import nn

from captum_llm_ext import LayerSaliency, LLMGradientAttribution
from captum_llm_ext import TextTokenInput as OurInput
from tests.models.families import PROMPT, CausalToy, MinimalTokenizer, tiny_model, tiny_tokenizer
from tests.oracles.cases import (
    assert_close,
    captum_attribution,
    our_attribution,
    prompt_input,
    target_ids,
)


def attribute(
    method: Any = LayerSaliency, /, inp: Any = None, layer: Any = None, **kwargs: Any
) -> Any:
    model = tiny_model("llama")
    kwargs.setdefault("target", target_ids(2))
    layer = model.model.embed_tokens if layer is None else layer
    return our_attribution(method, model, layer, inp or prompt_input(), **kwargs)


def path(**kwargs: Any) -> Any:
    return attribute(LayerIntegratedGradients, **kwargs)


def plain(text: str, **kwargs: Any) -> Any:
    """A plain module and a tokenizer that adds nothing of its own."""
    tokenizer = MinimalTokenizer()
    model = CausalToy(len(tokenizer.words))
    inp = TextTokenInput(text, tokenizer)
    return our_attribution(
        LayerSaliency, model, model.embedding, inp, tokenizer=tokenizer, **kwargs
    )


def skipping_all() -> TextTokenInput:
    ids = tiny_tokenizer().encode(PROMPT)
    return TextTokenInput(PROMPT, tiny_tokenizer(), skip_tokens=ids)


MISTAKES: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "empty prompt": (lambda: plain("", target="golf,"), ["prompt", "empty|no token|at least one"]),
    "empty target string": (
        lambda: attribute(target=""),
        ["target", "empty|no token|at least one"],
    ),
    "empty target tensor": (
        lambda: attribute(target=torch.tensor([], dtype=torch.long)),
        ["target", "empty|no token|at least one"],
    ),
    "2-D target": (
        lambda: attribute(target=target_ids(2)[None]),
        ["target", "1-D|one dimension|1D|1 dimension", r"\(1, 2\)|\[1, 2\]|2-D|2D|2 dimension"],
    ),
    "target that is not ids": (
        lambda: attribute(target=torch.tensor([0.5])),
        ["target", "float|int"],
    ),
    "target of truth values": (
        lambda: attribute(target=torch.tensor([True, False])),
        ["target", "bool"],
    ),
    "target outside the vocabulary": (
        lambda: attribute(target=torch.tensor([9999])),
        ["target", "9999", "352"],
    ),
    "unknown baseline string": (
        lambda: path(baselines="nonsense"),
        ["baseline", "nonsense", "pad", "zero"],
    ),
    "baseline id outside the vocabulary": (
        lambda: path(baselines=9999),
        ["baseline", "9999"],
    ),
    "layer of another model": (
        lambda: attribute(layer=nn.Linear(3, 3)),
        ["layer", "Linear", "LlamaForCausalLM"],
    ),
    "pattern that matches nothing": (
        lambda: attribute(layer="model.layers.*.mpl"),
        [r"model\.layers\.\*\.mpl", "mlp"],
    ),
    "name part that matches nothing": (lambda: attribute(layer="q_prj"), ["q_prj", "q_proj"]),
    "input of the embedding": (
        lambda: attribute(attribute_to_layer_input=True),
        ["model.embed_tokens|Embedding", "input", "id|integer|int64|floating"],
    ),
    "layer without positions": (  # OPT folds batch and sequence into one dimension here
        lambda: our_attribution(
            LayerSaliency,
            tiny_model("opt"),
            "model.decoder.layers.1.fc1",
            prompt_input(),
            target="a",
        ),
        [r"layers\.1\.fc1", "batch, sequence"],
    ),
    "no layers": (lambda: attribute(layer=[]), ["layer", "empty|at least one"]),
    "unsupported method": (
        lambda: attribute(captum.attr.LayerActivation),
        [
            "LayerActivation",
            "LayerIntegratedGradients",
            "LayerGradientXActivation",
            "LayerSaliency",
        ],
    ),
    "longer than the context": (
        lambda: attribute(target=torch.arange(60) + 10),
        ["64", "context|max_position_embeddings", "60|67|68"],
    ),
    "no steps": (lambda: path(n_steps=0), ["n_steps", "0"]),
    "negative steps": (lambda: path(n_steps=-3), ["n_steps", "-3"]),
    "no batch": (lambda: path(internal_batch_size=0), ["internal_batch_size", "0"]),
    "unknown integration rule": (
        lambda: path(method="nonsense"),
        ["method", "nonsense", "gausslegendre"],
    ),
    "all tokens skipped": (lambda: attribute(inp=skipping_all()), ["skip"]),
    "no generate and no target": (lambda: plain("Dave lives", target=None), ["target", "generate"]),
    "generation settings with a target": (
        lambda: attribute(gen_args={"max_new_tokens": 2}),
        ["gen_args", "target"],
    ),
    "unknown norm": (
        lambda: attribute(lambda model, layer: LayerSaliency(model, layer, norm="l7")),
        ["norm", "l7", "l1", "l2", "linf"],
    ),
    "unknown score": (
        lambda: attribute(attr_target="nonsense"),
        ["attr_target", "nonsense", "log_prob", "prob", "logit"],
    ),
    "unknown layer mode": (
        lambda: path(layer=["q_proj"], layer_mode="nonsense"),
        ["layer_mode", "nonsense", "independent", "joint"],
    ),
    "contrast of another length": (
        lambda: attribute(target=target_ids(3), contrast_target=target_ids(2)),
        ["contrast_target", "3", "2"],
    ),
    "no samples": (
        lambda: attribute(captum.attr.LayerGradientShap, n_samples=0),
        ["n_samples", "0"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_a_value_error_that_explains(mistake: str) -> None:
    call, expected = MISTAKES[mistake]
    with pytest.raises(ValueError, match=f"(?i){expected[0]}") as caught:
        call()
    for words in expected:
        assert caught.match(f"(?i){words}")


def test_target_of_another_type() -> None:
    with pytest.raises(TypeError, match=r"(?i)target.*(str|Tensor).*int"):
        attribute(target=3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: attribute(target=[True]), r"token ids, got \[True\]"),
        (lambda: path(baselines=True), "a baseline of tokens .* got True"),
        (lambda: OurInput(PROMPT, tiny_tokenizer(), baselines=True), "of tokens .* got True"),
        (lambda: OurInput(PROMPT, tiny_tokenizer(), baselines=1.5), "of tokens .* got 1.5"),
        (lambda: OurInput(PROMPT, tiny_tokenizer(), skip_tokens="<s>"), r"give \['<s>'\]"),
        (lambda: attribute(target=" golf", skip_tokens="golf"), r"give \['golf'\]"),
    ],
)
def test_what_would_be_taken_for_ids(call: Any, message: str) -> None:
    """True is 1 to Python, and the characters of a string are a list of strings."""
    with pytest.raises(TypeError, match=message):
        call()


def test_an_input_of_another_tokenizer() -> None:
    """Its ids mean other tokens, and the model gives a score to any ids."""
    other = MinimalTokenizer()
    inp = TextTokenInput("Dave lives", other)
    other_names = other.convert_ids_to_tokens(inp.inp_tensor[0].tolist())
    assert other_names != tiny_tokenizer().convert_ids_to_tokens(inp.inp_tensor[0].tolist())
    with pytest.warns(UserWarning, match="another tokenizer made this input: .* 'Dave' is"):
        attribute(inp=inp)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attribute(inp=TextTokenInput(PROMPT, deepcopy(tiny_tokenizer())))


def test_keyword_of_another_name() -> None:
    with pytest.raises((TypeError, ValueError), match="n_stepz"):
        path(n_stepz=3)


def test_input_of_another_type() -> None:
    wrapper = LLMGradientAttribution(
        LayerSaliency(tiny_model("llama"), tiny_model("llama").model.norm), tiny_tokenizer()
    )
    with pytest.raises((TypeError, ValueError), match="str"):
        wrapper.attribute("a plain string", target=target_ids(1))


def test_a_mistake_leaves_the_next_call_right() -> None:
    with pytest.raises(ValueError, match="n_steps"):
        path(n_steps=0)
    model = tiny_model("llama")
    expected = captum_attribution(
        LayerGradientXActivation,
        model,
        model.model.embed_tokens,
        prompt_input(),
        target=target_ids(2),
    )
    assert_close(attribute(LayerGradientXActivation).token_attr, expected.token_attr)


def test_dropout_in_training_mode_warns() -> None:
    model = tiny_model("gpt2", fresh=True).train()
    with pytest.warns(UserWarning, match="(?i)dropout") as caught:
        our_attribution(
            LayerSaliency, model, "transformer.wte", prompt_input(), target=target_ids(2)
        )
    assert model.training
    # noise is not a sight of later tokens: nothing may be said about causality
    assert not [warning for warning in caught if "causal" in str(warning.message)]


def test_evaluation_mode_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attribute()


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(
    "method", [LayerSaliency, LayerGradientXActivation, LayerIntegratedGradients]
)
def test_works_where_gradients_are_off(method: Any, guard: Any) -> None:
    expected = attribute(method, target=" plays golf")
    with guard():
        result = attribute(method, target=" plays golf", inp=prompt_input())
        assert not torch.is_grad_enabled()
    assert_close(result.token_attr, expected.token_attr)
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()


def test_results_hold_no_graph() -> None:
    for method in (LayerSaliency, LayerGradientXActivation, LayerIntegratedGradients):
        result = attribute(method)
        assert not result.token_attr.requires_grad
        assert not result.seq_attr.requires_grad
