"""Tensors, norms and tokens of results: checked, compared and counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

FloatArray = npt.NDArray[np.float32]


class NamedValues(dict[str, float]):
    """Values by name, which are found by other names too; these are no entries.

    >>> values = NamedValues({"cat": 1.0}, {"Ġcat": 1.0})
    >>> values, values["Ġcat"], "Ġcat" in values
    ({'cat': 1.0}, 1.0, True)
    """

    def __init__(self, values: Any, others: Mapping[str, float]) -> None:
        super().__init__(values)
        self._others = others

    def __missing__(self, name: str) -> float:
        return self._others[name]

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or name in self._others

    def get(self, name: str, default: Any = None) -> Any:
        return super().get(name, self._others.get(name, default))


def token_list(name: str, tokens: Sequence[str]) -> list[str]:
    if isinstance(tokens, str):
        raise TypeError(f"{name}: expected a list of tokens, got the string {tokens!r}; split it")
    return list(tokens)


def checked_tensor(name: str, values: npt.ArrayLike, *shapes: Mapping[str, int | None]) -> Tensor:
    """Values as a detached float32 tensor of one of the shapes, in which None is any size."""
    tensor = values if isinstance(values, Tensor) else torch.as_tensor(values)
    tensor = tensor.detach().to(torch.float32)
    if not any(_fits(tensor.shape, list(shape.values())) for shape in shapes):
        expected = " or ".join(f"({', '.join(shape)}) = {_sizes(shape)}" for shape in shapes)
        raise ValueError(
            f"{name}: expected shape {expected}, got {tuple(tensor.shape)}; "
            "give one value per token, in the order of the tokens"
        )
    return tensor


def optional_tensor(
    name: str, values: npt.ArrayLike | None, *shapes: Mapping[str, int | None]
) -> Tensor | None:
    return None if values is None else checked_tensor(name, values, *shapes)


def checked_flags(name: str, flags: Any, n_input: int) -> Tensor | None:
    """Flags (n_input,) as a bool tensor, or None."""
    if flags is None:
        return None
    tensor = torch.as_tensor(flags).detach()
    if tensor.dtype != torch.bool or tensor.shape != (n_input,):
        raise ValueError(
            f"{name}: expected bool of shape (n_input,) = ({n_input},), got {tensor.dtype} of "
            f"shape {tuple(tensor.shape)}; give one flag per input token"
        )
    return tensor


def _fits(shape: Sequence[int], sizes: Sequence[int | None]) -> bool:
    return len(shape) == len(sizes) and all(
        size in (None, length) for length, size in zip(shape, sizes, strict=True)
    )


def _sizes(shape: Mapping[str, int | None]) -> str:
    return f"({', '.join('any' if size is None else str(size) for size in shape.values())})"


def array(values: Tensor) -> FloatArray:
    return values.detach().cpu().numpy()


def checked_norm(norm: str | None) -> str | None:
    if norm not in (None, "l1", "l2", "linf"):
        raise ValueError(f'norm: expected "l1", "l2", "linf" or None, got {norm!r}')
    return norm


def checked_labels(labels: Sequence[str] | None, n_output: int) -> list[str] | None:
    if labels is None:
        return None
    listed = token_list("output_labels", labels)
    if len(listed) != n_output:
        raise ValueError(
            f"output_labels: expected one for each of {count(n_output, 'output token')}, got "
            f"{len(listed)}"
        )
    return listed


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def equal(mine: object, theirs: object) -> bool:
    """Equality by value, also of tensors in lists and dicts; not-a-number equals itself."""
    if isinstance(mine, Tensor) and isinstance(theirs, Tensor):
        same = mine.shape == theirs.shape
        return same and torch.allclose(mine.cpu(), theirs.cpu(), rtol=0, atol=0, equal_nan=True)
    if isinstance(mine, dict) and isinstance(theirs, dict):
        return mine.keys() == theirs.keys() and all(equal(mine[k], theirs[k]) for k in mine)
    if isinstance(mine, list) and isinstance(theirs, list):
        return len(mine) == len(theirs) and all(map(equal, mine, theirs))
    if isinstance(mine, Tensor) or isinstance(theirs, Tensor):
        return False
    return mine == theirs
