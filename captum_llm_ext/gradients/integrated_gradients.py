"""Integrated gradients: gradients along the straight path of a layer, from baseline to input."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from captum.attr import LayerIntegratedGradients
from torch import nn

from captum_llm_ext.compat import FIXED_RULES, approximation_parameters
from captum_llm_ext.gradients.adaptive import FEWEST_POINTS, walk_adaptively
from captum_llm_ext.gradients.method import DIFFERENCE, GradientMethod
from captum_llm_ext.gradients.path import LayerPath
from captum_llm_ext.gradients.totals import LayerTotal, Plan
from captum_llm_ext.gradients.trace import Trace
from captum_llm_ext.inputs.baselines import PathStart
from captum_llm_ext.model.layers import Site
from captum_llm_ext.model.lock import holding

ADAPTIVE = "adaptive"


class PathMethod(GradientMethod):
    """A method whose layers walk a straight path, each alone or all together."""

    path_class: type[LayerPath] = LayerPath
    has_path = True

    def __init__(self, points: Quadrature, multiplies: bool = True) -> None:
        self.quadrature, self.multiplies = points, multiplies
        self.n_points, self.divides = points.n_points, points.divides

    def paths(
        self,
        trace: Trace,
        start: PathStart | None,
        plan: Plan,
        totals: Mapping[Site, LayerTotal],
    ) -> Iterator[LayerPath]:
        starts = trace.values_at(start, trace.alive)
        for moved in [trace.alive] if plan.joint else [[site] for site in trace.alive]:
            yield self.path_class(trace, self, plan, totals, starts, moved)

    def run(self, path: LayerPath) -> None:
        self.quadrature.walk(path)
        path.finish()


class IntegratedGradients(PathMethod):
    """Drives ``captum.attr.LayerIntegratedGradients``.

    Sundararajan et al. 2017, https://arxiv.org/abs/1703.01365.
    """

    drives = LayerIntegratedGradients
    options = ("n_steps", "method", "tol", "max_evaluations", "max_rows")

    def __init__(self, points: Quadrature, multiplies: bool = True) -> None:
        super().__init__(points, multiplies)
        self.sums_to = DIFFERENCE if multiplies else None

    @classmethod
    def of(cls, attr_method: LayerIntegratedGradients, **options: Any) -> IntegratedGradients:
        multiplies = attr_method.multiplies_by_inputs
        if options.get("method") == ADAPTIVE and not multiplies:
            raise ValueError('method="adaptive" needs multiply_by_inputs=True: it checks the sums')
        return cls(quadrature(**options), multiplies)


def layer_integrated_gradients(model: nn.Module, layer: Any) -> LayerIntegratedGradients:
    """Captum's method of one or several layers, without its warning of layers that feed others:
    each layer has a path of its own here."""
    with holding(warnings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Multiple layers provided")
        return LayerIntegratedGradients(model, layer)


class Quadrature(Protocol):
    """Chooses the points of a path.

    n_points: the most of them; divides: whether they serve a part of the target as well.
    """

    @property
    def n_points(self) -> int: ...
    @property
    def divides(self) -> bool: ...
    def walk(self, path: LayerPath) -> None:
        """Add the gradients of the path at these points."""


@dataclass(frozen=True)
class FixedQuadrature:
    """Points in [0, 1] and weights that sum to 1."""

    points: list[float]
    weights: list[float]
    divides: bool = True

    @property
    def n_points(self) -> int:
        return len(self.points)

    def walk(self, path: LayerPath) -> None:
        path.add_points(self.points, self.weights)


@dataclass(frozen=True)
class AdaptiveQuadrature:
    """Points where the path needs them, until the sums agree with the scores.

    tolerance: of the sums, relative to the score difference; n_points: the most to spend.
    """

    tolerance: float = 0.05
    n_points: int = 1000
    divides: bool = False  # all target tokens choose the points together

    def walk(self, path: LayerPath) -> None:
        walk_adaptively(path, self.tolerance, self.n_points)


def quadrature(
    n_steps: int | None = None,
    method: str = "gausslegendre",
    tol: float | None = None,
    max_evaluations: int | None = None,
    max_rows: int | None = None,
    more_points: int = 0,
) -> Quadrature:
    """The quadrature that the keywords of `attribute` name; a fixed one has `more_points` points.

    `max_rows` is the former name of `max_evaluations`.
    """
    budget = max_rows if max_evaluations is None else max_evaluations
    if method == ADAPTIVE:
        if n_steps is not None:
            raise ValueError(
                'n_steps belongs to the fixed rules; method="adaptive" takes max_evaluations'
            )
        return _adaptive(0.05 if tol is None else tol, 1000 if budget is None else budget)
    if tol is not None or budget is not None:
        raise ValueError('tol and max_evaluations belong to method="adaptive"')
    n_steps = 50 if n_steps is None else n_steps
    check_steps(method, n_steps)
    weights, points = approximation_parameters(method)
    return FixedQuadrature(points(n_steps + more_points), weights(n_steps + more_points))


def _adaptive(tolerance: float, budget: int) -> AdaptiveQuadrature:
    if not tolerance > 0:
        raise ValueError(f"tol must be greater than 0, got {tolerance}")
    if budget < FEWEST_POINTS:
        raise ValueError(f"max_evaluations must be at least {FEWEST_POINTS}, got {budget}")
    return AdaptiveQuadrature(float(tolerance), budget)


def check_steps(method: str, n_steps: Any) -> None:
    """Refuse rules that Captum does not have, and fewer steps than the rule needs."""
    if method not in FIXED_RULES:
        names = ", ".join([ADAPTIVE, *FIXED_RULES])
        raise ValueError(f"method must be one of {names}; got {method!r}")
    fewest = 1 if method == "gausslegendre" else 2
    if isinstance(n_steps, bool) or not isinstance(n_steps, int) or n_steps < fewest:
        raise ValueError(f"n_steps must be an int >= {fewest} for {method!r}, got {n_steps!r}")
