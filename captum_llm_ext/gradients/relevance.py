"""Relevance: value times gradient under rules by which relevance is handed down conserved."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from captum_llm_ext.compat import compute_layer_gradients_and_eval
from captum_llm_ext.gradients.method import NORMS, LayerMethod
from captum_llm_ext.model.hooks import differentiable
from captum_llm_ext.model.relevance_rules import RULES, relevance_rules


class LayerRelevance(LayerMethod):
    """Value of a layer times the gradient of the score under the rules of relevance, per token.

    Args:
        forward_func: the model.
        layer: a layer, a list of layers, or names and patterns of layers when used with
            `LLMGradientAttribution`.
        rules: "cp" (conservative propagation, the default): attention weights are constants, so
            queries and keys get nothing and values all. "attnlrp": the two factors of every product
            share its gradient, so queries and keys get a quarter each and values a half.

    Raises:
        ValueError: unknown rules; in `attribute`, a model with flash or flex attention, whose
            kernels the rules do not reach.

    The rules change the backward pass alone; scores are those of the model to the bit. The
    denominator of a norm is a constant. An activation has the slope value/input, and its derivative
    at 0. A sigmoid that multiplies is a constant. The factors of any other product share its
    gradient. All else, such as linear maps, softmax, rotary embeddings and residuals, is
    differentiated as it is. One forward and one backward pass serve all layers.

    The attribution of a token has the unit of the score. With ``attr_target="logit"`` the
    relevances of all positions of the embeddings sum to the logit if the model has no attention and
    no biases, and under "cp" with attention too. Elsewhere these are lost: what a bias adds, what
    passes through a softmax (of attention under "attnlrp", of a router of experts), what enters the
    model past the layer, and with "log_prob" what the other tokens' logits add.

    "attnlrp" may rank tokens badly on models that normalise queries and keys, as Gemma 3 does:
    judge it on your model (see `faithfulness`) before you trust it.

    According to the README of LXT 2.1 (https://pypi.org/project/lxt/2.1/), the library of AttnLRP's
    authors, layer-wise relevance propagation is a patented technology, free of charge for personal
    and scientific purposes only. Captum ships a class of its own for it, ``captum.attr.LRP``. No
    default of this package uses it.

    AttnLRP: Achtibat et al. 2024, https://arxiv.org/abs/2402.05602. Conservative propagation: Ali
    et al. 2022, https://arxiv.org/abs/2202.07304.

    Example:
        >>> method = LayerRelevance(model, model.get_input_embeddings())
        >>> inp = TextTokenInput("The capital of France is", tokenizer)
        >>> result = LLMGradientAttribution(method, tokenizer).attribute(inp, target=" Paris")
        >>> result.token_attr.shape
        torch.Size([1, 5])
    """

    def __init__(self, forward_func: Callable[..., Any], layer: Any, rules: str = "cp") -> None:
        super().__init__(forward_func, layer)
        if rules not in RULES:
            raise ValueError(f"rules must be 'cp' or 'attnlrp', got {rules!r}")
        self.rules = rules

    def surround(self, model: nn.Module) -> AbstractContextManager[None]:
        return relevance_rules(model, self.rules)

    def attribute(
        self,
        inputs: Any,
        target: Any = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
        grad_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Relevances (batch, sequence) of the layer; a list of them for a list of layers.

        The arguments are those of Captum's `LayerGradientXActivation.attribute`.

        Raises:
            TypeError: `forward_func` is no module.
        """
        model = self.forward_func
        if not isinstance(model, nn.Module):
            raise TypeError(
                "expected a module as forward_func, in which the rules find the activations; got "
                f"{type(model).__name__}: wrap it in a module, or use LLMGradientAttribution"
            )
        with differentiable(model), self.surround(model):
            gradients, values = compute_layer_gradients_and_eval(
                model,
                self.layer,
                inputs,
                target,
                additional_forward_args,
                attribute_to_layer_input=attribute_to_layer_input,
                grad_kwargs=grad_kwargs,
            )
        several = not isinstance(self.layer, nn.Module)
        pairs = zip(gradients, values, strict=True) if several else [(gradients, values)]
        relevances = [NORMS["sum"]((g[0] * v[0]).detach()) for g, v in pairs]
        return relevances if several else relevances[0]
