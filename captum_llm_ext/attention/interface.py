"""Queries, keys and values, where transformers hands them to an attention kernel.

Every model that uses the attention interface of transformers calls one function with them, and the
model keeps its kernel: what is read here costs no eager attention and no (length, length) matrix.
The rows of weights that are needed are computed anew, and compared with the kernel's output.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn

from captum_llm_ext.compat import ATTENTION_KERNELS
from captum_llm_ext.scoring.teacher_forcing import tolerance

Kernel = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class HeadsCall:
    """One call of an attention kernel, on one row of tokens.

    query: (n_heads, length, head_dim); key and value: (n_kv_heads, length, head_dim); mask: added
    to the scores, or True where a key is seen, or None; options: the kernel's other arguments;
    mixed: (length, n_heads, head_dim) the kernel's output.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    options: Mapping[str, Any]
    mixed: Tensor

    @property
    def values(self) -> Tensor:
        """The values (n_heads, length, head_dim) of every head; heads that share them repeat."""
        return self._repeated(self.value)

    def weights(self, rows: Tensor) -> Tensor | None:
        """The softmaxed weights (n_heads, n_rows, length) of the queries at `rows` (n_rows,).

        None where they do not explain the kernel's output: the kernel does something else.
        """
        if not self.query.size(1) == self.key.size(1) == self.value.size(1) == len(self.mixed):
            return None  # some of the queries or keys alone, or those of other tokens
        rows = rows.to(self.query.device)
        scaling = self.options.get("scaling")
        scaling = self.query.size(-1) ** -0.5 if scaling is None else scaling
        scores = self._of_groups(self.query[:, rows], self.key.transpose(1, 2)) * scaling
        if softcap := self.options.get("softcap"):
            scores = softcap * torch.tanh(scores / softcap)
        scores = self._masked(scores, rows)
        sinks = self.options.get("s_aux")
        if sinks is not None:
            sinks = sinks.float().view(-1, 1, 1).expand(-1, len(rows), 1)
            scores = torch.cat([scores, sinks], dim=-1)
        weights = scores.softmax(-1)[..., : self.key.size(1)]
        mixed = self._of_groups(weights, self.value)
        expected = self.mixed[rows].transpose(0, 1).float()
        allowed = tolerance(self.mixed.dtype) * expected.abs().max()
        return weights if (mixed - expected).abs().max() <= allowed else None

    def _of_groups(self, of_heads: Tensor, of_groups: Tensor) -> Tensor:
        """The products (n_heads, rows, …) with what groups of heads share."""
        grouped = of_heads.float().unflatten(0, (len(of_groups), -1)).flatten(1, 2)
        return (grouped @ of_groups.float()).view(*of_heads.shape[:2], -1)

    def _repeated(self, of_groups: Tensor) -> Tensor:
        return of_groups.float().repeat_interleave(self.query.size(0) // self.key.size(0), dim=0)

    def _masked(self, scores: Tensor, rows: Tensor) -> Tensor:
        if self.mask is None:
            is_causal = self.options.get("is_causal", getattr(self.module, "is_causal", True))
            seen = torch.arange(scores.size(-1), device=rows.device) <= rows[:, None]
            return scores.masked_fill(~seen, -torch.inf) if is_causal else scores
        mask = self.mask[..., rows, : scores.size(-1)]
        if mask.dtype == torch.bool:
            return scores.masked_fill(~mask, -torch.inf)
        return scores + mask.float()


class UnreadableCallError(ValueError):
    """A kernel was called in a way from which no weights can be computed."""


@contextmanager
def reading_heads(
    modules: Iterable[nn.Module], receive: Callable[[HeadsCall], None]
) -> Iterator[None]:
    """Hand the kernel's calls of these attention modules, on one row, to `receive`.

    Raises UnreadableCallError where the rows or the mask are of another kind.
    """

    def read(
        module: nn.Module,
        states: tuple[Tensor, ...],
        mask: Any,
        options: Mapping[str, Any],
        output: Any,
    ) -> None:
        whole_mask = mask is None or (isinstance(mask, Tensor) and mask.dim() == 4)
        if not whole_mask or any(state.size(0) != 1 for state in states):
            raise UnreadableCallError
        query, key, value = (state[0] for state in states)
        mask = None if mask is None else mask[0]
        receive(HeadsCall(module, query, key, value, mask, options, output[0][0]))

    with _PATCH.listening(_Listener(set(modules), read)):
        yield


@contextmanager
def noting_callers(modules: Iterable[nn.Module]) -> Iterator[set[nn.Module]]:
    """The modules among these that call a kernel, in whatever way."""
    callers = set[nn.Module]()

    def note(module: nn.Module, *call: Any) -> None:
        callers.add(module)

    with _PATCH.listening(_Listener(set(modules), note)):
        yield callers


@dataclass(frozen=True, eq=False)
class _Listener:
    """receive: takes module, (query, key, value), mask, options and the kernel's output."""

    modules: set[nn.Module]
    receive: Callable[..., None]


class _Patch:
    """Wraps the kernels while anybody listens, in whatever order threads come and go."""

    def __init__(self) -> None:
        self._lock = RLock()
        # A new tuple for each change, since other threads walk over the old one.
        self._listeners: tuple[_Listener, ...] = ()
        self._wrapped: dict[str, tuple[Kernel | None, Kernel]] = {}

    @contextmanager
    def listening(self, listener: _Listener) -> Iterator[None]:
        with self._lock:
            if not self._listeners:
                self._wrap()
            self._listeners = (*self._listeners, listener)
        try:
            yield
        finally:
            with self._lock:
                self._listeners = tuple(one for one in self._listeners if one is not listener)
                if not self._listeners:
                    self._unwrap()

    def _wrap(self) -> None:
        wrapped = {key: partial(self._call, kernel) for key, kernel in ATTENTION_KERNELS.items()}
        wrapped["eager"] = partial(self._eager)
        self._wrapped = {key: (ATTENTION_KERNELS.get(key), new) for key, new in wrapped.items()}
        ATTENTION_KERNELS.update(wrapped)

    def _unwrap(self) -> None:
        # Name by name, since models in other threads look up kernels meanwhile, and may add one.
        for key, (before, wrapped) in self._wrapped.items():
            if ATTENTION_KERNELS.get(key) is not wrapped:
                continue
            if before is None:
                del ATTENTION_KERNELS[key]
            else:
                ATTENTION_KERNELS[key] = before

    def _eager(self, module: nn.Module, *args: Any, **options: Any) -> Any:
        """The eager kernel of a family stands in the file of its attention module, or of the one
        that this extends."""
        files = (sys.modules[cls.__module__] for cls in type(module).__mro__)
        kernels = (getattr(file, "eager_attention_forward", None) for file in files)
        kernel = next(kernel for kernel in kernels if kernel is not None)
        return self._call(kernel, module, *args, **options)

    def _call(
        self,
        kernel: Kernel,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        **options: Any,
    ) -> Any:
        output = kernel(module, query, key, value, *args, **options)
        mask = args[0] if args else options.get("attention_mask")
        for listener in [one for one in self._listeners if module in one.modules]:
            listener.receive(module, (query, key, value), mask, options, output)
        return output


_PATCH = _Patch()
