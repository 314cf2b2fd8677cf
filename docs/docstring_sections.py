"""Lets mkdocstrings read the sections of this package's docstrings that it names otherwise."""

from __future__ import annotations

import re
from typing import Any

import griffe

HEADINGS = {
    r"^Example::?$": "Examples:",
    r"^Warns:$": "Warning:",  # a sentence, and not a list of classes of warnings
}


class DocstringSections(griffe.Extension):
    """Renames headings before a docstring is parsed."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring:
            for pattern, heading in HEADINGS.items():
                obj.docstring.value = re.sub(pattern, heading, obj.docstring.value, flags=re.M)
