"""The settings of a batch, which may not change while it is unfinished."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from captum_llm_ext.batches.lines import Line, shortened
from captum_llm_ext.model.compiled import original, original_name
from captum_llm_ext.registry import WITHOUT_EFFECT
from captum_llm_ext.results.recording import as_json, digest, versions

VALUES_PER_WEIGHT = 8


def batch_settings(
    model: nn.Module, tokenizer: Any, lines: Sequence[Line], request: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that the results depend on, as JSON writes it; large things as digests."""
    return {
        **versions(),
        "model": digest(_weights(model)),
        "tokenizer": digest(_tokenizer(tokenizer)),
        "prompts": digest(part for line in lines for part in (str(line.number), line.text)),
        **{
            name: as_json(value, model)
            for name, value in request.items()
            if name not in WITHOUT_EFFECT
        },
    }


def check_settings(path: Path, settings: Mapping[str, Any], out: Path) -> None:
    """Write the settings of a new batch, or compare them with those that it was started with.

    Raises:
        ValueError: a setting differs, and the message says which; or `out` is not from a batch.
    """
    if not path.exists():
        if out.exists():
            raise ValueError(
                f"{out} exists and is not from a batch: choose another name, or delete it"
            )
        write_whole(path, json.dumps(settings, indent=1).encode())
        return
    try:
        before = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): delete {path.parent}") from error
    names = [n for n in {**before, **settings} if before.get(n) != settings.get(n)]
    if names:
        differences = "; ".join(
            f"{name}: {shortened(json.dumps(before.get(name)))} then, "
            f"{shortened(json.dumps(settings.get(name)))} now"
            for name in names
        )
        raise ValueError(
            f"{out} was started with other settings ({differences}): use those, choose another "
            f"name, or delete {path.parent} and {out.name} to start anew"
        )


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is there either whole or not at all."""
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def _weights(model: nn.Module) -> Iterable[str]:
    """The name and a few values of every weight, which tell models of one architecture apart."""
    yield type(original(model)).__name__
    for name, weight in model.named_parameters():
        yield f"{original_name(name)} {weight.dtype} {_sample(weight)}"


def _sample(weight: Tensor) -> list[float]:
    # The first pass may repack quantised weights, and offloaded weights have no values here.
    if not weight.is_floating_point() or weight.is_meta or weight.numel() == 0:
        return []
    flat = weight.detach().reshape(-1)
    indices = torch.linspace(0, flat.numel() - 1, VALUES_PER_WEIGHT, dtype=torch.float64).long()
    values: list[float] = flat[indices.to(flat.device)].tolist()
    return values


def _tokenizer(tokenizer: Any) -> Iterable[str]:
    get_vocab = getattr(tokenizer, "get_vocab", dict)
    yield type(tokenizer).__name__
    yield repr(sorted(get_vocab().items()))
    yield str(getattr(tokenizer, "chat_template", None))
