"""What a batch was started with, so that it is not gone on with otherwise."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from captum_llm_ext._version import __version__
from captum_llm_ext.batches.lines import Line

VALUES_PER_WEIGHT = 8
# Options that decide how the work is done, not what comes of it.
OF_NO_CONSEQUENCE = ("internal_batch_size", "perturbations_per_eval", "show_progress")
_LONGEST_SHOWN = 60


def batch_settings(
    model: nn.Module, tokenizer: Any, lines: Sequence[Line], request: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that the results depend on, as JSON has it; digests of what is large."""
    return {
        "captum_llm_ext": __version__,
        "model": _digest(_weights(model)),
        "tokenizer": _digest(_tokenizer(tokenizer)),
        "prompts": _digest(part for line in lines for part in (str(line.number), line.text)),
        **{
            name: _plain(value, model)
            for name, value in request.items()
            if name not in OF_NO_CONSEQUENCE
        },
    }


def check_settings(path: Path, settings: Mapping[str, Any], out: Path) -> None:
    """Write the settings of a new batch, or compare them with those that it was started with.

    Raises:
        ValueError: they differ, the message says in what; or a file of another origin is there.
    """
    if not path.exists():
        if out.exists():
            raise ValueError(f"{out} exists and is of no batch: choose another name, or delete it")
        write_whole(path, json.dumps(settings, indent=1).encode())
        return
    try:
        before = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): delete {path.parent}") from error
    names = [n for n in {**before, **settings} if before.get(n) != settings.get(n)]
    if names:
        differences = "; ".join(
            f"{name}: {_shown(before.get(name))} then, {_shown(settings.get(name))} now"
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


def _digest(parts: Iterable[str | bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        content = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()[:16]


def _weights(model: nn.Module) -> Iterable[str]:
    """Names and a few values of every weight: what tells apart models of one architecture."""
    yield type(model).__name__
    for name, weight in model.named_parameters():
        yield f"{name} {weight.dtype} {_sample(weight)}"


def _sample(weight: Tensor) -> list[float]:
    # Quantised weights may be packed anew by the first pass; those offloaded have no values here.
    if not weight.is_floating_point() or weight.is_meta or weight.numel() == 0:
        return []
    flat = weight.detach().reshape(-1)
    places = torch.linspace(0, flat.numel() - 1, VALUES_PER_WEIGHT, dtype=torch.float64).long()
    values: list[float] = flat[places.to(flat.device)].tolist()
    return values


def _tokenizer(tokenizer: Any) -> Iterable[str]:
    get_vocab = getattr(tokenizer, "get_vocab", dict)
    yield type(tokenizer).__name__
    yield repr(sorted(get_vocab().items()))
    yield str(getattr(tokenizer, "chat_template", None))


def _plain(value: Any, model: nn.Module) -> Any:
    """A value as JSON has it: modules by their names, tensors by their values."""
    if isinstance(value, nn.Module):
        return next((name for name, part in model.named_modules() if part is value), repr(value))
    if isinstance(value, Tensor):
        return {"tensor": _digest([repr(value.detach().cpu().tolist())])}
    if isinstance(value, Mapping):
        return {str(key): _plain(item, model) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, model) for item in value]
    return value if isinstance(value, str | int | float | None) else repr(value)


def _shown(value: Any) -> str:
    shown = json.dumps(value)
    return shown if len(shown) <= _LONGEST_SHOWN else shown[:_LONGEST_SHOWN] + "…"
