"""Which share of the work is this process's: what a launcher says in the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

_T = TypeVar("_T")

# Of torchrun, which `accelerate launch` starts processes with, and of MPI's launchers.
INDEX = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
COUNT = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
LOCAL_INDEX = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")


@dataclass(frozen=True)
class Process:
    """One of `count` processes; `local_index` is its place among those of its machine."""

    index: int = 0
    count: int = 1
    local_index: int = 0

    def share(self, items: Sequence[_T]) -> list[_T]:
        """Every `count`-th item, so that of items in order of size all shares weigh the same."""
        return list(items[self.index :: self.count])


def this_process(environment: Mapping[str, str] | None = None) -> Process:
    """This process as its launcher describes it; alone where there is none."""
    found = os.environ if environment is None else environment
    index, count = _first(found, INDEX, 0), _first(found, COUNT, 1)
    if not 0 <= index < count:
        raise ValueError(f"expected a process index from 0 to {count - 1}, got {index}")
    return Process(index, count, _first(found, LOCAL_INDEX, 0))


def _first(environment: Mapping[str, str], names: Sequence[str], default: int) -> int:
    return next((int(environment[name]) for name in names if name in environment), default)
