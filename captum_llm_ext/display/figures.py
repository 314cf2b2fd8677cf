"""Axes, fonts and sizes that all plots share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from captum_llm_ext.display.fonts import drawable, fonts_for
from captum_llm_ext.display.scale import ColorScale

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

LARGEST = 70.0  # inches: 7,000 pixels at 100 dots per inch
TEXT_HEIGHT = 0.13  # inches per line of a label
TEXT_WIDTH = 0.075  # inches per character of a label
LABEL_SIZE = 8.0  # points


def families(monospace: bool = False) -> list[str]:
    """The fonts that the user chose, or monospaced ones."""
    from matplotlib import rcParams

    return ["monospace"] if monospace else list(rcParams["font.family"])


def label_style(texts: Sequence[str] = (), monospace: bool = False) -> dict[str, Any]:
    """Text properties for labels: no mathematics, and fonts that have their characters."""
    return {
        "parse_math": False,
        "usetex": False,
        "fontfamily": fonts_for(texts, families(monospace)),
    }


def open_figure(ax: Axes | None, width: float, height: float) -> tuple[Figure, Axes]:
    """`ax` with its figure, or for None the axes of a new figure of width by height inches."""
    if ax is not None:
        return ax.figure.figure, ax  # the axes of a subfigure: the figure around it
    import matplotlib.pyplot as plt

    size = (min(width, LARGEST), min(height, LARGEST))
    figure, axes = plt.subplots(figsize=size, layout="constrained", facecolor="white")
    return figure, axes


def sized_axes(ax: Axes | None, figsize: tuple[float, float] | None) -> Axes | None:
    """`ax`, or the axes of a new figure of `figsize` inches, or None where neither is given.

    Raises:
        ValueError: both are given.
    """
    if figsize is None:
        return ax
    if ax is not None:
        raise ValueError("figsize is of a new figure, and ax belongs to one: give one of them")
    return open_figure(None, *figsize)[1]


def finished(
    drawn: tuple[Figure, Axes], show: bool, title: str | None = None
) -> tuple[Figure, Axes] | None:
    """A plot with its title, returned, or shown and not returned."""
    if title is not None:
        (title,) = drawable([title], families())
        drawn[1].set_title(title, fontsize=11.0, **label_style([title]))
    if not show:
        return drawn
    import matplotlib.pyplot as plt

    plt.show()
    return None


def say_below(figure: Figure, lines: Sequence[str]) -> None:
    """Write small lines at the foot of a figure."""
    inches = figure.get_size_inches()
    size = min(6.5, 72 * inches[0] / (0.62 * max(map(len, lines), default=1)))
    shown = drawable(lines, families())
    style = label_style(shown) | {"fontsize": max(size, 3.0), "color": "#444444"}
    figure.supxlabel("\n".join(shown), x=0.01, ha="left", **style)


def axes_size(ax: Axes) -> tuple[float, float]:
    """Width and height of axes in inches."""
    box = ax.get_window_extent()
    dots = ax.figure.dpi
    return box.width / dots, box.height / dots


def widest(labels: Sequence[str]) -> float:
    """Width of the longest label in inches."""
    return TEXT_WIDTH * max(map(len, labels), default=0)


def add_color_bar(
    figure: Figure, ax: Axes, image: ScalarMappable, scale: ColorScale, name: str
) -> None:
    """A colour bar that fits on a screen, with arrows where a value lies beyond its colours."""
    height = figure.get_size_inches()[1]
    bar = figure.colorbar(
        image,
        ax=ax,
        extend=("both" if scale.signed else "max") if scale.is_cut else "neither",
        shrink=min(1.0, 5.0 / height),
        anchor=(0.0, 1.0),
        aspect=20 * min(1.0, max(0.3, height / 5.0)),
        pad=0.02,
    )
    bar.set_label(scale.label(name), rotation=-90, va="bottom", wrap=True)
