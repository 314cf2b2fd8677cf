"""Relevance: value times gradient under rules by which relevance is handed down conserved."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from captum_llm_ext.compat import compute_layer_gradients_and_eval
from captum_llm_ext.gradients.method import NORMS, LayerMethod
from captum_llm_ext.model.relevance_rules import RULES, relevance_rules
from captum_llm_ext.model.hooks import differentiable


class LayerRelevance(LayerMethod):
    """TODO"""

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
        """
        model: Any = self.forward_func
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
