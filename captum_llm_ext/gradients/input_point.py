"""Gradients at the input itself, of any number of layers from one pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from captum_llm_ext.model.layers import Site

if TYPE_CHECKING:
    from captum_llm_ext.gradients.method import GradientMethod
    from captum_llm_ext.gradients.totals import LayerTotal, Plan
    from captum_llm_ext.gradients.trace import Trace


@dataclass
class InputPoint:
    """The input as it is, and the totals of the layers."""

    trace: Trace
    method: GradientMethod
    plan: Plan
    totals: Mapping[Site, LayerTotal]

    def add_gradients(self) -> None:
        """Add the gradients, times the layers' values where the method multiplies."""
        sites, options = self.trace.alive, self.plan.grad_kwargs
        values = {site: self.trace.layers[site].tensor for site in sites}
        wrt, scored = list(values.values()), self.trace.scored
        assert scored is not None, "a trace for paths has no graph"
        for output, gradients in scored.gradients(wrt, self.plan.per_token, **options):
            for site, gradient in zip(sites, gradients, strict=True):
                part = gradient.float()
                if self.method.multiplies:
                    part = part * values[site].detach().float()
                self.totals[site].add(output, part[0])
        self.plan.advance(1)
