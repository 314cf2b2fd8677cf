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

from captum_llm_ext.display.scale import ColorScale, FloatArray, text_color
from captum_llm_ext.display.tokens import readable_tokens

LONGEST_TABLE = 60  # input tokens; a longer prompt is printed as text
TOP_TOKENS = 20
_LONGEST_LABEL = 24
_LONGEST_HEADING = 12
_PADDING = 2


class AttributionText:
    """A rich renderable of one attribution: a table, or shaded text where the prompt is long.

    Args:
        title: first line.
        input_tokens, output_tokens: as the tokenizer gives them.
        seq_attr: shape (n_input,).
        token_attr: shape (n_output, n_input), or None for the sequence alone.
        footers: further rows under the output columns, name → shape (n_output,) or (1,); a
            single number stands in the sequence column.
    """

    def __init__(
        self,
        title: str,
        input_tokens: Sequence[str],
        output_tokens: Sequence[str],
        seq_attr: FloatArray,
        token_attr: FloatArray | None = None,
        footers: dict[str, FloatArray] | None = None,
    ) -> None:
        self.title = title
        self.tokens = readable_tokens(input_tokens)
        self.headings = ["sequence"]
        self.columns = [seq_attr]
        if token_attr is not None:
            self.headings += readable_tokens(output_tokens, _LONGEST_HEADING)
            self.columns += list(token_attr)
        self.footers = footers or {}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.title, style="bold")
        yield Text()
        if len(self.tokens) > LONGEST_TABLE:
            yield self._shaded_text()
            yield Text()
            order = np.argsort(-np.abs(np.nan_to_num(self.columns[0])), kind="stable")
            yield Text(f"The {TOP_TOKENS} tokens of largest sequence attribution", style="bold")
            yield from self._tables(options.max_width, order[:TOP_TOKENS], numbered=True)
        else:
            yield from self._tables(options.max_width, np.arange(len(self.tokens)), numbered=False)

    def _shaded_text(self) -> Text:
        scale = ColorScale.of(self.columns[0])
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
        """Tables of as many columns as fit the width, one under the other."""
        cells = [self._column(column) for column in range(len(self.columns))]
        widths = [_PADDING + max(map(_cell_width, column)) for column in cells]
        labels = [self.tokens[row] for row in rows]
        names = [*labels, *self.footers]
        room = width - min(_LONGEST_LABEL, max(map(cell_len, names))) - _PADDING
        room -= (len(str(len(self.tokens))) + _PADDING) if numbered else 0
        for block in _blocks(widths, room):
            yield self._table([cells[column] for column in block], rows, block, numbered)
            yield Text()

    def _column(self, column: int) -> list[Text]:
        """Heading, one cell per input token and the footers of one column."""
        values = self.columns[column]
        # the sequence and the tokens have scales of their own, the one being the sum of the other
        scale = ColorScale.of(values if column == 0 else np.stack(self.columns[1:]))
        colors = scale.colors(values)
        cells = [Text(self.headings[column])]
        cells += [
            Text(scale.format(float(value)), _style(shade))
            for value, shade in zip(values, colors, strict=True)
        ]
        return cells + [Text(_footer(values, column)) for values in self.footers.values()]

    def _table(
        self,
        cells: Sequence[Sequence[Text]],
        rows: npt.NDArray[np.intp],
        block: range,
        numbered: bool,
    ) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, _PADDING, 0, 0), header_style="bold")
        if numbered:
            table.add_column("", justify="right", style="dim")
        table.add_column("", no_wrap=True, overflow="ellipsis", max_width=_LONGEST_LABEL)
        for column in cells:
            width = max(map(_cell_width, column))
            table.add_column(column[0], justify="right", no_wrap=True, min_width=width)
        for row in rows:
            number = [Text(str(row))] if numbered else []
            label = Text(self.tokens[row])
            table.add_row(*number, label, *(column[1 + row] for column in cells))
        for place, name in enumerate(self.footers, start=1 + len(self.tokens)):
            values = [column[place] for column in cells]
            if any(values):
                blank = [Text()] if numbered else []
                table.add_row(*blank, Text(name, style="italic"), *values)
        return table


def _footer(values: FloatArray, column: int) -> str:
    """What a footer shows in a column; a single value belongs to the sequence, column 0."""
    place = column if len(values) == 1 and column == 0 else column - 1
    return f"{values[place]:.3g}" if 0 <= place < len(values) else ""


def _blocks(widths: Sequence[int], room: int) -> Iterator[range]:
    """Consecutive columns that fit side by side; at least one at a time."""
    start, used = 0, 0
    for column, width in enumerate(widths):
        if column > start and used + width > room:
            yield range(start, column)
            start, used = column, 0
        used += width
    yield range(start, len(widths))


def _cell_width(cell: Text) -> int:
    return cell_len(cell.plain)


def _style(background: npt.NDArray[np.float64]) -> Style:
    red, green, blue = (255 * part for part in background[:3])
    shade = "#000000" if text_color(background) == "black" else "#ffffff"  # not a theme's
    return Style(color=shade, bgcolor=Color.from_rgb(red, green, blue).name)


def render_text(renderable: RenderableType, color: bool = True, width: int | None = None) -> str:
    """What a terminal of `width` columns (None: the present one's) shows; 256 colours or none."""
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
    """Print in colours where `file` (None: standard output, or the notebook) can show them."""
    Console(file=file).print(renderable, highlight=False, markup=False, emoji=False)
