"""Adaptive quadrature of a path: halve the intervals whose attributions miss the score difference.

In exact arithmetic the attributions of an interval sum to the score at its end less the score at
its start (completeness, Sundararajan et al. 2017, https://arxiv.org/abs/1703.01365). The scores
are cheap and exact, so the mismatch says where the path is not smooth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from captum_llm_ext.model.layers import Site

if TYPE_CHECKING:
    from captum_llm_ext.gradients.path import LayerPath
    from captum_llm_ext.gradients.totals import LayerTotal

FIRST_INTERVALS = 8
POINTS = 3  # of the Gauss-Legendre rule in each interval
FEWEST_POINTS = FIRST_INTERVALS * POINTS
NEAR_START = 1e-4  # where the score is compared with that at the start, in search of a leap


@dataclass
class Interval:
    """A part of the path, its attributions, and the scores (n_checks,) at its ends.

    error: how far the attributions miss their difference, relative to that of the whole path.
    """

    start: float
    stop: float
    totals: dict[Site, LayerTotal]
    score_start: Tensor
    score_stop: Tensor
    error: float = 0.0

    @property
    def middle(self) -> float:
        return (self.start + self.stop) / 2


def walk_adaptively(path: LayerPath, tolerance: float, max_evaluations: int) -> None:
    """Add the path's attributions to its totals, to the tolerance or as far as the budget goes.

    The tolerance is on the summed errors of the intervals. The error of one is that of the
    sequence or of its worst target token, whichever is larger, relative to `LayerPath.scale`.
    """
    edges = _first_edges(path)
    scores = path.scores(edges)
    intervals = _measure(path, list(pairwise(edges.tolist())), list(pairwise(scores)))
    n_points = POINTS * len(intervals)
    while True:
        errors = [interval.error for interval in intervals]
        converged = sum(errors) <= tolerance
        affordable = (max_evaluations - n_points) // (2 * POINTS)
        worst = _worst(errors, tolerance, path.plan.rows, affordable)
        if converged or not worst:
            break
        halves = _halved(path, [intervals[i] for i in worst])
        n_points += POINTS * len(halves)
        intervals = [x for i, x in enumerate(intervals) if i not in worst] + halves
    _add_hidden(path, intervals)
    for interval in sorted(intervals, key=lambda x: x.start):
        for site in path.read:
            path.totals[site].add_total(interval.totals[site])
    path.record(n_points, converged)


def _first_edges(path: LayerPath) -> Tensor:
    """Even intervals; a leap next to the start, which they would step over, has one of them."""
    if not path.leap:
        return torch.linspace(0, 1, FIRST_INTERVALS + 1)
    even = torch.linspace(0, 1, FIRST_INTERVALS)
    return torch.cat([even[:1], torch.tensor([NEAR_START]), even[1:]])


def _measure(
    path: LayerPath,
    edges: Sequence[tuple[float, float]],
    scores: Sequence[tuple[Tensor, Tensor]],
) -> list[Interval]:
    """The intervals between these edges, with the scores there, and their attributions."""
    intervals = [
        Interval(*ends, {s: path.totals[s].empty(hidden=False) for s in path.read}, *at_ends)
        for ends, at_ends in zip(edges, scores, strict=True)
    ]
    _add_gradients(path, intervals)
    for interval in intervals:
        difference = interval.score_stop - interval.score_start
        mismatch = path.sums(interval.totals).to(difference) - difference
        interval.error = float((mismatch.abs() / path.scale).max())
    return intervals


def _halved(path: LayerPath, parents: Sequence[Interval]) -> list[Interval]:
    """Both halves of each interval."""
    middles = path.scores(torch.tensor([parent.middle for parent in parents]))
    edges, scores = [], []
    for parent, score in zip(parents, middles, strict=True):
        edges += [(parent.start, parent.middle), (parent.middle, parent.stop)]
        scores += [(parent.score_start, score), (score, parent.score_stop)]
    return _measure(path, edges, scores)


def _add_gradients(
    path: LayerPath,
    intervals: Sequence[Interval],
    into: Mapping[Site, LayerTotal] | None = None,
) -> None:
    """Add the gradients of each interval to its totals, or of all of them to `into`."""
    nodes, weights = np.polynomial.legendre.leggauss(POINTS)
    at_once = max(1, path.plan.rows // POINTS)
    for i in range(0, len(intervals), at_once):
        chunk = intervals[i : i + at_once]
        points = [x.middle + (x.stop - x.start) / 2 * nodes for x in chunk]
        shares = [(x.stop - x.start) / 2 * weights for x in chunk]
        ends = [(x.start, x.stop) for x in chunk]
        totals = [into or x.totals for x in chunk]
        path.add_intervals(_floats(points), _floats(shares), ends, totals)


def _floats(arrays: Sequence[np.ndarray]) -> Tensor:
    return torch.tensor(np.concatenate(arrays), dtype=torch.float32)


def _worst(errors: Sequence[float], tolerance: float, rows: int, affordable: int) -> list[int]:
    """Which intervals to halve: the worst, until the others would do, as many as fit in a pass."""
    most = min(affordable, max(1, rows // (2 * POINTS)))
    order = sorted(range(len(errors)), key=lambda i: -errors[i])
    left = sum(errors)
    chosen: list[int] = []
    for i in order[: max(0, most)]:
        if left <= tolerance / 2:
            break
        chosen.append(i)
        left -= errors[i]
    return chosen


def _add_hidden(path: LayerPath, intervals: Sequence[Interval]) -> None:
    """Add the hidden units, too large to be held for each interval, by a second run."""
    if all(path.totals[site].hidden is None for site in path.read):
        return
    fresh = {site: path.totals[site].empty() for site in path.read}
    _add_gradients(path, intervals, into=fresh)
    for site, total in fresh.items():
        hidden = path.totals[site].hidden
        if hidden is not None and total.hidden is not None:
            hidden += total.hidden
