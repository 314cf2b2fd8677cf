"""Warnings that point at the line that called the package, however deep in it they arise."""

from __future__ import annotations

import os
import sys
import warnings
from itertools import count
from pathlib import Path

_PACKAGE = f"{Path(__file__).parent}{os.sep}"


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line outside the package that led here."""
    level = 1
    frame = sys._getframe()
    for here in count(1):
        level = here if frame.f_code.co_filename.startswith(_PACKAGE) else level
        if frame.f_back is None:
            break
        frame = frame.f_back
    warnings.warn(message, category, stacklevel=level + 1)
