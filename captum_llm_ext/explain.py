"""Attribution in one line: name the method, the layers and the prompt, and get the result."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from captum.attr import (
    FeatureAblation,
    InterpretableInput,
    KernelShap,
    LayerConductance,
    LayerGradientShap,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    Lime,
    ShapleyValues,
    ShapleyValueSampling,
)
from torch import nn

from captum_llm_ext.attention import LLMAttentionAttribution
from captum_llm_ext.gradient import LLMGradientAttribution
from captum_llm_ext.inputs import TextTokenInput, chat_input
from captum_llm_ext.methods import LayerSaliency
from captum_llm_ext.perturbation import LLMAttribution
from captum_llm_ext.result import LLMAttributionResult

Message: TypeAlias = Mapping[str, str]
Prompt: TypeAlias = str | Sequence[Message] | InterpretableInput
Layers: TypeAlias = nn.Module | str | Sequence[nn.Module | str]


def _integrated_gradients(model: nn.Module, layer: Any) -> LayerIntegratedGradients:
    with warnings.catch_warnings():
        # Captum warns of layers that feed each other; here each layer has its own path.
        warnings.filterwarnings("ignore", message="Multiple layers provided")
        return LayerIntegratedGradients(model, layer)


GRADIENT_METHODS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "saliency": LayerSaliency,
    "ig": _integrated_gradients,
    "gradxact": LayerGradientXActivation,
    "gradshap": LayerGradientShap,
    "conductance": LayerConductance,
}
PERTURBATION_METHODS: dict[str, Callable[[nn.Module], Any]] = {
    "ablation": FeatureAblation,
    "shapley": ShapleyValues,
    "shapley_sampling": ShapleyValueSampling,
    "lime": Lime,
    "kernelshap": KernelShap,
}
# Wrappers that need no method of Captum's, and what they are made with besides model and layers.
READOUT_METHODS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "attention": (LLMAttentionAttribution, ("heads", "reduction")),
}
METHODS = (*GRADIENT_METHODS, *PERTURBATION_METHODS, *READOUT_METHODS)


def explain(
    model: nn.Module,
    tokenizer: Any,
    prompt: Prompt,
    target: str | torch.Tensor | None = None,
    method: str = "saliency",
    layers: Layers | None = None,
    quadrature: str | None = None,
    **kwargs: Any,
) -> LLMAttributionResult:
    """Attribute what a language model says to the parts of its prompt.

    Args:
        model: a causal language model.
        tokenizer: the model's tokenizer.
        prompt: a string (every token is a feature), a list of messages
            (``{"role": ..., "content": ...}``, put through the chat template), or any
            interpretable input of Captum.
        target: the continuation to attribute, a string or token ids of shape (n_output,).
            Default: what the model generates.
        method: with gradients, "saliency" (L1 norm of the gradient, the default), "ig" (integrated
            gradients), "gradxact" (gradient x activation), "gradshap" (gradient SHAP) or
            "conductance" (of layers, along the path of the embeddings); by
            perturbation, "ablation", "shapley", "shapley_sampling", "lime" or "kernelshap"; or
            "attention", the attention weights (with `heads` and `reduction`).
        layers: for the methods with gradients and "attention", a module, a name, a pattern such as
            ``"model.layers.*.mlp"``, or a list of these. Default: the input embeddings; for
            "attention", every layer that has it.
        quadrature: of "ig" and "conductance" (where `attribute` calls it `method`):
            "gausslegendre" (the default), a Riemann rule, or "adaptive" with ``tol=0.05``.
        **kwargs: go to ``attribute`` of `LLMGradientAttribution`, `LLMAttribution` or
            `LLMAttentionAttribution`, for example ``n_steps=100``, ``n_samples=50`` or
            ``gen_args={"max_new_tokens": 10}``.

    Returns:
        A result with ``seq_attr`` (n_input,) and ``token_attr`` (n_output, n_input), in units of
        log p; for several layers an ``LLMLayerAttributionResult``, with those of each layer too.
        Of "attention" an ``LLMAttentionAttributionResult``, in shares of 1.

    Raises:
        ValueError: the method is unknown or has no layers, a layer is not in the model, or the
            prompt or the target is empty.
        TypeError: the prompt is none of the kinds above.

    Example:
        >>> model, tokenizer = load_demo_model()
        >>> result = explain(model, tokenizer, "The capital of France is", " Paris")
        >>> result.seq_attr.shape, result.token_attr.shape
        (torch.Size([5]), torch.Size([1, 5]))

    Source: Kokhlikyan et al., "Captum" (2020), arXiv:2009.07896; Miglani et al., "Using Captum to
    explain generative language models" (2023), arXiv:2312.05491.
    """
    _, made_with = READOUT_METHODS.get(method, (None, ()))
    settings = {name: kwargs.pop(name) for name in made_with if name in kwargs}
    wrapper = _wrapper(model, tokenizer, method, layers, settings)
    if quadrature is not None:
        if method not in ("ig", "conductance"):
            raise ValueError(f"quadrature belongs to 'ig' and 'conductance', got {method!r}")
        kwargs["method"] = quadrature
    return wrapper.attribute(_as_input(prompt, tokenizer), target=target, **kwargs)


def _wrapper(
    model: nn.Module,
    tokenizer: Any,
    method: str,
    layers: Layers | None,
    settings: Mapping[str, Any],
) -> LLMGradientAttribution | LLMAttribution | LLMAttentionAttribution:
    if method in READOUT_METHODS:
        return READOUT_METHODS[method][0](model, tokenizer, layers, **settings)
    if method in GRADIENT_METHODS:
        layer = _input_embeddings(model) if layers is None else layers
        return LLMGradientAttribution(GRADIENT_METHODS[method](model, layer), tokenizer)
    if method not in PERTURBATION_METHODS:
        raise ValueError(f"expected method to be one of {', '.join(METHODS)}; got {method!r}")
    if layers is not None:
        raise ValueError(
            f"{method} perturbs the prompt and has no layers: leave out layers, or choose one of "
            f"{', '.join((*GRADIENT_METHODS, *READOUT_METHODS))}"
        )
    return LLMAttribution(PERTURBATION_METHODS[method](model), tokenizer)


def _as_input(prompt: Any, tokenizer: Any) -> InterpretableInput:
    if isinstance(prompt, str):
        if not prompt:  # with a tokenizer that puts a token before every text it would pass
            raise ValueError("expected a prompt of at least one character, got an empty string")
        return TextTokenInput(prompt, tokenizer)
    if isinstance(prompt, InterpretableInput):
        return prompt
    if isinstance(prompt, Sequence) and all(isinstance(message, Mapping) for message in prompt):
        return chat_input(prompt, tokenizer)
    raise TypeError(
        "expected the prompt to be a string, a list of messages with 'role' and 'content', or an "
        f"interpretable input of Captum; got {type(prompt).__name__}"
    )


def _input_embeddings(model: nn.Module) -> nn.Module:
    find = getattr(model, "get_input_embeddings", None)
    embeddings = find() if callable(find) else None
    if not isinstance(embeddings, nn.Module):
        raise ValueError(
            f"cannot tell which layer of {type(model).__name__} holds the input embeddings: name "
            'it with layers, for example layers="embed_tokens"'
        )
    return embeddings
