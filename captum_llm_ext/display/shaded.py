"""A prompt as running text, every token shaded by its attribution."""

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
    label_style,
    open_figure,
)
from captum_llm_ext.display.scale import ColorScale, FloatArray, text_color
from captum_llm_ext.display.tokens import readable_tokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CHARACTERS_PER_LINE = 100
_CHARACTER_WIDTH = 0.6  # of the font size, for the monospaced font that comes with matplotlib
_LINE_HEIGHT = 0.24  # inches
_LONGEST_TOKEN = 60


def draw_shaded_text(
    values: FloatArray, tokens: Sequence[str], label: str, ax: Axes | None = None
) -> tuple[Figure, Axes]:
    """Text of the tokens on coloured ground, one value per token, for prompts too long for bars.

    Args:
        values: shape (n_tokens,).
        tokens: as the tokenizer gives them; shown by `readable_token`.
        label: what the values are.
        ax: axes to draw into; None (default) for a new figure.
    """
    from matplotlib.cm import ScalarMappable

    texts = readable_tokens(tokens, _LONGEST_TOKEN)
    per_line = _CHARACTERS_PER_LINE
    places = _places(texts, per_line)
    while places[-1][0] * _LINE_HEIGHT > LARGEST - 2.0 and per_line < 8 * _CHARACTERS_PER_LINE:
        per_line *= 2
        places = _places(texts, per_line)
    n_lines = places[-1][0] + 1
    per_line = max(
        40, *(column + _width(text) for text, (_, column) in zip(texts, places, strict=True))
    )
    width, height = 0.085 * per_line, max(2.0, n_lines * _LINE_HEIGHT)
    if ax is not None:
        width, height = axes_size(ax)
    size = 72 * min(0.85 * width / per_line / _CHARACTER_WIDTH, height / n_lines / 1.3)
    figure, ax = open_figure(ax, width + 1.5, height + 0.4)
    ax.set(xlim=(0, per_line), ylim=(n_lines, 0))
    ax.axis("off")
    scale = ColorScale.of(values)
    mappable = ScalarMappable(scale.norm, scale.colormap)
    add_color_bar(figure, ax, mappable, scale.label(label), bool(scale.beyond), scale.signed)
    _draw_tokens(ax, texts, places, scale.colors(values), size)
    return figure, ax


def _places(texts: Sequence[str], per_line: int) -> list[tuple[int, int]]:
    """Line and column of every text; a line ends where it is full or a token has a newline."""
    places, line, column = [], 0, 0
    for text in texts:
        if column and column + _width(text) > per_line:
            line, column = line + 1, 0
        places.append((line, column))
        column += _width(text)
        if text.endswith("\\n"):
            line, column = line + 1, 0
    return places


def _width(text: str) -> int:
    """Columns of a monospaced font: ideographs take two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def _draw_tokens(
    ax: Axes,
    texts: Sequence[str],
    places: Sequence[tuple[int, int]],
    colors: npt.NDArray[np.float64],
    size: float,
) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    boxes = [
        Rectangle((column, line + 0.06), _width(text), 0.88)
        for text, (line, column) in zip(texts, places, strict=True)
    ]
    ax.add_collection(PatchCollection(boxes, facecolors=colors, edgecolors="none"))
    style = label_style(monospace=True) | {"fontsize": size, "va": "center"}
    for text, (line, column), color in zip(texts, places, colors, strict=True):
        ax.text(column, line + 0.5, text, color=text_color(color), **style)
