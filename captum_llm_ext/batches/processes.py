"""The share of this process in the work, from the environment that a launcher sets."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

_T = TypeVar("_T")

# Names that torchrun (which `accelerate launch` uses) and the launchers of MPI set.
INDEX = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
COUNT = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
LOCAL_INDEX = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")


@dataclass(frozen=True)
class Process:
    """One of `count` processes; `local_index` counts the processes of its machine."""

    index: int = 0
    count: int = 1
    local_index: int = 0

    def share(self, items: Sequence[_T]) -> list[_T]:
        """Every `count`-th item, so that all shares of items in order of size weigh the same."""
        return list(items[self.index :: self.count])


def this_process(environment: Mapping[str, str] | None = None) -> Process:
    """This process as its launcher describes it, or the only process where there is no launcher."""
    variables = os.environ if environment is None else environment

    def first(names: Sequence[str], default: int) -> int:
        return next((int(variables[name]) for name in names if name in variables), default)

    index, count = first(INDEX, 0), first(COUNT, 1)
    if not 0 <= index < count:
        raise ValueError(f"expected a process index from 0 to {count - 1}, got {index}")
    return Process(index, count, first(LOCAL_INDEX, 0))
