"""The method that is taken where the caller names none: one rule for every caller.

`registry.AUTOMATIC` is the rule's table. `explain`, and through it `batch` and the command line,
follow it, and so may a method that needs a cheap guide.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from captum_llm_ext.model.adapter import CAUSAL
from captum_llm_ext.model.signatures import keywords
from captum_llm_ext.model.suitability import UnreadableAttentionError
from captum_llm_ext.registry import AUTOMATIC, WITHOUT_EFFECT, load, method_named
from captum_llm_ext.scoring.tasks import task_of

_T = TypeVar("_T")


def automatic_methods(
    model: nn.Module, layers: Any = None, options: Mapping[str, Any] | None = None
) -> tuple[str, ...]:
    """The methods to try for a model and the options of a call, the best one first.

    All methods of the table but the last need a causal model with attention, no layers, and no
    options but those that every method of the table takes, or that change no result. Options that
    are None do not count.
    Whether attention can really be read shows when it is: see `first_that_reads`.

    >>> automatic_methods(model)
    ('flow', 'saliency')
    >>> automatic_methods(model, layers="model.layers.*.mlp")
    ('saliency',)
    """
    *better, last = AUTOMATIC
    chosen = {name for name, value in (options or {}).items() if value is not None}
    if layers is not None or not chosen - set(WITHOUT_EFFECT) <= _options_of_all():
        return (last,)
    return (*(name for name in better if _serves(name, model)), last)


def first_that_reads(methods: Sequence[str], run: Callable[[str], _T]) -> _T:
    """Run the methods in turn until one can read the model's attention; return its result."""
    *better, last = methods
    for name in better:
        try:
            return run(name)
        except UnreadableAttentionError:
            continue
    return run(last)


def _options_of_all() -> set[str]:
    """The options of `attribute` that every method of the table takes."""
    wrappers = [load(method_named(name).wrapped_by.path) for name in AUTOMATIC]
    return set.intersection(*(keywords(wrapper.attribute) for wrapper in wrappers))


def _serves(name: str, model: nn.Module) -> bool:
    if not method_named(name).wrapped_by.reads_attention:
        return True
    parts = (getattr(module, "config", None) for module in model.modules())
    has_heads = any(getattr(config, "num_attention_heads", None) for config in parts)
    return has_heads and task_of(model).name == CAUSAL
