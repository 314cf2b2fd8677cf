"""OMP_NUM_THREADS threads (1 if unset), no deadlines, and the small real model read once."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import settings

from captum_llm_ext import load_demo_model

torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def demo_model() -> tuple[Any, Any]:
    """The small real model and its tokenizer."""
    return load_demo_model()
