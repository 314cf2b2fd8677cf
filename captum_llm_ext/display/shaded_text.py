"""A prompt as running text, each token shaded by its attribution."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from captum_llm_ext.display.figures import (
    LARGEST,
    add_color_bar,
    axes_size,
    families,
    label_style,
    open_figure,
)
from captum_llm_ext.display.fonts import drawable
from captum_llm_ext.display.scale import ColorScale, FloatArray, text_color
from captum_llm_ext.inputs.token_text import readable_tokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CHARACTERS_PER_LINE = 100
_CHARACTER_WIDTH = 0.6  # in units of the font size, for DejaVu Sans Mono
_LINE_HEIGHT = 0.24  # inches
_LONGEST_TOKEN = 60  # characters


def draw_shaded_text(
    values: FloatArray,
    tokens: Sequence[str],
    label: str,
    ax: Axes | None = None,
    scale: ColorScale | None = None,
) -> tuple[Figure, Axes]:
    """Text of the tokens on colours of their values, for prompts too long for bars.

    A token beyond the colours is framed.

    Args:
        values: shape (n_tokens,).
        tokens: entries of the vocabulary, printed by `readable_tokens`.
        label: what the values are.
        ax: axes to draw into; None (default) for a new figure.
        scale: colours of the values; None (default) for `ColorScale.of(values)`.
    """
    from matplotlib.cm import ScalarMappable

    texts = drawable(readable_tokens(tokens, _LONGEST_TOKEN), families(monospace=True))
    for per_line in (1, 2, 4, 8):
        positions = _positions(texts, per_line * _CHARACTERS_PER_LINE)
        last_line, _ = positions[-1]
        if last_line * _LINE_HEIGHT <= LARGEST - 2.0:
            break
    n_lines = last_line + 1
    ends = [column + _width(text) for text, (_, column) in zip(texts, positions, strict=True)]
    n_columns = max(40, *ends)
    width, height = 0.085 * n_columns, max(2.0, n_lines * _LINE_HEIGHT)
    new_figure = ax is None
    figure, ax = open_figure(ax, width + 1.5, height + 0.4)
    ax.set(xlim=(0, n_columns), ylim=(n_lines, 0))
    ax.axis("off")
    scale = scale or ColorScale.of(values)
    add_color_bar(figure, ax, ScalarMappable(scale.norm, scale.colormap), scale, label)
    if not new_figure:
        width, height = axes_size(ax)  # what the colour bar has left of them
    size = 72 * min(0.85 * width / n_columns / _CHARACTER_WIDTH, height / n_lines / 1.3)
    frames = np.where(scale.beyond(values), "black", "none").tolist()
    _draw_tokens(ax, texts, positions, scale.colors(values), frames, size)
    return figure, ax


def _positions(texts: Sequence[str], per_line: int) -> list[tuple[int, int]]:
    """Line and column of each text; a line ends where it is full or a token has a newline."""
    positions, line, column = [], 0, 0
    for text in texts:
        if column and column + _width(text) > per_line:
            line, column = line + 1, 0
        positions.append((line, column))
        column += _width(text)
        if text.endswith("\\n"):
            line, column = line + 1, 0
    return positions


def _width(text: str) -> int:
    """Columns that a text takes in a monospaced font; an ideograph takes two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def _draw_tokens(
    ax: Axes,
    texts: Sequence[str],
    positions: Sequence[tuple[int, int]],
    colors: npt.NDArray[np.float64],
    frames: Sequence[str],
    size: float,
) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    boxes = [
        Rectangle((column, line + 0.06), _width(text), 0.88)
        for text, (line, column) in zip(texts, positions, strict=True)
    ]
    ax.add_collection(PatchCollection(boxes, facecolors=colors, edgecolors=frames))
    style = label_style(texts, monospace=True) | {"fontsize": size, "va": "center"}
    for text, (line, column), color in zip(texts, positions, colors, strict=True):
        ax.text(column, line + 0.5, text, color=text_color(color), **style)
