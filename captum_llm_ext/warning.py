"""Warnings that point at the user's line, not at a line inside this package."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from pathlib import Path

_PACKAGE = f"{Path(__file__).parent}{os.sep}"


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line outside the package that called into it."""
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_stack(sys._getframe())]
    entry = max(level for level, file in enumerate(files, start=1) if file.startswith(_PACKAGE))
    warnings.warn(message, category, stacklevel=entry + 1)
