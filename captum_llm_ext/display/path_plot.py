"""Plot of the score along a path from baseline to input."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from captum_llm_ext.display.figures import open_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray


def draw_path(
    points: NDArray[np.floating], scores: NDArray[np.floating], ax: Axes | None
) -> tuple[Figure, Axes]:
    """Line of the scores, with a tick below it at each point.

    Args:
        points: (n_points,) positions on the path, from 0 (baseline) to 1 (input).
        scores: (n_points,) sequence scores there.
        ax: axes to draw into; None for a new figure.
    """
    figure, ax = open_figure(ax, 8.0, 3.6)
    ax.plot(points, scores, color="#3b6ea8", linewidth=1.0, zorder=2)
    ax.scatter(points, scores, s=9, color="#1d3f66", linewidths=0, zorder=3)
    low, high = float(scores.min()), float(scores.max())
    height = (high - low) or 1.0
    ticks = np.full_like(points, low - 0.1 * height)
    ax.scatter(points, ticks, marker="|", s=60, color="#555555", linewidths=0.6)
    ends = scores[[0, -1]]
    ax.hlines(ends, 0, 1, colors="#999999", linewidth=0.7, linestyles="dotted", zorder=1)
    ax.set(xlim=(-0.02, 1.02), ylim=(low - 0.18 * height, high + 0.08 * height))
    ax.set_xlabel("path: 0 baseline, 1 input (ticks: points taken)")
    ax.set_ylabel("sequence score")
    ax.set_title(f"{len(points)} points, score {ends[0]:.3g} to {ends[1]:.3g}", fontsize=10)
    return figure, ax
