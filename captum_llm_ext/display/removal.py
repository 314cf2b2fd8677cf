"""Curves of the score as features are removed, and bars of measures of several methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from captum_llm_ext.display.figures import LABEL_SIZE, families, label_style, open_figure, widest
from captum_llm_ext.display.fonts import drawable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Values = npt.NDArray[np.float64]

# Colours that colour-blind readers can tell apart (Okabe and Ito).
_COLORS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7")
_BAR_HEIGHT = 0.2  # inches


def draw_removal_curves(
    shares: Values,
    curves: Mapping[str, Values],
    random: Mapping[str, Values],
    ax: Axes | None = None,
) -> tuple[Figure, Axes]:
    """A curve of each name; the mean of random orders dashed, with its standard deviation.

    Args:
        shares: (n_points,) shares of the features, from 0 to 1.
        curves: name → (n_points,) scores.
        random: name → (n_random, n_points) scores.
        ax: axes to draw into; None (default) for a new figure.
    """
    figure, ax = open_figure(ax, 6.4, 4.4)
    for (name, curve), color in zip(curves.items(), _COLORS, strict=False):
        mean, spread = random[name].mean(0), random[name].std(0)
        ax.fill_between(shares, mean - spread, mean + spread, color=color, alpha=0.15, linewidth=0)
        ax.plot(shares, mean, color=color, linestyle="--", label=f"{name}, random order")
        ax.plot(shares, curve, color=color, marker="o", markersize=3, label=name)
    ax.set_xlabel("share of the features removed (deletion) or put in (insertion)")
    ax.set_ylabel("score of the target")
    ax.spines[["right", "top"]].set_visible(False)
    ax.legend(frameon=False, fontsize=LABEL_SIZE)
    return figure, ax


def draw_measures(
    methods: Sequence[str],
    means: Mapping[str, Values],
    intervals: Mapping[str, Values],
    label: str,
    ax: Axes | None = None,
) -> tuple[Figure, Axes]:
    """Horizontal bars: a group for each method, a bar in it for each measure.

    Args:
        methods: names, the first on top.
        means: measure → (n_methods,).
        intervals: measure → (n_methods, 2) lower and upper ends of the confidence intervals.
        label: what the values are.
        ax: axes to draw into; None (default) for a new figure.
    """
    height = len(methods) * (len(means) * _BAR_HEIGHT + 0.15) + 1.2
    figure, ax = open_figure(ax, 4.8 + widest(methods), height)
    thickness, rows = 0.8 / len(means), np.arange(len(methods))
    for i, (name, values) in enumerate(means.items()):
        low, high = intervals[name].T
        ax.barh(
            rows + (i - (len(means) - 1) / 2) * thickness,
            values,
            thickness,
            xerr=np.stack([values - low, high - values]),
            color=_COLORS[i % len(_COLORS)],
            ecolor="#444444",
            error_kw={"elinewidth": 1.0, "capsize": 2.0},
            label=name,
        )
    ax.axvline(0.0, color="black", linewidth=0.8)
    names = drawable(methods, families())
    ax.set_yticks(rows, labels=names, fontsize=LABEL_SIZE, **label_style(names))
    ax.set_ylim(len(methods) - 0.5, -0.5)
    ax.set_xlabel(label, fontsize=LABEL_SIZE)
    ax.spines[["right", "top"]].set_visible(False)
    if len(means) == 1:
        return figure, ax
    ax.legend(
        frameon=False,
        fontsize=LABEL_SIZE,
        loc="upper left",
        bbox_to_anchor=(0.0, -0.12 * 4.8 / height),
        ncols=len(means),
    )
    return figure, ax
