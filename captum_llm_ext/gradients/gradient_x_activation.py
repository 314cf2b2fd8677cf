"""Gradient x activation: the layer's value times the gradient of the score there."""

from __future__ import annotations

from captum.attr import LayerGradientXActivation

from captum_llm_ext.gradients.method import GradientMethod


class GradientXActivation(GradientMethod):
    """Drives ``captum.attr.LayerGradientXActivation``."""

    drives = LayerGradientXActivation

    def __init__(self, multiplies: bool = True) -> None:
        self.multiplies = multiplies

    @classmethod
    def of(cls, attr_method: LayerGradientXActivation) -> GradientXActivation:  # type: ignore[override]
        return cls(attr_method.multiplies_by_inputs)
