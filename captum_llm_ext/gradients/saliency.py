"""Saliency: the norm of the gradient of the score, per token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from captum_llm_ext.compat import compute_layer_gradients_and_eval
from captum_llm_ext.gradients.method import NORMS, LayerMethod


class LayerSaliency(LayerMethod):
    """Norm of the gradient of the score with respect to a layer, per token.

    Args:
        forward_func: the model.
        layer: a layer, a list of layers, or names and patterns of layers when used with
            `LLMGradientAttribution`.
        norm: over the hidden units of a token: "l1", "l2" or "linf". Default: "l1".

    Raises:
        ValueError: unknown norm.

    The attribution of a token has the unit of the score per unit of the layer; it is never
    negative, and it does not add up to a difference of scores.

    Simonyan et al. 2013, Deep Inside Convolutional Networks, https://arxiv.org/abs/1312.6034;
    with the norm over embeddings, Li et al. 2016, https://arxiv.org/abs/1506.01066.

    Example:
        >>> method = LayerSaliency(model, model.get_input_embeddings())
        >>> result = LLMGradientAttribution(method, tokenizer).attribute(inp, target=" Paris")
        >>> result.seq_attr.shape
        torch.Size([5])
    """

    multiplies = False

    def __init__(self, forward_func: Callable[..., Any], layer: Any, norm: str = "l1") -> None:
        super().__init__(forward_func, layer)
        if norm not in NORMS or norm == "sum":
            raise ValueError(f"norm must be 'l1', 'l2' or 'linf', got {norm!r}")
        self.norm = norm

    def attribute(
        self,
        inputs: Any,
        target: Any = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
        grad_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Norms (batch, sequence) of ∂forward_func/∂layer; a list of them for a list of layers.

        The arguments are those of Captum's `LayerGradientXActivation.attribute`.
        """
        gradients, _ = compute_layer_gradients_and_eval(
            self.forward_func,
            self.layer,
            inputs,
            target,
            additional_forward_args,
            attribute_to_layer_input=attribute_to_layer_input,
            grad_kwargs=grad_kwargs,
        )
        several = not isinstance(self.layer, nn.Module)
        norms = [NORMS[self.norm](g[0]) for g in (gradients if several else [gradients])]
        return norms if several else norms[0]
