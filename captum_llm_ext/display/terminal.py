"""Attributions as coloured tables in a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from io import StringIO
from typing import IO

import numpy as np
import numpy.typing as npt
from rich.cells import cell_len
from rich.color import Color
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.style import Style
from rich.table import Table
from rich.text import Text

from captum_llm_ext.display.names import mark_spaces, shortened
from captum_llm_ext.display.scale import ColorScale, FloatArray, text_color
from captum_llm_ext.inputs.token_text import readable_tokens

_LONGEST_TABLE = 60  # input tokens; a longer prompt is printed as text
_TOP_TOKENS = 20  # input tokens in the table below the text
_LONGEST_LABEL = 24  # characters
_LONGEST_HEADING = 12
_PADDING = 2


class AttributionText:
    """A rich renderable of one attribution: a table, and shaded text for a long prompt.

    Args:
        title: first line.
        input_tokens, output_tokens: entries of the vocabulary.
        seq_attr: shape (n_input,).
        token_attr: shape (n_output, n_input), or None (default) for the sequence alone.
        footers: further rows, name → numbers below the output columns, shape (n_output,), or below
            the sequence column, shape (1,).
        sink: whether the first token may be an attention sink; see `ColorScale.of`.
    """

    def __init__(
        self,
        title: str,
        input_tokens: Sequence[str],
        output_tokens: Sequence[str],
        seq_attr: FloatArray,
        token_attr: FloatArray | None = None,
        footers: dict[str, FloatArray] | None = None,
        sink: bool = False,
    ) -> None:
        self.title = title
        self.tokens = readable_tokens(input_tokens)
        self.labels = shortened(self.tokens, _LONGEST_LABEL)
        self.headings = ["sequence"]
        self.columns = [seq_attr]
        if token_attr is not None:
            headings = [text.strip() for text in mark_spaces(readable_tokens(output_tokens))]
            self.headings += shortened(headings, _LONGEST_HEADING)
            self.columns += list(token_attr)
        self.footers, self.sink = footers or {}, sink

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.title, style="bold")
        yield Text()
        if len(self.tokens) > _LONGEST_TABLE:
            yield self._shaded_text()
            yield Text()
            order = np.argsort(-np.abs(np.nan_to_num(self.columns[0])), kind="stable")
            yield Text(f"The {_TOP_TOKENS} tokens of largest sequence attribution", style="bold")
            yield from self._tables(options.max_width, order[:_TOP_TOKENS], numbered=True)
        else:
            yield from self._tables(options.max_width, np.arange(len(self.tokens)), numbered=False)

    def _shaded_text(self) -> Text:
        scale = ColorScale.of(self.columns[0], self.sink)
        text = Text()
        for token, color in zip(self.tokens, scale.colors(self.columns[0]), strict=True):
            text.append(token, _style(color))
            if token.endswith("\\n"):
                text.append("\n")
        text.append(f"\n{scale.label('colours: sequence attribution')}", "dim")
        return text

    def _tables(
        self, width: int, rows: npt.NDArray[np.intp], numbered: bool
    ) -> Iterator[RenderableType]:
        """Tables one below the other, each of as many columns as fit into the width."""
        columns = [self._cells(column) for column in range(len(self.columns))]
        widths = [_PADDING + max(map(_cell_width, cells)) for cells in columns]
        labels = [*(self.labels[row] for row in rows), *self.footers]
        width -= min(_LONGEST_LABEL, max(map(cell_len, labels))) + _PADDING
        width -= (len(str(len(self.tokens))) + _PADDING) if numbered else 0
        for block in _blocks(widths, width):
            yield self._table([columns[column] for column in block], rows, numbered)
            yield Text()

    def _cells(self, column: int) -> list[Text]:
        """Heading, cell of each input token and footers of one column."""
        values = self.columns[column]
        # the sequence is the sum of the tokens, so that its scale is another
        scale = ColorScale.of(values if column == 0 else np.stack(self.columns[1:]), self.sink)
        cells = [
            Text(scale.format(float(value)), _style(color))
            for value, color in zip(values, scale.colors(values), strict=True)
        ]
        footers = [Text(_footer(numbers, column)) for numbers in self.footers.values()]
        return [Text(self.headings[column]), *cells, *footers]

    def _table(
        self, columns: Sequence[Sequence[Text]], rows: npt.NDArray[np.intp], numbered: bool
    ) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, _PADDING, 0, 0), header_style="bold")
        if numbered:
            table.add_column("", justify="right", style="dim")
        table.add_column("", no_wrap=True, overflow="ellipsis", max_width=_LONGEST_LABEL)
        for cells in columns:
            width = max(map(_cell_width, cells))
            table.add_column(cells[0], justify="right", no_wrap=True, min_width=width)
        for row in rows:
            number = [Text(str(row))] if numbered else []
            table.add_row(*number, Text(self.labels[row]), *(cells[1 + row] for cells in columns))
        for row, name in enumerate(self.footers, start=1 + len(self.tokens)):
            values = [cells[row] for cells in columns]
            if any(values):
                blank = [Text()] if numbered else []
                table.add_row(*blank, Text(name, style="italic"), *values)
        return table


def _footer(values: FloatArray, column: int) -> str:
    """The number of a footer in a column; a single number belongs to the sequence, column 0."""
    index = column if len(values) == 1 and column == 0 else column - 1
    return f"{values[index]:.3g}" if 0 <= index < len(values) else ""


def _blocks(widths: Sequence[int], total: int) -> Iterator[range]:
    """Consecutive columns that fit into the total width; at least one in each block."""
    start, used = 0, 0
    for column, width in enumerate(widths):
        if column > start and used + width > total:
            yield range(start, column)
            start, used = column, 0
        used += width
    yield range(start, len(widths))


def _cell_width(cell: Text) -> int:
    return cell_len(cell.plain)


def _style(background: npt.NDArray[np.float64]) -> Style:
    red, green, blue = (255 * part for part in background[:3])
    # in hexadecimal, since a terminal's theme can change the named colours
    text = "#000000" if text_color(background) == "black" else "#ffffff"
    return Style(color=text, bgcolor=Color.from_rgb(red, green, blue).name)


def render_text(renderable: RenderableType, color: bool = True, width: int | None = None) -> str:
    """Text for a terminal of `width` columns (None: the current one's), in 256 colours or none."""
    console = Console(
        file=StringIO(),
        width=width,
        force_terminal=color,
        color_system="256" if color else None,
        no_color=not color,
        force_jupyter=False,
        legacy_windows=False,
    )
    with console.capture() as capture:
        console.print(renderable, highlight=False, markup=False, emoji=False)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()).rstrip() + "\n"


def print_text(renderable: RenderableType, file: IO[str] | None = None) -> None:
    """Print to `file` (None: standard output, or the notebook), in colours where it has them."""
    Console(file=file).print(renderable, highlight=False, markup=False, emoji=False)
