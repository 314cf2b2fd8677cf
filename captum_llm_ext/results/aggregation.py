"""Attributions of many prompts as one table and one plot: means by word, value or position."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from captum_llm_ext.display import draw_measures, finished, sized_axes
from captum_llm_ext.results.single import LLMAttributionResult
from captum_llm_ext.results.tables import Table, largest

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

Group = Callable[[str], str | None]
Values = npt.NDArray[np.float64]

N_RESAMPLED = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Aggregate:
    """Mean attributions of groups of features over many results, with their intervals.

    Args:
        names: n_groups names, the largest mean first; positions in their order.
        means: shape (n_groups,), over the results that have the group.
        intervals: shape (n_groups, 2), 95 % confidence intervals of the means by the bootstrap over
            results; equal to the mean where one result alone has the group.
        counts: how many results have each group.

    Raises:
        TypeError: an argument is missing.

    Example:
        >>> results = [
        ...     LLMAttributionResult(
        ...         input_tokens=["the", "cat"], output_tokens=["sat"], seq_attr=[1.0, value]
        ...     )
        ...     for value in (2.0, 4.0)
        ... ]
        >>> aggregate(results, by="token")
        name  mean  low  high  results
        cat      3    2     4        2
        the      1    1     1        2
    """

    names: list[str]
    means: Values
    intervals: Values
    counts: list[int]

    def __len__(self) -> int:
        return len(self.names)

    def table(self, top: int | None = None) -> Table:
        """The rows as a `Table`, of text, HTML or a data frame.

        Args:
            top: how many groups of largest mean; None (default) for all.
        """
        rows = [
            (self.names[i], float(self.means[i]), *map(float, self.intervals[i]), self.counts[i])
            for i in self._kept(top)
        ]
        return Table(["name", "mean", "low", "high", "results"], rows)

    def to_dataframe(self) -> DataFrame:
        """The columns name, mean, low, high and results (``captum-llm-ext[export]``)."""
        return self.table().to_dataframe()

    def plot(
        self,
        show: bool = False,
        ax: Axes | None = None,
        figsize: tuple[float, float] | None = None,
        title: str | None = None,
        top: int | None = 30,
    ) -> tuple[Figure, Axes] | None:
        """Bars of the means, with their intervals.

        Args:
            show: True shows the plot and returns None; False (default) returns (figure, axes).
            ax: axes to draw into; None (default) for a new figure.
            figsize: width and height of a new figure in inches; None (default) for what fits.
            title: a line above the plot; None (default) for none.
            top: how many groups of largest mean (default 30); None for all.
        """
        kept = self._kept(top)
        drawn = draw_measures(
            [self.names[i] for i in kept],
            {"": self.means[kept]},
            {"": self.intervals[kept]},
            "mean attribution, 95 % interval over prompts",
            sized_axes(ax, figsize),
        )
        return finished(drawn, show, title)

    def _kept(self, top: int | None) -> list[int]:
        return sorted(largest(self.means.astype(np.float32), top))

    def __repr__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table().to_html()


def aggregate(
    results: Iterable[LLMAttributionResult],
    by: str | Group = "word",
    normalise: bool = False,
    seed: int = 0,
) -> Aggregate:
    """Mean attributions over many prompts, of each group of features.

    The features of one group in one result are added; the mean is over the results that have the
    group. Attributions to the whole target count.

    Args:
        results: at least one, of any inputs.
        by: "word" (default), "token", "position" (of the feature, from 0), "value" (the name of
            each field of a template, or its number), or a function from a feature's label to the
            name of its group, None to leave it out.
        normalise: divide each result by the sum of its magnitudes first, so that each counts alike
            (default False).
        seed: of the bootstrap's draws (default 0).

    Returns:
        An `Aggregate`, which prints as a table and has `plot`.

    Raises:
        ValueError: there are no results, `by` is unknown, or no feature has a group.

    Example:
        >>> prompts = ["The capital of France is", "The capital of Japan is"]
        >>> results = [explain(model, tokenizer, p, method="ablation") for p in prompts]
        >>> sorted(aggregate(results, by="word").names)
        ['France', 'Japan', 'The', 'capital', 'is', 'of']
    """
    groups: dict[str, list[float]] = {}
    n_results = 0
    for result in results:
        n_results += 1
        for name, value in _sums(result.normalise() if normalise else result, by).items():
            groups.setdefault(name, []).append(value)
    if not groups:
        found = "no feature has a group" if n_results else "there are no results"
        raise ValueError(f"aggregate: {found}; expected results whose features have one")
    names = list(groups)
    means = np.array([np.mean(groups[name]) for name in names])
    order = np.arange(len(names)) if by == "position" else np.argsort(-np.abs(means), kind="stable")
    random = np.random.default_rng(seed)
    intervals = np.array([_interval(np.array(groups[names[i]]), random) for i in order])
    return Aggregate(
        [names[i] for i in order], means[order], intervals, [len(groups[names[i]]) for i in order]
    )


def _sums(result: LLMAttributionResult, by: str | Group) -> dict[str, float]:
    """Group → the sum of its features' attributions, in one result."""
    if not callable(by) and by not in _NAMES:
        raise ValueError(f"by: expected one of {', '.join(_NAMES)} or a function, got {by!r}")
    if by == "word":
        result = result.merge("word")
    names = [by(label) for label in result.labels] if callable(by) else _NAMES[by](result)
    sums: dict[str, float] = {}
    for name, value in zip(names, result.seq_attr.tolist(), strict=True):
        if name is not None:
            sums[name] = sums.get(name, 0.0) + value
    return sums


def _fields(result: LLMAttributionResult) -> list[str]:
    """The names of a template's fields, or their numbers."""
    keys = getattr(result.inp, "dict_keys", None)
    return list(keys) if keys else _positions(result)


def _positions(result: LLMAttributionResult) -> list[str]:
    return [str(i) for i in range(len(result.input_tokens))]


_NAMES: dict[str, Callable[[Any], Sequence[str]]] = {
    "word": lambda result: [label.strip() for label in result.labels],
    "token": lambda result: [label.strip() for label in result.labels],
    "position": _positions,
    "value": _fields,
}


def _interval(values: Values, random: np.random.Generator) -> tuple[float, float]:
    """Percentiles of the means of resampled values."""
    drawn = random.integers(len(values), size=(N_RESAMPLED, len(values)))
    low, high = np.quantile(values[drawn].mean(1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
