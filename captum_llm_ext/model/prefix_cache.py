"""The key/value cache of a prompt, cut to any prefix and repeated over the rows of a batch."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from torch import Tensor, nn

from captum_llm_ext.compat import Cache, DynamicLayer, DynamicSlidingWindowLayer
from captum_llm_ext.model.layers import accepts


class PrefixCache:
    """Keys and values of the first tokens of `ids` (length,), from a pass over all of them.

    Caches with a sliding window cannot be cut back, so for these the prefix is run piece by
    piece as longer ones are asked for: ask for short ones first.
    """

    def __init__(self, model: nn.Module, ids: Tensor, full: Any, length: int) -> None:
        self.model, self.ids = model, ids
        self._full, self._length = full, length
        self._cut: Any = None
        self._cut_at = -1
        self._grown: Any = None
        self._grown_to = 0

    def at(self, cut: int, rows: int) -> Any:
        """A cache of the first `cut` tokens for `rows` rows; the model may append to it."""
        if cut != self._cut_at:
            self._cut_at, self._cut = cut, self._shortened(cut)
        cache = deepcopy(self._cut)
        if rows > 1:
            cache.batch_repeat_interleave(rows)
        return cache

    def _shortened(self, cut: int) -> Any:
        cache = deepcopy(self._full)
        if cut == self._length:  # some versions take crop(0) for "nothing is left"
            return cache
        try:
            cache.crop(cut - self._length)
        except (RuntimeError, ValueError, NotImplementedError):
            return deepcopy(self._grow(cut))
        return cache

    def _grow(self, cut: int) -> Any:
        if cut < self._grown_to:
            self._grown, self._grown_to = None, 0
        if cut > self._grown_to:
            ids = self.ids[None, self._grown_to : cut]
            options = {"past_key_values": self._grown, "use_cache": True}
            if accepts(self.model, "logits_to_keep"):
                options["logits_to_keep"] = 1
            self._grown, self._grown_to = self.model(ids, **options).past_key_values, cut
        return self._grown


def can_be_cut(cache: Any) -> bool:
    """Whether a cache holds keys and values alone: the states of other layers (of Mamba and the
    like) cannot be cut back to a prefix, and some take no continuation of several tokens."""
    kinds = (DynamicLayer, DynamicSlidingWindowLayer)
    return isinstance(cache, Cache) and all(type(layer) in kinds for layer in cache.layers)
