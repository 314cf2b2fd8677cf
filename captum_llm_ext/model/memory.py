"""Memory: what is free, what a pass with gradients needs, and smaller batches where it runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import psutil
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

logger = logging.getLogger(__name__)

Found = TypeVar("Found")


def _free_of_cuda(device: torch.device) -> int:
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


_FREE: dict[str, Callable[[torch.device], int]] = {
    "cpu": lambda device: int(psutil.virtual_memory().available),
    "cuda": _free_of_cuda,
    "mps": lambda device: torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory(),
}


def free_bytes(device: torch.device) -> int | None:
    """The free memory of a device, or None where the device does not tell."""
    find = _FREE.get(device.type)
    return None if find is None else find(device)


@contextmanager
def counting_saved_bytes(parameters: Iterator[Tensor]) -> Iterator[Callable[[], int]]:
    """Count the bytes that autograd keeps for a backward pass, the parameters left aside."""
    known = {_place(parameter) for parameter in parameters}
    sizes: dict[tuple[torch.device, int], int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if _place(tensor) not in known:
            sizes[_place(tensor)] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # an output kept as it is would hold its own graph for ever

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        yield lambda: sum(sizes.values())


def _place(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()


@dataclass
class Halving:
    """Does work on rows in batches, by halves where a batch does not fit into memory.

    most: rows that fit, as far as is known.
    """

    most: int | None = None

    def __call__(self, work: Callable[[slice], Found], rows: int) -> list[Found]:
        """What `work` returns for each batch of the rows, in order."""
        found: list[Found] = []
        done = 0
        while done < rows:
            part = slice(done, min(rows, done + (self.most or rows)))
            try:
                found.append(work(part))
                done = part.stop
                continue
            except RuntimeError as error:
                if part.stop - part.start == 1 or not is_out_of_memory(error):
                    raise
            # Out of the handler, whose traceback holds on to the tensors.
            self.most = (part.stop - part.start + 1) // 2
            logger.info("out of memory: from now on %d rows in a pass", self.most)
        return found


def is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
