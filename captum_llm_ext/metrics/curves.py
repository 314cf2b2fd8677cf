"""Scores while features are removed, or put in, in a given order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

FRACTIONS = (0.01, 0.05, 0.1, 0.2, 0.5)  # of the features, as in ERASER
MEASURES = ("deletion", "insertion", "comprehensiveness", "sufficiency")


@dataclass(frozen=True)
class RemovalCurves:
    """Deletion and insertion curves of several orders of the features.

    Attributes:
        counts: (n_points,) how many features are removed, or put in, at each point: from none to
            all of them.
        deletion: (n_orders, n_points) scores with the first features of the order removed.
        insertion: (n_orders, n_points) scores with no features but the first of the order.
        fractions: of the features, at which comprehensiveness and sufficiency are read.
    """

    counts: Tensor
    deletion: Tensor
    insertion: Tensor
    fractions: tuple[float, ...] = FRACTIONS

    def __len__(self) -> int:
        return len(self.deletion)

    def __getitem__(self, orders: slice) -> RemovalCurves:
        """The curves of some of the orders."""
        return replace(self, deletion=self.deletion[orders], insertion=self.insertion[orders])

    @property
    def deletion_area(self) -> Tensor:
        """(n_orders,) mean drop of the score over the deletion curve: the larger, the better.

        The area between the curve and the whole prompt's score, over the share of features
        removed (trapezoidal rule).
        """
        return self.deletion[:, 0] - self._area(self.deletion)

    @property
    def insertion_area(self) -> Tensor:
        """(n_orders,) mean gain of the score over the insertion curve: the larger, the better.

        The area between the curve and the score of the prompt without features.
        """
        return self._area(self.insertion) - self.insertion[:, 0]

    @property
    def comprehensiveness(self) -> Tensor:
        """(n_orders,) drop when the first features go, mean over `fractions`: larger is better."""
        return (self.deletion[:, :1] - self.deletion[:, self._places]).mean(1)

    @property
    def sufficiency(self) -> Tensor:
        """(n_orders,) drop when only the first features stay, mean over `fractions`: smaller is
        better."""
        return (self.insertion[:, -1:] - self.insertion[:, self._places]).mean(1)

    def measures(self) -> dict[str, Tensor]:
        """Each of `MEASURES` → (n_orders,)."""
        values = (
            self.deletion_area,
            self.insertion_area,
            self.comprehensiveness,
            self.sufficiency,
        )
        return dict(zip(MEASURES, values, strict=True))

    def _area(self, curves: Tensor) -> Tensor:
        return torch.trapezoid(curves, self.counts / self.counts[-1])

    @property
    def _places(self) -> Tensor:
        wanted = torch.tensor(_at(self.fractions, int(self.counts[-1])))
        return torch.searchsorted(self.counts, wanted)


def removal_counts(n_features: int, n_steps: int, fractions: Sequence[float]) -> Tensor:
    """(n_points,) how many features are gone at each point: evenly, and at the fractions."""
    steps = min(n_steps, n_features)
    even = [round(n_features * step / steps) for step in range(steps + 1)]
    return torch.tensor(sorted({*even, *_at(fractions, n_features)}))


def removal_rows(orders: Tensor, counts: Tensor) -> Tensor:
    """(2, n_orders, n_points, n_features) 1 where a feature is present: deletion, then insertion.

    orders: (n_orders, n_features); counts: (n_points,) how many of the first ones are chosen.
    """
    places = orders.argsort(1)[:, None]
    first = places < counts[:, None]
    return torch.stack([~first, first]).float()


def _at(fractions: Sequence[float], n_features: int) -> list[int]:
    """How many features a fraction is, rounded up: at least one."""
    return [math.ceil(round(fraction * n_features, 6)) or 1 for fraction in fractions]
