"""Display of results: plots, tables and a page."""

from __future__ import annotations

from pathlib import Path
from typing import IO, TYPE_CHECKING

from torch import Tensor

from captum_llm_ext.display import (
    AttributionText,
    ColorScale,
    View,
    draw_bars,
    draw_heat_map,
    draw_path,
    draw_shaded_text,
    finished,
    print_text,
    render_document,
    render_text,
    render_view,
    say_below,
    sized_axes,
)
from captum_llm_ext.results.merge import Spans
from captum_llm_ext.results.provenance import Provenance
from captum_llm_ext.results.tables import largest
from captum_llm_ext.results.values import FloatArray, array, count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from typing_extensions import Self

_MOST_BARS = 60  # input tokens; a longer prompt is plotted as shaded text


class DisplayMixin:
    """Plots, tables and a page of a result."""

    input_tokens: list[str]
    output_tokens: list[str]
    score_path: Tensor | None
    output_labels: list[str] | None
    starts_prompt: bool
    provenance: Provenance | None
    spread: Tensor | None

    if TYPE_CHECKING:

        @property
        def method(self) -> str | None: ...
        @property
        def seq_attr(self) -> Tensor: ...
        @property
        def token_attr(self) -> Tensor | None: ...
        @property
        def output_probs(self) -> Tensor | None: ...
        @property
        def convergence_delta(self) -> Tensor | None: ...

        def merge(self, spans: str | Spans = "word") -> Self: ...
        def _selected(self, kept: list[int]) -> Self: ...

    def plot_seq_attr(
        self,
        show: bool = False,
        ax: Axes | None = None,
        merge: str | Spans | None = None,
        figsize: tuple[float, float] | None = None,
        title: str | None = None,
        top: int | None = None,
        provenance: bool = False,
    ) -> tuple[Figure, Axes] | None:
        """Plot the sequence attribution: bars, or shaded text for more than 60 input tokens.

        Args:
            show: True shows the plot and returns None; False (default) returns (figure, axes).
            ax: axes to draw into; None (default) for a new figure.
            merge: "word" or spans to `merge` first; None (default) for tokens.
            figsize: width and height of a new figure in inches; None (default) for what fits.
            title: a line above the plot; None (default) for none.
            top: only the features of largest sequence attribution; None (default) for all.
            provenance: write where the result comes from below the plot (default False).
        """
        result = self._merged(merge)._kept(top)
        values, label = array(result.seq_attr), "Sequence Attribution"
        scale = ColorScale.of(values, result.starts_prompt)
        ax = sized_axes(ax, figsize)
        if len(values) <= _MOST_BARS:
            spread = None if result.spread is None else array(result.spread)
            drawn = draw_bars(values, result.input_tokens, label, ax, scale, spread)
        else:
            drawn = draw_shaded_text(values, result.input_tokens, label, ax, scale)
        return self._finished(drawn, show, title, provenance)

    def plot_token_attr(
        self,
        show: bool = False,
        ax: Axes | None = None,
        merge: str | Spans | None = None,
        figsize: tuple[float, float] | None = None,
        title: str | None = None,
        top: int | None = None,
        provenance: bool = False,
    ) -> tuple[Figure, Axes] | None:
        """Plot output tokens by input tokens; after 60 input tokens the plot continues below.

        Args:
            show: True shows the plot and returns None; False (default) returns (figure, axes).
            ax: axes to draw into; None (default) for a new figure.
            merge: "word" or spans to `merge` first; None (default) for tokens.
            figsize: width and height of a new figure in inches; None (default) for what fits.
            title: a line above the plot; None (default) for none.
            top: only the features of largest sequence attribution; None (default) for all.
            provenance: write where the result comes from below the plot (default False).

        Raises:
            ValueError: the result has no `token_attr`; use `plot_seq_attr`.
        """
        result = self._merged(merge)._kept(top)
        if result.token_attr is None:
            raise ValueError(
                "token_attr is None, since only the sequence was attributed: use plot_seq_attr, "
                "or attribute with include_per_token_attr=True"
            )
        values, rows = array(result.token_attr), result._labels
        scale, ax = ColorScale.of(values, result.starts_prompt), sized_axes(ax, figsize)
        drawn = draw_heat_map(values, rows, result.input_tokens, "Token Attribution", ax, scale)
        return self._finished(drawn, show, title, provenance)

    def plot_path(
        self,
        show: bool = False,
        ax: Axes | None = None,
        figsize: tuple[float, float] | None = None,
        title: str | None = None,
        provenance: bool = False,
    ) -> tuple[Figure, Axes] | None:
        """Plot the sequence score along the path from baseline (0) to input (1).

        Each dot is a point at which the model ran; adaptive quadrature takes more points where
        the score changes. Attributions are sums of gradients at these points, so that they miss a
        leap of the score between two dots.

        Args:
            show: True shows the plot and returns None; False (default) returns (figure, axes).
            ax: axes to draw into; None (default) for a new figure.
            figsize: width and height of a new figure in inches; None (default) for 8 by 3.6.
            title: a line above the plot; None (default) for the points and scores.
            provenance: write where the result comes from below the plot (default False).

        Raises:
            ValueError: the method has no path, or several layers have different paths.
        """
        if self.score_path is None:
            raise ValueError(
                "there is no path to plot: expected a result of integrated gradients or "
                "conductance from one baseline; for several layers, plot one: "
                "result[name].plot_path()"
            )
        points, scores = array(self.score_path)
        drawn = draw_path(points, scores, sized_axes(ax, figsize))
        return self._finished(drawn, show, title, provenance)

    def to_text(
        self, color: bool = True, width: int | None = None, merge: str | Spans | None = None
    ) -> str:
        """Table for a terminal: rows of input tokens, columns of the sequence and output tokens.

        More than 60 input tokens become shaded text and a table of the 20 largest.

        Args:
            color: shade the cells with ANSI colours (default True).
            width: columns of the terminal; None (default) for the current terminal.
            merge: "word" or spans to `merge` first; None (default) for tokens.
        """
        return render_text(self._merged(merge)._text(), color, width)

    def print(self, file: IO[str] | None = None, merge: str | Spans | None = None) -> None:
        """Print the table of `to_text`, in colours where the terminal or notebook has them.

        Args:
            file: a text file; None (default) for standard output.
            merge: "word" or spans to `merge` first; None (default) for tokens.
        """
        print_text(self._merged(merge)._text(), file)

    def to_html(
        self,
        path: str | Path | None = None,
        merge: str | Spans | None = None,
        fragment: bool = False,
    ) -> str:
        """Page with the prompt as text, shaded by the attribution to the output or one token of it.

        Point at an output token or focus it to see its attribution; click on it to keep that. A
        slider chooses among several layers; it starts at their mean or sum. The colours are those
        of the plots, and negative values are underlined. The page needs no network and stays
        under 300 kB for prompts of 2,000 tokens: it leaves out rows of very large results, and
        says so. Notebooks display the same.

        Args:
            path: a file to write the page to as well; None (default) for none.
            merge: "word" or spans to `merge` first; None (default) for tokens.
            fragment: True for a `div` to put into a page, False (default) for a whole page.
        """
        result = self._merged(merge)
        view = result._view()
        html = view if fragment else render_document(result._title(), view)
        if path is not None:
            Path(path).write_text(html, encoding="utf-8")
        return html

    def _repr_html_(self) -> str:
        return self._view()

    def _view(self) -> str:
        return render_view(
            self._title(),
            self.input_tokens,
            self._labels,
            self._views(),
            self._footers(),
            [] if self.provenance is None else self.provenance.lines(),
        )

    def _views(self) -> list[View]:
        token_attr = None if self.token_attr is None else array(self.token_attr)
        return [View("", array(self.seq_attr), token_attr, self.starts_prompt)]

    def _footers(self) -> dict[str, FloatArray]:
        footers = {"log probability": self.output_probs, "convergence delta": self._footer_delta()}
        return {name: array(values) for name, values in footers.items() if values is not None}

    def _text(self) -> AttributionText:
        return AttributionText(
            self._title(),
            self.input_tokens,
            self._labels,
            array(self.seq_attr),
            None if self.token_attr is None else array(self.token_attr),
            self._footers(),
            self.starts_prompt,
        )

    @property
    def _labels(self) -> list[str]:
        """Names of the output tokens."""
        return self.output_labels or self.output_tokens

    def _footer_delta(self) -> Tensor | None:
        return self.convergence_delta

    def _title(self) -> str:
        return self._counts() if self.method is None else f"{self._counts()}, {self.method}"

    def _counts(self) -> str:
        n_input, n_output = len(self.input_tokens), len(self.output_tokens)
        return f"{count(n_input, 'input token')} -> {count(n_output, 'output token')}"

    def _merged(self, merge: str | Spans | None) -> Self:
        return self if merge is None else self.merge(merge)

    def _kept(self, top: int | None) -> Self:
        """The features of largest sequence attribution alone, in the order of the prompt."""
        if top is None:
            return self
        return self._selected(sorted(largest(array(self.seq_attr), top)))

    def _finished(
        self, drawn: tuple[Figure, Axes], show: bool, title: str | None, provenance: bool
    ) -> tuple[Figure, Axes] | None:
        if provenance:
            known = self.provenance
            say_below(drawn[0], ["origin unknown"] if known is None else known.lines())
        return finished(drawn, show, title)
