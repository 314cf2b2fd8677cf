"""One call at a time for each model: hooks, flags and replaced functions belong to its modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from threading import Condition, get_ident
from typing import Any, TypeVar, cast

from torch import nn

from captum_llm_ext.model.compiled import uncompiled

Method = TypeVar("Method", bound=Callable[..., Any])


@contextmanager
def only_one_call(model: Any) -> Iterator[None]:
    """Hold the model for this thread, and run it uncompiled.

    Other threads wait that have the model, a wrapper of it, or another model that shares a module,
    a weight or a configuration with it. The thread itself may hold it again.
    """
    with holding(model), uncompiled():
        yield


def one_call_at_a_time(method: Method) -> Method:
    """Let a method hold the `model` of its object while it runs."""

    @wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with only_one_call(self.model):
            return method(self, *args, **kwargs)

    return cast(Method, call)


@contextmanager
def holding(*things: Any) -> Iterator[None]:
    """Hold models, or other things that a call changes and restores, for this thread.

    All of them are taken at once, so that no two threads wait for each other.
    """
    call = _Call(get_ident(), frozenset().union(*map(_parts, things)))
    try:
        with _CHANGED:
            _CHANGED.wait_for(lambda: not any(map(call.conflicts_with, _RUNNING)))
            _RUNNING.append(call)
        yield
    finally:
        with _CHANGED:
            _RUNNING[:] = [other for other in _RUNNING if other is not call]
            _CHANGED.notify_all()


class _Call:
    """What a thread holds: the identities of `parts`, which live as long as the call runs."""

    def __init__(self, thread: int, parts: frozenset[int]) -> None:
        self.thread, self.parts = thread, parts

    def conflicts_with(self, other: _Call) -> bool:
        return self.thread != other.thread and not self.parts.isdisjoint(other.parts)


def _parts(thing: Any) -> frozenset[int]:
    """A model's modules, weights and configurations; of another thing itself."""
    if not isinstance(thing, nn.Module):
        return frozenset({id(thing)})
    modules = list(thing.modules())
    configs = [getattr(module, "config", None) for module in modules]
    parts = [*modules, *thing.parameters(), *(c for c in configs if c is not None)]
    return frozenset(map(id, parts))


# The calls that run now. Nothing is kept of a model once its calls have ended.
_RUNNING: list[_Call] = []
_CHANGED = Condition()
