"""Models under torch.compile run as they are written, since hooks do not reach compiled graphs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch
from torch import nn

_WRAPPED = "_orig_mod"  # where the module that ``torch.compile(module)`` returns keeps the original


def original(model: nn.Module) -> nn.Module:
    """The model that ``torch.compile`` was given, or the model itself."""
    wrapped = model._modules.get(_WRAPPED)
    return model if wrapped is None else wrapped


def original_name(name: str) -> str:
    """The name of a layer before ``torch.compile`` wrapped it or what it lies in."""
    return ".".join(part for part in name.split(".") if part != _WRAPPED)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Let compiled modules and functions run as they are written.

    torch knows this for the whole process alone: while a call runs, other threads run theirs
    uncompiled too, slower and with the same numbers.
    """
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and its import takes seconds
        yield
        return
    _EAGER.enter()
    try:
        yield
    finally:
        _EAGER.leave()


class _Eager:
    """Forbids compiled code while there are calls, in whatever order they come and go."""

    def __init__(self) -> None:
        self._lock, self._calls = Lock(), 0
        self._stance: Any = None

    def enter(self) -> None:
        with self._lock:
            if not self._calls:
                self._stance = torch.compiler.set_stance("force_eager")
            self._calls += 1

    def leave(self) -> None:
        with self._lock:
            self._calls -= 1
            if not self._calls:
                self._stance.__exit__(None, None, None)


_EAGER = _Eager()
