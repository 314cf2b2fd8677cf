"""Bars for the sequence attribution, heat maps for tokens and layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from captum_llm_ext.display.figures import (
    LABEL_SIZE,
    LARGEST,
    TEXT_HEIGHT,
    add_color_bar,
    axes_size,
    families,
    label_style,
    open_figure,
    widest,
)
from captum_llm_ext.display.fonts import drawable
from captum_llm_ext.display.names import mark_spaces, shortened
from captum_llm_ext.display.scale import ColorScale, FloatArray, text_color
from captum_llm_ext.inputs.token_text import readable_tokens

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.container import BarContainer
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

_PAGE = 7.5  # inches: what a page of A4 or letter holds between its margins
_NUMBERED_COLUMNS = 24  # most columns whose cells are wide enough for numbers
_NUMBERED_ROWS = 40
_COLUMNS_PER_BLOCK = 60  # further columns continue in a block below, as lines of text do
_NARROW_CELL = 0.22  # inches
_LOW_CELL = 0.12  # inches
_LONGEST_LABEL = 28  # characters
_LONGEST_WRAPPED_LABEL = 16
_MARGIN = 2.0  # inches for the colour bar and the edges
_BROKEN_BAR, _BREAK = 1.3, 1.15  # height of a broken bar, and of its gap: limits of the scale


def draw_bars(
    values: FloatArray,
    tokens: Sequence[str],
    label: str,
    ax: Axes | None = None,
    scale: ColorScale | None = None,
    spread: FloatArray | None = None,
) -> tuple[Figure, Axes]:
    """Bar plot of one value per token, which stands at its bar.

    A bar beyond the scale is broken, and so is the axis beside it.

    Args:
        values: shape (n_tokens,).
        tokens: entries of the vocabulary, labelled by `readable_tokens`.
        label: what the values are.
        ax: axes to draw into; None (default) for a new figure.
        scale: where a bar is broken; None (default) for `ColorScale.of(values)`: nowhere.
        spread: shape (n_tokens,), half the length of an interval at each bar; None (default).
    """
    scale = scale or ColorScale.of(values)
    beyond, broken = scale.beyond(values), np.copysign(_BROKEN_BAR * scale.limit, values)
    width = axes_size(ax)[0] if ax else _bars_width(len(values))
    figure, ax = open_figure(ax, width, 4.8)
    bars = ax.bar(
        range(len(values)),
        np.where(beyond, broken, np.nan_to_num(values)),
        color=np.where(values < 0, "#c0392b", "#2f6db3"),
        edgecolor="white",
    )
    if spread is not None:
        ends = np.nan_to_num(spread)
        ax.errorbar(range(len(values)), values, ends, fmt="none", ecolor="#444444", capsize=2.0)
    ax.axhline(0.0, color="black", linewidth=0.8)
    ax.spines[["right", "bottom"]].set_visible(False)
    ax.margins(x=0.01, y=0.1)
    ax.set_ylabel(label)
    if spread is None:
        _write_values(ax, bars, values, scale, width / len(values))
    if beyond.any():
        _break_axis(ax, beyond.nonzero()[0], values, scale.limit)
    _label_columns(ax, _labels(tokens), width)
    return figure, ax


def _bars_width(n_bars: int) -> float:
    """Inches: as wide as a page for up to 60 bars, and for more in proportion."""
    return min(max(0.4 * n_bars + 1.0, 6.4), max(_PAGE, _PAGE * n_bars / 60), LARGEST)


def _write_values(
    ax: Axes, bars: BarContainer, values: FloatArray, scale: ColorScale, per_bar: float
) -> None:
    """Write each value at its bar: upright where bars of `per_bar` inches are too narrow."""
    texts = [scale.format(float(value)) for value in values]
    upright = per_bar < widest(texts)
    size = max(5.5, min(LABEL_SIZE, 58 * per_bar))
    if per_bar < 0.7 * TEXT_HEIGHT:  # no room but for those that the bars do not show
        texts = [text if cut else "" for text, cut in zip(texts, scale.beyond(values), strict=True)]
    ax.bar_label(bars, texts, fontsize=size, padding=2, rotation=90 if upright else 0)
    if upright:
        ax.margins(y=(widest(texts) + 0.1) / axes_size(ax)[1])


def _break_axis(ax: Axes, broken: npt.NDArray[np.intp], values: FloatArray, limit: float) -> None:
    """Gaps in the broken bars and in the axis beside them, which has no ticks beyond."""
    ax.set_yticks([tick for tick in ax.get_yticks() if abs(tick) <= limit])
    for bar in broken:
        height = np.copysign(_BREAK * limit, values[bar])
        slant = [height - 0.02 * limit, height + 0.02 * limit]
        beside = ax.get_yaxis_transform()  # the axis is at 0, whatever the bars
        mark = np.array([-0.07, 0.07]) / axes_size(ax)[0]
        for color, thickness in (("black", 6.0), ("white", 4.0)):
            style: dict[str, Any] = {
                "color": color,
                "linewidth": thickness,
                "solid_capstyle": "butt",
                "zorder": 3,
            }
            ax.plot([bar - 0.48, bar + 0.48], slant, **style)
            ax.plot(mark, slant, transform=beside, clip_on=False, **style)


def draw_heat_map(
    values: FloatArray,
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    label: str,
    ax: Axes | None = None,
    scale: ColorScale | None = None,
) -> tuple[Figure, Axes]:
    """Heat map; more than 60 columns continue in blocks below, as lines of text do.

    Args:
        values: shape (n_rows, n_columns); values that are not finite are grey.
        row_labels, column_labels: tokens or names; long ones are cut.
        label: what the values are.
        ax: axes to draw into; None (default) for a new figure. These axes keep their size, with
            all columns in one block and only the labels that fit.
        scale: colours of the values; None (default) for `ColorScale.of(values)`.
    """
    rows, columns = _labels(row_labels), _labels(column_labels)
    if ax is not None:
        layout = _Layout.in_axes(ax, len(rows), len(columns))
    elif len(columns) > _COLUMNS_PER_BLOCK:
        columns = _labels(column_labels, _LONGEST_WRAPPED_LABEL)
        layout = _Layout.in_blocks(len(rows), columns)
    else:
        layout = _Layout.in_one_block(len(rows), columns)
    figure, ax = open_figure(ax, *layout.figure_size(widest(rows)))
    scale = scale or ColorScale.of(values)
    image = layout.draw(ax, values, scale)
    add_color_bar(figure, ax, image, scale, label)
    if layout.n_blocks > 1:
        _label_blocks(ax, layout, rows, columns)
    else:
        _label_rows(ax, layout, rows)
        _label_columns(ax, columns, layout.cell_width * len(columns))
        _write_numbers(ax, layout, values, scale)
    return figure, ax


@dataclass(frozen=True)
class _Layout:
    """Positions of the cells of a heat map; lengths in inches."""

    n_rows: int
    n_columns: int
    columns_per_block: int
    cell_width: float
    cell_height: float
    header: float  # height of the slanted column labels

    @property
    def n_blocks(self) -> int:
        return max(1, math.ceil(self.n_columns / self.columns_per_block))

    @property
    def gap(self) -> int:
        """Height of the column labels above a block, in rows of cells."""
        return math.ceil(self.header / self.cell_height) if self.n_blocks > 1 else 0

    @property
    def height(self) -> float:
        """Height of all blocks and their column labels."""
        return self.n_blocks * (self.n_rows * self.cell_height + self.header)

    @classmethod
    def in_axes(cls, ax: Axes, n_rows: int, n_columns: int) -> _Layout:
        width, height = axes_size(ax)
        return cls(n_rows, n_columns, n_columns, 0.85 * width / n_columns, height / n_rows, 0.0)

    @classmethod
    def in_one_block(cls, n_rows: int, columns: Sequence[str]) -> _Layout:
        numbered = len(columns) <= _NUMBERED_COLUMNS
        width = max(0.55 if numbered else _NARROW_CELL, 4.0 / max(len(columns), 1))
        height = max(
            0.3 if numbered and n_rows <= _NUMBERED_ROWS else 0.16, min(1.2, 2.4 / max(n_rows, 1))
        )
        header = _header(columns)
        height = min(height, (LARGEST - header - 1.0) / max(n_rows, 1))
        return cls(n_rows, len(columns), len(columns), width, height, header)

    @classmethod
    def in_blocks(cls, n_rows: int, columns: Sequence[str]) -> _Layout:
        """The narrowest blocks of readable rows in a figure that is not too large."""
        header, most_columns = _header(columns), int((LARGEST - 5.0) / _NARROW_CELL)
        for per_block in range(_COLUMNS_PER_BLOCK, most_columns + 1, 10):
            n_blocks = math.ceil(len(columns) / per_block)
            height = min(0.16, ((LARGEST - 2.0) / n_blocks - header) / n_rows)
            layout = cls(n_rows, len(columns), per_block, _NARROW_CELL, height, header)
            if height >= _LOW_CELL:
                return layout
        if height >= 0.02:  # some row labels are left out
            return layout
        return cls(n_rows, len(columns), len(columns), LARGEST / len(columns), _LOW_CELL, header)

    def figure_size(self, row_label_width: float) -> tuple[float, float]:
        width = min(self.columns_per_block, self.n_columns) * self.cell_width
        return width + row_label_width + _MARGIN, self.height + 0.4

    def draw(self, ax: Axes, values: FloatArray, scale: ColorScale) -> AxesImage:
        """Draw each block as an image below the one before it; return the first image."""
        images = []
        for block in range(self.n_blocks):
            part = values[:, block * self.columns_per_block :][:, : self.columns_per_block]
            top = self.top(block) - 0.5
            images.append(
                ax.imshow(
                    part,
                    cmap=scale.colormap,
                    norm=scale.norm,
                    aspect="auto",
                    interpolation="nearest",
                    extent=(-0.5, part.shape[1] - 0.5, top + self.n_rows, top),
                )
            )
        bottom = self.top(self.n_blocks - 1) + self.n_rows - 0.5
        ax.set(xlim=(-0.5, self.columns_per_block - 0.5), ylim=(bottom, -0.5))
        return images[0]

    def top(self, block: int) -> int:
        """Row where the cells of a block begin."""
        return block * (self.gap + self.n_rows) + self.gap


def _labels(tokens: Sequence[str], limit: int = _LONGEST_LABEL) -> list[str]:
    """Tokens as labels, without the leading space that would shift them, if it tells none apart."""
    texts = [text.strip() for text in mark_spaces(readable_tokens(tokens))]
    return shortened(drawable(texts, families()), limit)


def _header(columns: Sequence[str]) -> float:
    return 0.15 + 0.65 * widest(columns)


def _label_step(inches: float) -> int:
    """Step from one printed label to the next, so that labels `inches` apart do not overlap."""
    return max(1, math.ceil(TEXT_HEIGHT / max(inches, 1e-6) - 0.15))


def _label_columns(ax: Axes, labels: Sequence[str], width: float) -> None:
    per_column = width / max(len(labels), 1)
    upright = per_column < TEXT_HEIGHT / 0.7  # slanted labels are closer than their columns
    size = max(5.5, min(LABEL_SIZE, 58 * per_column)) if upright else LABEL_SIZE
    step = _label_step(per_column * LABEL_SIZE / size if upright else 0.7 * per_column)
    ax.tick_params(top=True, bottom=False, labeltop=True, labelbottom=False)
    ax.set_xticks(
        range(0, len(labels), step),
        labels=labels[::step],
        rotation=90 if upright else 45,
        ha="center" if upright else "left",
        rotation_mode="default" if upright else "anchor",
        fontsize=size,
        **label_style(labels),
    )


def _label_rows(ax: Axes, layout: _Layout, labels: Sequence[str]) -> None:
    labelled = range(0, len(labels), _label_step(layout.cell_height))
    ax.set_yticks(
        [layout.top(block) + row for block in range(layout.n_blocks) for row in labelled],
        labels=[labels[row] for row in labelled] * layout.n_blocks,
        fontsize=LABEL_SIZE,
        **label_style(labels),
    )


def _label_blocks(ax: Axes, layout: _Layout, rows: Sequence[str], columns: Sequence[str]) -> None:
    _label_rows(ax, layout, rows)
    style = label_style(columns) | {
        "rotation": 45,
        "rotation_mode": "anchor",
        "fontsize": LABEL_SIZE,
    }
    for column, text in enumerate(columns):
        block, x = divmod(column, layout.columns_per_block)
        ax.text(x, layout.top(block) - 0.7, text, ha="left", va="bottom", **style)
    ax.set_xticks([])
    ax.spines[:].set_visible(False)


def _write_numbers(ax: Axes, layout: _Layout, values: FloatArray, scale: ColorScale) -> None:
    """Write the values into the cells where these are large enough."""
    if (
        layout.n_rows > _NUMBERED_ROWS
        or layout.cell_width < 0.35
        or layout.cell_height < TEXT_HEIGHT
    ):
        return
    size = min(LABEL_SIZE, 72 * layout.cell_width / 4.2)
    colors = scale.colors(values)
    for row, column in np.ndindex(values.shape):
        text = scale.format(float(values[row, column]))
        color = text_color(colors[row, column])
        ax.text(column, row, text, ha="center", va="center", color=color, fontsize=size)
