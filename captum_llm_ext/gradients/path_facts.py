"""What becomes known of a layer's path besides its attributions: scores, cost, convergence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

LEAST_DIFFERENCE = 1e-3  # a smaller score difference is taken for this one


@dataclass
class PathFacts:
    """Of one path, and of the passes over parts of the target together.

    ends: (2, n_checks) the scores at its start and end, of each target token and last of the
    sequence, or of the sequence alone; is_additive: whether the sequence's is the sum of these;
    misses: (n_checks,) by how much of their difference the attributions miss it; n_evaluations:
    points whose gradient was taken, the most for any part; converged: whether adaptive quadrature
    met its tolerance, or None; scores: the sequence score at points of the path; leap: the share
    of the score difference next to the start, where it leaps.
    """

    ends: Tensor
    is_additive: bool = True
    misses: Tensor | None = None
    n_evaluations: int = 0
    converged: bool | None = None
    scores: Mapping[float, float] = field(default_factory=dict)
    leap: float = 0.0

    @property
    def difference(self) -> Tensor:
        """(n_checks,) between the ends."""
        return self.ends[1] - self.ends[0]

    def add_ends(self, ends: Tensor, start: int, stop: int) -> None:
        """Add the scores at the ends, of target tokens start…stop-1 and the sequence of them."""
        if ends.size(1) > 1:
            self.ends[:, start:stop] += ends[:, :-1].to(self.ends)
        self.ends[:, -1] += ends[:, -1].to(self.ends)

    def add_scores(self, seen: Mapping[float, float]) -> None:
        """Add the scores of another part of the sequence, at the points where all are known."""
        if self.scores:
            seen = {a: self.scores[a] + score for a, score in seen.items() if a in self.scores}
        self.scores = dict(seen)

    def judge(self, sums: Tensor) -> None:
        """Compare what the attributions sum to (n_checks,) with the differences."""
        difference = self.difference
        floor = difference_floor(self.ends, self.is_additive)
        self.misses = (sums.to(difference) - difference).abs() / difference.abs().clamp(min=floor)

    @classmethod
    def of_runs(cls, runs: Sequence[PathFacts]) -> PathFacts:
        """Of several paths whose attributions are averaged: each is judged by itself."""
        misses = [run.misses for run in runs if run.misses is not None]
        known = [run.converged for run in runs]
        return cls(
            torch.stack([run.ends for run in runs]).mean(0),
            runs[0].is_additive,
            torch.stack(misses).amax(0) if misses else None,
            sum(run.n_evaluations for run in runs),
            None if None in known else all(known),
            runs[0].scores if len(runs) == 1 else {},
            max(run.leap for run in runs),
        )


def difference_floor(ends: Tensor, is_additive: bool) -> Tensor:
    """(n_checks,) what a smaller score difference is taken for: of probabilities, a share."""
    largest = ends.abs().amax(0).clamp(min=torch.finfo(torch.float32).tiny)
    return LEAST_DIFFERENCE * (torch.ones_like(largest) if is_additive else largest)
