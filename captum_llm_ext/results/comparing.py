"""Results side by side in equal colours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from captum_llm_ext.display import (
    ColorScale,
    draw_heat_map,
    finished,
    render_document,
    render_side_by_side,
    sized_axes,
)
from captum_llm_ext.results.merge import Spans
from captum_llm_ext.results.single import LLMAttributionResult
from captum_llm_ext.results.tables import Table, largest
from captum_llm_ext.results.values import FloatArray, array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Comparison:
    """Several results, drawn on one scale.

    Args:
        results: name → result.

    Raises:
        TypeError: an argument is missing.

    Example:
        >>> one = LLMAttributionResult(
        ...     input_tokens=["a", "b"], output_tokens=["c"], seq_attr=[3.0, -1.0]
        ... )
        >>> compare({"whole": one, "half": 0.5 * one})
        name  whole  half
        a         3   1.5
        b        -1  -0.5
    """

    results: Mapping[str, LLMAttributionResult]

    def table(self) -> Table:
        """A row for each feature, and a column for each result; all must have the same labels."""
        rows = zip(
            self._labels(), *(r.seq_attr.tolist() for r in self.results.values()), strict=True
        )
        return Table(["name", *self.results], list(rows))

    def plot(
        self,
        show: bool = False,
        ax: Axes | None = None,
        figsize: tuple[float, float] | None = None,
        title: str | None = None,
        top: int | None = None,
    ) -> tuple[Figure, Axes] | None:
        """Heat map with a row for each result.

        Args:
            show: True shows the plot and returns None; False (default) returns (figure, axes).
            ax: axes to draw into; None (default) for a new figure.
            figsize: width and height of a new figure in inches; None (default) for what fits.
            title: a line above the plot; None (default) for none.
            top: only the features of largest magnitude in any result; None (default) for all.

        Raises:
            ValueError: the results have different features, which the page of `to_html` can show.
        """
        labels, values = self._labels(), self._values()
        kept = sorted(largest(np.abs(np.nan_to_num(values)).max(0), top))
        drawn = draw_heat_map(
            values[:, kept],
            list(self.results),
            [labels[i] for i in kept],
            "Sequence Attribution",
            sized_axes(ax, figsize),
            ColorScale.of(values, self._sink),
        )
        return finished(drawn, show, title)

    def to_html(self, path: str | Path | None = None) -> str:
        """A page with the prompt of each result as shaded text, side by side in equal colours.

        Args:
            path: a file to write the page to as well; None (default) for none.
        """
        page = render_document("Comparison", self._repr_html_())
        if path is not None:
            Path(path).write_text(page, encoding="utf-8")
        return page

    def _repr_html_(self) -> str:
        every = np.concatenate([array(result.seq_attr) for result in self.results.values()])
        columns = [
            (name, result.input_tokens, array(result.seq_attr))
            for name, result in self.results.items()
        ]
        return render_side_by_side(columns, ColorScale.of(every))

    def __repr__(self) -> str:
        try:
            return str(self.table())
        except ValueError:  # of different features
            return f"Comparison({', '.join(self.results)})"

    @property
    def _sink(self) -> bool:
        return all(result.starts_prompt for result in self.results.values())

    def _values(self) -> FloatArray:
        return np.stack([array(result.seq_attr) for result in self.results.values()])

    def _labels(self) -> list[str]:
        (name, first), *others = self.results.items()
        for other_name, other in others:
            if other.labels != first.labels:
                raise ValueError(
                    f"{name} and {other_name} have different features: compare them by "
                    'merge="word", or show the page of to_html'
                )
        return first.labels


def compare(
    results: Mapping[str, LLMAttributionResult],
    merge: str | Spans | None = None,
    normalise: bool = False,
    difference: bool = False,
) -> Comparison:
    """Put results side by side in equal colours: of two models, methods or prompts.

    Args:
        results: name → result, at least one.
        merge: "word" or spans to `merge` first, so that two tokenizers have the same features; None
            (default) for tokens.
        normalise: divide each result by the sum of its magnitudes, for methods whose units differ
            (default False).
        difference: add the first minus the second, on the same scale (default False).

    Returns:
        A `Comparison`, which prints as a table, shows itself in a notebook, and has `plot` and
        `to_html`.

    Raises:
        ValueError: there are no results; or `difference`, and they are not two of one input.

    Example:
        >>> short = explain(model, tokenizer, "The capital of France is", " Paris", "saliency")
        >>> flow = explain(model, tokenizer, "The capital of France is", " Paris", "flow")
        >>> compare({"saliency": short, "flow": flow}, normalise=True).table().headings
        ['name', 'saliency', 'flow']
    """
    if not results:
        raise ValueError("compare: expected at least one result, got none")
    shown = {
        name: result if merge is None else result.merge(merge) for name, result in results.items()
    }
    if normalise:
        shown = {name: result.normalise() for name, result in shown.items()}
    if difference:
        if len(shown) != 2:
            raise ValueError(f"difference: expected two results, got {len(shown)}")
        (one, first), (other, second) = shown.items()
        shown[f"{one} − {other}"] = first - second
    return Comparison(shown)
