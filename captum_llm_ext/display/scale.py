"""The colour scale of plots, tables and pages."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.colors import Colormap, Normalize

FloatArray = npt.NDArray[np.float32]

# A token dwarfs others where it exceeds _DOMINANCE times the largest of (nearly) all of them.
_DOMINANCE = 3.0
_SHARE_OF_TOKENS = 0.98
_FEWEST_TOKENS = 4  # fewer values can be read in any case


@dataclass(frozen=True)
class ColorScale:
    """Colours of attributions: white at 0, blue above, red below, safe for colour-blind readers.

    `limit` is the absolute value at which the colours stop: the largest there is. An attention
    sink alone lies beyond it: the first column, where it is the first token of a prompt and dwarfs
    all others, whose differences can then be seen. `signed` says whether there are negative
    values; `peak` is the value of largest absolute value; numbers have `decimals` decimals (None:
    scientific notation), which show the largest value but for a few dominant ones with three
    digits.

    >>> values = np.array([[100.0, 3.0, 2.0, 1.0]], dtype=np.float32)
    >>> ColorScale.of(values).limit
    100.0
    >>> scale = ColorScale.of(values, sink=True)
    >>> scale.limit, scale.signed, scale.peak
    (3.0, False, 100.0)
    >>> scale.label("Attribution")
    'Attribution (colours stop at 3.00; the first token reaches 100.00)'
    """

    limit: float
    signed: bool
    peak: float
    decimals: int | None

    @classmethod
    def of(cls, values: FloatArray, sink: bool = False) -> ColorScale:
        """Scale of the finite values in an array of shape (n_rows, n_columns) or (n_columns,).

        sink: whether the first column is the first token of a prompt, where attention sinks are.
        """
        finite = np.atleast_2d(np.where(np.isfinite(values), values, 0.0)).astype(np.float64)
        columns = np.abs(finite).max(axis=0, initial=0.0)
        peak = max(finite.ravel().tolist(), key=abs, default=0.0) or 1.0
        others = float(columns[1:].max(initial=0.0))
        cut = sink and len(columns) >= _FEWEST_TOKENS and 0.0 < _DOMINANCE * others < columns[0]
        signed = bool(np.any(np.asarray(values) < 0))
        return cls(others if cut else abs(peak), signed, peak, _decimals(columns))

    @property
    def is_cut(self) -> bool:
        """Whether the first token lies beyond the colours."""
        return abs(self.peak) > self.limit

    def beyond(self, values: FloatArray) -> npt.NDArray[np.bool_]:
        """Whether each value lies beyond the colours."""
        return np.abs(values) > self.limit

    @property
    def norm(self) -> Normalize:
        return Normalize(-self.limit if self.signed else 0.0, self.limit)

    @property
    def colormap(self) -> Colormap:
        return colormaps["RdBu" if self.signed else "Blues"].with_extremes(bad="lightgrey")

    def colors(self, values: FloatArray) -> npt.NDArray[np.float64]:
        """Red, green, blue and opacity of each value, in 0..1, shape (*values.shape, 4)."""
        masked = np.ma.masked_invalid(np.asarray(values, dtype=np.float64))
        return np.asarray(self.colormap(self.norm(masked)), dtype=np.float64)

    def format(self, value: float) -> str:
        """A number with the decimals of the scale."""
        if self.decimals is None:
            return f"{value:.1e}"
        text = f"{value:.{self.decimals}f}"
        return text.lstrip("-") if not text.strip("-0.") else text

    def label(self, name: str) -> str:
        """The name of the quantity, with a note where the first token is beyond the colours."""
        if not self.is_cut:
            return name
        stop = f"{'±' if self.signed else ''}{self.format(self.limit)}"
        return f"{name} (colours stop at {stop}; the first token reaches {self.format(self.peak)})"


def relative_to_rows(values: FloatArray, sink: bool = False) -> tuple[FloatArray, ColorScale]:
    """Each row divided by the limit of its scale, and the scale of the quotients.

    sink: as `ColorScale.of` takes it.

    >>> relative, scale = relative_to_rows(np.array([[5.0, -10.0], [0.2, 0.1]], dtype=np.float32))
    >>> relative.tolist(), scale.limit
    ([[0.5, -1.0], [1.0, 0.5]], 1.0)
    """
    limits = np.array([[ColorScale.of(row, sink).limit] for row in values], dtype=np.float32)
    relative = values / limits
    return relative, replace(ColorScale.of(relative), limit=1.0, decimals=2)


def _decimals(columns: npt.NDArray[np.floating]) -> int | None:
    """Decimals that show the largest value with three digits, but for values that dwarf others.

    columns: (n_columns,) largest absolute value of each.
    """
    largest = shown = float(columns.max(initial=0.0))
    if len(columns) >= _FEWEST_TOKENS:
        others = np.quantile(np.sort(columns)[:-1], _SHARE_OF_TOKENS, method="higher")
        shown = float(others) if 0.0 < _DOMINANCE * others < largest else largest
    magnitude = math.floor(math.log10(shown or 1.0))
    return max(0, 2 - magnitude) if -4 <= magnitude <= 6 else None


def text_color(background: npt.NDArray[np.float64]) -> str:
    """Black or white, whichever has more contrast with the background (red, green, blue, …).

    The contrast is at least 4.58 to 1, by the relative luminance of the Web Content Accessibility
    Guidelines 2.2.
    """
    color = background[:3]
    linear = np.where(color <= 0.04045, color / 12.92, ((color + 0.055) / 1.055) ** 2.4)
    return "black" if linear @ (0.2126, 0.7152, 0.0722) > 0.179 else "white"
