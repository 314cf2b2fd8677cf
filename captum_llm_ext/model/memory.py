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

Result = TypeVar("Result")


def _free_on_cuda(device: torch.device) -> int:
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


_FREE: dict[str, Callable[[torch.device], int]] = {
    "cpu": lambda device: int(psutil.virtual_memory().available),
    "cuda": _free_on_cuda,
    "mps": lambda device: torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory(),
}


def free_bytes(device: torch.device) -> int | None:
    """The free memory of a device, or None where the device does not tell."""
    return _FREE[device.type](device) if device.type in _FREE else None


@contextmanager
def counting_saved_bytes(parameters: Iterator[Tensor]) -> Iterator[Callable[[], int]]:
    """Count the bytes that autograd keeps for a backward pass, without those of the parameters."""
    of_parameters = {_storage_key(parameter) for parameter in parameters}
    sizes: dict[tuple[torch.device, int], int] = {}

    def keep(tensor: Tensor) -> Tensor:
        key = _storage_key(tensor)
        if key not in of_parameters:
            sizes[key] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # an output kept as it is would hold its own graph for ever

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        yield lambda: sum(sizes.values())


def _storage_key(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()


@dataclass
class Halving:
    """Works on rows in batches, and halves a batch that does not fit into memory.

    max_rows: the most rows in a batch; it falls as memory runs out.
    """

    max_rows: int | None = None

    def __call__(self, work: Callable[[slice], Result], rows: int) -> list[Result]:
        """What `work` returns for each batch of the rows, in order."""
        results: list[Result] = []
        done = 0
        while done < rows:
            batch = slice(done, min(rows, done + (self.max_rows or rows)))
            try:
                results.append(work(batch))
                done = batch.stop
                continue
            except RuntimeError as error:
                if batch.stop - batch.start == 1 or not is_out_of_memory(error):
                    raise
            # Outside the handler, whose traceback holds on to the tensors.
            self.max_rows = (batch.stop - batch.start + 1) // 2
            logger.info("out of memory: from now on %d rows in a pass", self.max_rows)
        return results


def is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
