"""Quantisers that the package does not know: right gradients, or an error before any work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from captum.attr import FeatureAblation, LayerGradientXActivation, LayerIntegratedGradients
from torch import Tensor, nn

from captum_llm_ext import LayerSaliency, LLMAttribution
from tests.models.families import tiny_model, tiny_tokenizer
from tests.oracles.cases import assert_close, our_attribution, prompt_input, target_ids

pytestmark = pytest.mark.filterwarnings("ignore:integrated gradients have not converged")
METHODS = [LayerSaliency, LayerGradientXActivation, LayerIntegratedGradients]


class Whole(nn.Module):
    """A linear layer with weights of whole numbers in ±127, one scale a row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.bias = linear.bias

    def dequantized(self) -> Tensor:
        return self.weight.float() * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dequantized(), self.bias)


class Named(Whole):
    """The same with its whole numbers under another name, as GPTQ, AWQ and HQQ have them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        whole = self.weight
        del self.weight
        self.register_buffer("qweight", whole)

    def dequantized(self) -> Tensor:
        return self.qweight.float() * self.scale


class WithoutBackward(Whole):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(x)


class Backward(torch.autograd.Function):
    """x Wᵀ, and a backward by another matrix."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return gradient @ back, None, None


class WithoutScale(Whole):
    """The backward forgets the scales."""

    def forward(self, x: Tensor) -> Tensor:
        return Backward.apply(x, self.dequantized(), self.weight.float())


class OtherOrder(Named):
    """The backward has the columns in another order."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.dequantized()
        return Backward.apply(x, weight, weight.flip(1))


class Zero(Whole):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.dequantized()
        return Backward.apply(x, weight, torch.zeros_like(weight))


class ByHand(Whole):
    """A forward that autograd would not differentiate, with a backward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.dequantized()
        return Backward.apply(x, weight, weight)


def with_layers(make: Any, only: str = "") -> nn.Module:
    """The tiny model with its linear layers replaced, but for the head."""
    model = tiny_model("llama", fresh=True)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head" and only in name:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, make(module))
    return model.eval()  # new layers are in training mode, which leads to a check for dropout


def rounded_model() -> nn.Module:
    """The unquantised model of the same weights."""
    model = tiny_model("llama", fresh=True)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head":
                module.weight.copy_(Whole(module).dequantized())
    return model


def attribute(model: nn.Module, method: Any = LayerSaliency, **options: Any) -> Any:
    options.setdefault("target", target_ids(3))
    return our_attribution(method, model, "model.embed_tokens", prompt_input(), **options)


def test_saliency_with_whole_number_weights_equals_that_with_their_floats() -> None:
    expected = attribute(rounded_model(), LayerSaliency)
    assert_close(attribute(with_layers(Whole), LayerSaliency).token_attr, expected.token_attr)


@pytest.mark.parametrize("make", [Whole, Named, ByHand])
@pytest.mark.parametrize("method", METHODS)
def test_a_right_backward_is_accepted(method: Any, make: Any) -> None:
    result = attribute(with_layers(make), method)
    assert_close(result.token_attr, attribute(rounded_model(), method).token_attr)


@pytest.mark.parametrize("target", [None, target_ids(3)])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (WithoutBackward, "has no backward"),
        (WithoutScale, "has a wrong backward"),
        (OtherOrder, "has a wrong backward"),
        (Zero, "has a wrong backward"),
    ],
)
def test_a_wrong_backward_is_refused(make: Any, message: str, target: Any) -> None:
    gen_args = {"max_new_tokens": 2} if target is None else None
    with pytest.raises(ValueError, match=rf"\({make.__name__}\) {message}.*LLMAttribution"):
        attribute(with_layers(make), target=target, gen_args=gen_args)


def test_one_wrong_layer_is_enough() -> None:
    model = with_layers(WithoutScale, only="layers.3.mlp.down_proj")
    with pytest.raises(ValueError, match=r"model\.layers\.3\.mlp\.down_proj"):
        attribute(model)


def test_the_refusal_comes_before_any_work() -> None:
    """After two passes at most, and no backward of the method."""
    model = with_layers(WithoutScale)
    passes: list[int] = []
    model.register_forward_pre_hook(lambda _, args: passes.append(1))
    with pytest.raises(ValueError, match="wrong backward"):
        attribute(model, LayerIntegratedGradients, n_steps=50)
    assert len(passes) <= 2


class Cut(nn.Module):
    """A block whose gradient ends in it, in a model with quantised layers that are right."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.block(hidden.detach().requires_grad_(), *args, **kwargs)


def test_a_gradient_that_does_not_reach_the_embeddings_is_refused() -> None:
    model: Any = with_layers(Whole)
    model.model.layers[2] = Cut(model.model.layers[2])
    with pytest.raises(ValueError, match="no gradient reaches the embeddings, block 0, block 1"):
        attribute(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # newer versions of torch drop it
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:quantized..linear_dynamic")
def test_dynamic_quantisation_of_torch_is_refused() -> None:
    model = tiny_model("llama", fresh=True)
    model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    for method in METHODS:
        with pytest.raises(ValueError, match=r"has (no|a wrong) backward"):
            attribute(model, method)


def test_perturbation_of_a_model_without_a_backward_equals_direct_computation() -> None:
    model, target = with_layers(WithoutBackward), target_ids(2)
    result = LLMAttribution(FeatureAblation(model), tiny_tokenizer()).attribute(
        prompt_input(), target=target
    )
    reference = LLMAttribution(FeatureAblation(rounded_model()), tiny_tokenizer())
    expected = reference.attribute(prompt_input(), target=target)
    assert_close(result.token_attr, expected.token_attr)


def test_a_certain_target_is_no_missing_gradient() -> None:
    """Where p is 1 in float32, the gradient of log p is zero, and that of its check is not."""
    model = with_layers(Whole)
    ids = prompt_input().inp_tensor
    certain = model(ids).logits[0, -1].argmax().reshape(1)
    with torch.no_grad():
        model.lm_head.weight *= 1e4
    assert model(ids).logits[0, -1].softmax(-1).max() == 1
    with pytest.warns(UserWarning, match="no gradient reaches"):
        result = attribute(model, target=certain)
    assert (result.token_attr == 0).all()
    assert (attribute(model, target=certain, attr_target="logit").token_attr != 0).all()


class NamesItsFeatures(nn.Module):
    """A block that is not linear, has plain weights inside, and has `in_features`."""

    def __init__(self, inner: nn.Module, in_features: int) -> None:
        super().__init__()
        self.inner, self.in_features = inner, in_features

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).tanh()


def test_a_module_that_only_names_its_features_is_no_quantised_layer() -> None:
    model = tiny_model("llama", fresh=True)
    model.model.layers[1].mlp = NamesItsFeatures(model.model.layers[1].mlp, 32)
    assert (attribute(model).token_attr > 0).all()


def test_plain_models_are_not_checked() -> None:
    """The check costs a model without quantised layers nothing."""
    passes: list[int] = []
    model = tiny_model("llama", fresh=True)
    model.register_forward_hook(lambda *_: passes.append(1))
    attribute(model)
    plain = len(passes)
    passes.clear()
    quantised = with_layers(Whole)
    quantised.register_forward_hook(lambda *_: passes.append(1))
    attribute(quantised)
    assert len(passes) == plain + 2
