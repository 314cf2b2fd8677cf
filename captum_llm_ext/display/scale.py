"""The colour scale of plots, tables and pages."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.colors import Colormap, Normalize

FloatArray = npt.NDArray[np.float32]

# A token is dominant where it exceeds _DOMINANCE times the largest of nearly all other tokens.
_DOMINANCE = 3.0
_SHARE_OF_TOKENS = 0.98
_FEWEST_TOKENS = 4  # fewer values can be read in any case


@dataclass(frozen=True)
class ColorScale:
    """Colours of attributions: white at 0, blue above, red below, safe for colour-blind readers.

    `limit` is the absolute value at which the colours stop. It is the largest absolute value,
    unless a few columns (tokens) dwarf all others, as the first token of a prompt often does. It
    is then the largest of the others, so that their differences can be seen. `signed` says whether
    there are negative values, and `beyond` counts the values beyond the limit.

    >>> scale = ColorScale.of(np.array([[100.0, 3.0, 2.0, 1.0]], dtype=np.float32))
    >>> scale.limit, scale.signed, scale.beyond
    (3.0, False, 1)
    >>> scale.label("Attribution")
    'Attribution (colours stop at 3.00; 1 beyond)'
    """

    limit: float
    signed: bool
    beyond: int

    @classmethod
    def of(cls, values: FloatArray) -> ColorScale:
        """Scale of the finite values in an array of shape (n_rows, n_columns) or (n_columns,)."""
        sizes = np.atleast_2d(np.where(np.isfinite(values), np.abs(values), 0.0))
        limit = _limit(np.sort(sizes.max(axis=0, initial=0.0)))
        signed = bool(np.any(np.asarray(values) < 0))
        return cls(limit or 1.0, signed, int((sizes > limit).sum()))

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

    @property
    def decimals(self) -> int | None:
        """Decimals that show the limit with three digits; None for scientific notation."""
        magnitude = math.floor(math.log10(self.limit))
        return max(0, 2 - magnitude) if -4 <= magnitude <= 6 else None

    def format(self, value: float) -> str:
        """A number with the decimals of the scale."""
        if self.decimals is None:
            return f"{value:.1e}"
        text = f"{value:.{self.decimals}f}"
        return text.lstrip("-") if not text.strip("-0.") else text

    def label(self, name: str) -> str:
        """The name of the quantity, with a note where values lie beyond the colours."""
        if not self.beyond:
            return name
        stop = f"{'±' if self.signed else ''}{self.format(self.limit)}"
        return f"{name} (colours stop at {stop}; {self.beyond} beyond)"


def relative_to_rows(values: FloatArray) -> tuple[FloatArray, ColorScale]:
    """Each row divided by the limit of its scale, and the scale of the quotients.

    >>> relative, scale = relative_to_rows(np.array([[5.0, -10.0], [0.2, 0.1]], dtype=np.float32))
    >>> relative.tolist(), scale.limit
    ([[0.5, -1.0], [1.0, 0.5]], 1.0)
    """
    limits = np.array([[ColorScale.of(row).limit] for row in values], dtype=np.float32)
    relative = values / limits
    beyond = int((np.abs(np.nan_to_num(relative)) > 1.0).sum())
    return relative, ColorScale(1.0, bool(np.any(relative < 0)), beyond)


def _limit(peaks: npt.NDArray[np.floating]) -> float:
    """The largest column peak that does not dwarf the others; `peaks` are sorted."""
    if len(peaks) < _FEWEST_TOKENS:
        return float(peaks.max(initial=0.0))
    others = float(np.quantile(peaks[:-1], _SHARE_OF_TOKENS, method="higher"))
    largest = float(peaks[-1])
    return others if 0.0 < _DOMINANCE * others < largest else largest


def text_color(background: npt.NDArray[np.float64]) -> str:
    """Black or white, whichever has more contrast with the background (red, green, blue, …).

    The contrast is at least 4.58 to 1, by the relative luminance of the Web Content Accessibility
    Guidelines 2.2.
    """
    color = background[:3]
    linear = np.where(color <= 0.04045, color / 12.92, ((color + 0.055) / 1.055) ** 2.4)
    return "black" if linear @ (0.2126, 0.7152, 0.0722) > 0.179 else "white"
