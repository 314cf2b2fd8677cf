"""The cache of checks of a model: each answer stays until a change of the model could change it.

To find out whether a model is causal, takes several rows, or has forward mode, it has to run. The
answers are kept for each model as long as it looks the same: its modules with their classes, their
``forward``, their flags and their hooks; its configurations, with the attention implementation; the
kinds, dtypes and devices of its weights, and how often they were changed in place. Adapters and
quantised layers are modules with flags. The memory is blind to code that is changed elsewhere, such
as a function that a module calls, and to values written through ``weight.data``;
``attribute(..., check=True)`` asks again.

Only weak references to models, and none to tensors, are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import partial
from itertools import chain
from types import FunctionType, MethodType
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from captum_llm_ext.model.compiled import original

Answer = TypeVar("Answer")
Look = tuple[Any, ...]  # hashable values

PLAIN = frozenset({bool, int, float, str, type(None), torch.dtype, torch.device})
FUNCTIONS = frozenset({FunctionType, MethodType, partial})
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_INTERNAL = frozenset(vars(nn.Module())) - {"training"}


class CheckCache(dict[Hashable, Any]):
    """Answers about a model, by question."""

    def answer(self, question: Hashable, measure: Callable[[], Answer]) -> Answer:
        """The answer, found out where it is not there yet."""
        if question not in self:
            self[question] = measure()
        answer: Answer = self[question]
        return answer


def check_cache_of(model: nn.Module) -> CheckCache:
    """The answers about a model as it looks now, to be added to."""
    model, look = original(model), _look(original(model))
    before, answers = _CACHES.get(model, (None, None))
    if answers is None or before != look:
        answers = CheckCache()
        _CACHES[model] = look, answers
    return answers


def forget(model: nn.Module) -> None:
    """Let everything be asked again about this model."""
    _CACHES.pop(original(model), None)


_CACHES: WeakKeyDictionary[nn.Module, tuple[Look, CheckCache]] = WeakKeyDictionary()


def _look(model: nn.Module) -> Look:
    """All that could change an answer; what is no plain value is compared by identity."""
    return (
        *map(_of_module, model.modules()),
        *(_values(vars(config)) for config in _configs(model)),
        *map(_of_weight, chain(model.parameters(), model.buffers())),
    )


def _of_module(module: nn.Module) -> Look:
    state = vars(module)
    hooks = (tuple(state[name]) for name in HOOKS)  # by their numbers, which are given once
    forwards = _weakly(type(module).forward), _weakly(state.get("forward"))
    return ref(module), type(module), *forwards, *hooks, *_values(state)


def _of_weight(weight: Tensor) -> Look:
    changes = 0 if weight.is_inference() else weight._version  # in place, as a step of training
    return id(weight), type(weight), weight.dtype, weight.device, weight.shape, changes


def _configs(model: nn.Module) -> Iterable[Any]:
    """The configurations of the modules, of any class, and those inside them, each once."""
    configs = [vars(module).get("config") for module in model.modules()]
    by_id = {id(config): config for config in configs if hasattr(config, "__dict__")}
    waiting = list(by_id.values())
    while waiting:
        for inner in vars(waiting.pop()).values():
            if isinstance(inner, PretrainedConfig) and id(inner) not in by_id:
                by_id[id(inner)] = inner
                waiting.append(inner)
    return by_id.values()


def _values(attributes: Mapping[Any, Any]) -> Look:
    """Those attributes that are plain values or functions, or hold some."""
    return tuple(
        (name, _frozen(value)) for name, value in attributes.items() if name not in _INTERNAL
    )


def _frozen(value: Any) -> Hashable:
    kind = type(value)
    if kind in PLAIN:
        return kind, value
    if kind in FUNCTIONS:
        return _weakly(value)
    if kind in (list, tuple, set, frozenset):
        return kind, *map(_frozen, value)
    return _values(value) if kind is dict else None


def _weakly(thing: Any) -> Hashable:
    """A reference that is equal as long as it is the same thing, and keeps nothing alive."""
    try:
        return ref(thing)
    except TypeError:  # such as None
        return id(thing)
