"""Which keywords a function takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


def keywords(function: Callable[..., Any]) -> set[str]:
    """The parameters that can be named in a call."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}


def takes_any(function: Callable[..., Any]) -> bool:
    """Whether the function takes keywords that it does not name."""
    parameters = inspect.signature(function).parameters.values()
    return any(p.kind is p.VAR_KEYWORD for p in parameters)


def takes(function: Callable[..., Any], name: str) -> bool:
    """Whether a call may name the keyword."""
    return name in keywords(function) or takes_any(function)
