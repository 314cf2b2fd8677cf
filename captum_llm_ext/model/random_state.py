"""Random draws that are the same in every run."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded(*seeds: int) -> Iterator[None]:
    """What torch, numpy and Python draw inside depends on the seeds alone.

    Generators of the CPU are put back as they were; those of a GPU stay as they are left.
    """
    seed = _combined(seeds)
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)


@contextmanager
def same_random_state() -> Iterator[None]:
    """What is drawn inside is drawn again afterwards: by torch, numpy and Python."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _combined(seeds: tuple[int, ...]) -> int:
    """One seed of 32 bits, as numpy wants it; neighbours share nothing."""
    return int.from_bytes(hashlib.sha256(repr(seeds).encode()).digest()[:4], "big")
