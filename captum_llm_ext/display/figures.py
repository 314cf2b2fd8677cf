"""Axes, fonts and sizes that all plots share."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure

LARGEST = 70.0  # inches: 7,000 pixels at 100 dots per inch
TEXT_HEIGHT = 0.13  # inches that a line of a label takes
TEXT_WIDTH = 0.075  # inches that a character of a label takes
LABEL_SIZE = 8.0  # points
_MORE_FONTS = (
    "DejaVu Sans",  # has signs that its monospaced sister lacks
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "PingFang SC",
    "Microsoft YaHei",
    "Noto Sans Arabic",
    "Noto Sans Devanagari",
    "Noto Emoji",
    "Segoe UI Emoji",
)


@lru_cache(maxsize=1)
def _installed_fonts() -> tuple[str, ...]:
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    return tuple(name for name in _MORE_FONTS if name in installed)


def label_style(monospace: bool = False) -> dict[str, Any]:
    """Properties of text made of tokens: never mathematics, and any script there is a font for."""
    from matplotlib import rcParams

    families = ["monospace"] if monospace else list(rcParams["font.family"])
    return {
        "parse_math": False,
        "usetex": False,
        "fontfamily": [*families, *_installed_fonts()],
    }


def open_figure(ax: Axes | None, width: float, height: float) -> tuple[Figure, Axes]:
    """The axes given, or new ones in a figure of this size in inches."""
    if ax is not None:
        return ax.figure.figure, ax  # of a subfigure: the figure it is in
    import matplotlib.pyplot as plt

    size = (min(width, LARGEST), min(height, LARGEST))
    figure, axes = plt.subplots(figsize=size, layout="constrained", facecolor="white")
    return figure, axes


def axes_size(ax: Axes) -> tuple[float, float]:
    """Width and height of axes in inches."""
    box = ax.get_window_extent()
    dots = ax.figure.dpi
    return box.width / dots, box.height / dots


def widest(labels: Sequence[str]) -> float:
    """Inches that the longest label takes."""
    return TEXT_WIDTH * max(map(len, labels), default=0)


def add_color_bar(
    figure: Figure, ax: Axes, image: ScalarMappable, label: str, beyond: bool, signed: bool
) -> None:
    """A colour bar no taller than one can see at once, with arrows where values lie beyond it."""
    height = figure.get_size_inches()[1]
    bar = figure.colorbar(
        image,
        ax=ax,
        extend=("both" if signed else "max") if beyond else "neither",
        shrink=min(1.0, 5.0 / height),
        anchor=(0.0, 1.0),
        aspect=20 * min(1.0, max(0.3, height / 5.0)),
        pad=0.02,
    )
    bar.set_label(label, rotation=-90, va="bottom", wrap=True)
