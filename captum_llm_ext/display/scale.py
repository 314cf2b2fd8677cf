"""One colour scale for plots and tables."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.colors import Colormap, Normalize

FloatArray = npt.NDArray[np.float32]

# A token is taken for dominant when it exceeds this many times what nearly all others stay under.
_DOMINANCE = 3.0
_SHARE_OF_TOKENS = 0.98
_FEWEST_TOKENS = 4  # below this every value can be read anyway


@dataclass(frozen=True)
class ColorScale:
    """Colours of attributions: white at 0, blue above, red below, safe for colour-blind readers.

    `limit` is the absolute value at which the colours stop. It is the largest one, unless few
    columns (tokens) dwarf all others, as the first token of a prompt often does; then it is the
    largest among the others, so that these keep their differences. `beyond` counts the values cut.

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
        """Scale for the finite ones of values of shape (n_rows, n_columns) or (n_columns,)."""
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
        """Red, green, blue and opacity in 0..1 for every value, shape (*values.shape, 4)."""
        masked = np.ma.masked_invalid(np.asarray(values, dtype=np.float64))
        return np.asarray(self.colormap(self.norm(masked)), dtype=np.float64)

    @property
    def decimals(self) -> int | None:
        """How many give the limit of the scale three digits; None for powers of ten instead."""
        magnitude = math.floor(math.log10(self.limit))
        return max(0, 2 - magnitude) if -4 <= magnitude <= 6 else None

    def format(self, value: float) -> str:
        """A number with the decimals of the scale."""
        if self.decimals is None:
            return f"{value:.1e}"
        text = f"{value:.{self.decimals}f}"
        return text.lstrip("-") if not text.strip("-0.") else text

    def label(self, name: str) -> str:
        """The name of the quantity, with a remark where values lie beyond the colours."""
        if not self.beyond:
            return name
        stop = f"{'±' if self.signed else ''}{self.format(self.limit)}"
        return f"{name} (colours stop at {stop}; {self.beyond} beyond)"


def relative_to_rows(values: FloatArray) -> tuple[FloatArray, ColorScale]:
    """Every row in units of the limit of its own scale, and the scale of what comes of it.

    >>> relative, scale = relative_to_rows(np.array([[5.0, -10.0], [0.2, 0.1]], dtype=np.float32))
    >>> relative.tolist(), scale.limit
    ([[0.5, -1.0], [1.0, 0.5]], 1.0)
    """
    limits = np.array([[ColorScale.of(row).limit] for row in values], dtype=np.float32)
    relative = values / limits
    beyond = int((np.abs(np.nan_to_num(relative)) > 1.0).sum())
    return relative, ColorScale(1.0, bool(np.any(relative < 0)), beyond)


def _limit(peaks: npt.NDArray[np.floating]) -> float:
    """Largest of the sorted column peaks that is not out of proportion to the others."""
    if len(peaks) < _FEWEST_TOKENS:
        return float(peaks.max(initial=0.0))
    others = float(np.quantile(peaks[:-1], _SHARE_OF_TOKENS, method="higher"))
    largest = float(peaks[-1])
    return others if 0.0 < _DOMINANCE * others < largest else largest


def text_color(background: npt.NDArray[np.float64]) -> str:
    """Black or white, whichever has more contrast to the background (red, green, blue, …).

    By relative luminance, Web Content Accessibility Guidelines 2.2: it is at least 4.58 to 1.
    """
    color = background[:3]
    linear = np.where(color <= 0.04045, color / 12.92, ((color + 0.055) / 1.055) ** 2.4)
    return "black" if linear @ (0.2126, 0.7152, 0.0722) > 0.179 else "white"
