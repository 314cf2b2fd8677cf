"""Random draws that are the same in every run, or that leave no trace."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from captum_llm_ext.model.lock import holding


@contextmanager
def seeded(*seeds: int) -> Iterator[None]:
    """Let what torch, numpy and Python draw depend on the seeds alone.

    The generators of the CPU are as before on leaving; those of a GPU stay where the draws left
    them.
    """
    # One seed of 32 bits, which is what numpy takes; neighbouring seeds share nothing in it.
    seed = int.from_bytes(hashlib.sha256(repr(seeds).encode()).digest()[:4], "big")
    with holding(random):  # the generators are the whole process's
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
    """Let torch, numpy and Python draw afterwards what they draw inside."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
