"""The key/value cache of a prompt, cropped to any prefix and repeated over the rows of a batch."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

from torch import Tensor

from captum_llm_ext.compat import Cache, DynamicLayer, DynamicSlidingWindowLayer


class PrefixCache:
    """Keys and values of the first tokens of `ids` (length,).

    call: runs the model on ids, with those of the options that it takes; cache: what a pass over
    `ids` and any tokens after them returned; n_tokens: how many tokens it holds.

    Caches with a sliding window cannot be cropped. For these the prefix runs piece by piece, and
    each longer one continues the shorter one before it: take short prefixes first.
    """

    def __init__(self, call: Callable[..., Any], ids: Tensor, cache: Any, n_tokens: int) -> None:
        self.call, self.ids = call, ids
        self.cache, self.n_tokens = cache, n_tokens
        self._prefix: Any = None  # the cache of the last prefix
        self._n_prefix = -1
        self._grown: Any = None  # the cache of the last prefix that ran by itself
        self._n_grown = 0

    def at(self, n_prefix: int, rows: int) -> Any:
        """A cache of the first `n_prefix` tokens for `rows` rows; the model may append to it."""
        if n_prefix != self._n_prefix:
            self._n_prefix, self._prefix = n_prefix, self._cropped(n_prefix)
        cache = deepcopy(self._prefix)
        if rows > 1:
            cache.batch_repeat_interleave(rows)
        return cache

    def _cropped(self, n_prefix: int) -> Any:
        cache = deepcopy(self.cache)
        if n_prefix == self.n_tokens:  # some versions empty the cache at crop(0)
            return cache
        try:
            cache.crop(n_prefix - self.n_tokens)
        except (RuntimeError, ValueError, NotImplementedError):
            return deepcopy(self._grow(n_prefix))
        return cache

    def _grow(self, n_prefix: int) -> Any:
        if n_prefix < self._n_grown:
            self._grown, self._n_grown = None, 0
        if n_prefix > self._n_grown:
            ids = self.ids[None, self._n_grown : n_prefix]
            output = self.call(ids, past_key_values=self._grown, use_cache=True, logits_to_keep=1)
            self._grown, self._n_grown = output.past_key_values, n_prefix
        return self._grown


def can_be_cropped(cache: Any) -> bool:
    """Whether a cache holds keys and values alone.

    The states of other layers, such as those of Mamba, cannot be cropped to a prefix, and some
    take no continuation of several tokens.
    """
    kinds = (DynamicLayer, DynamicSlidingWindowLayer)
    return isinstance(cache, Cache) and all(type(layer) in kinds for layer in cache.layers)
