"""How far a library's attributions are from the oracle's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.benchmarks.peers.workload import PARTS, SAMPLED_BLOCKS


def compared(name: str, row: dict[str, Any], oracle: dict[str, Any]) -> dict[str, Any]:
    """The row with how far its attributions are from the oracle's, in place of the attributions."""
    if "error" in row:
        return row
    row = dict(row)
    found = torch.tensor(row.pop("attributions"), dtype=torch.float64)
    row["difference"] = relative_difference(found, expected(name, found, oracle))
    stated = row.pop("stated")
    if name.startswith("error/") and not name.endswith("/unsigned"):
        whole = oracle["error"]["stated"]
        row["sum_error"] = float(found.sum() - whole) / abs(whole)
        row["stated_error"] = None if stated is None else stated / abs(whole)
        row["integral_error"] = relative_difference(found, values(oracle["error"]))
    return row


def expected(name: str, found: Tensor, oracle: dict[str, Any]) -> Tensor:
    """What the oracle has for this work: a sum over tokens, some layers, absolute values."""
    work, _, variant = name.partition("/")
    if work == "sequence":
        return values(oracle["tokens"]).sum(0, keepdim=True)
    known = values(oracle[name if name in oracle else work])
    if work == "layers" and len(found) < len(known):
        known = known[sampled_layers()]
    return known.abs() if variant == "absolute" else known


def sampled_layers() -> list[int]:
    """Places of the sampled blocks' layers in the list of all, which the embeddings begin."""
    return [1 + len(PARTS) * block + part for block in SAMPLED_BLOCKS for part in range(len(PARTS))]


def relative_difference(found: Tensor, known: Tensor) -> float:
    return float((found - known).abs().max() / known.abs().max())


def values(row: dict[str, Any]) -> Tensor:
    return torch.tensor(row["attributions"], dtype=torch.float64)
