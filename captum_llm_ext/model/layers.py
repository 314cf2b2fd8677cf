"""Layers by module, name or pattern, and the parts of a model: embedding, blocks, output head."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

LayerSpec = nn.Module | str


@dataclass(frozen=True, eq=False)
class Site:
    """A place in the model where a tensor is read and replaced: a layer's output, or its input."""

    name: str
    module: nn.Module
    at_input: bool = False


def find_layers(model: nn.Module, *patterns: str) -> dict[str, nn.Module]:
    """Find layers of a model by name.

    Args:
        model: any ``nn.Module``.
        *patterns: each a glob on the qualified name (``"model.layers.*.mlp"``) or the last part
            of the name alone (``"q_proj"``). A ``*`` also matches dots.

    Returns:
        An ordered dict from qualified name to module, in the order of ``model.named_modules()``,
        each layer once however many patterns match it.

    Raises:
        ValueError: no pattern was given, or a pattern matches nothing (close names are listed).

    Example:
        >>> layers = find_layers(model, "q_proj", "model.layers.*.mlp")
        >>> list(layers)[:2]
        ['model.layers.0.self_attn.q_proj', 'model.layers.0.mlp']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"find_layers expects a model first, got {type(model).__name__}")
    if not patterns:
        raise ValueError("find_layers expects at least one pattern, e.g. 'q_proj'; got none")
    names = [name for name, _ in model.named_modules() if name]
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"a layer pattern must be a str, got {type(pattern).__name__}")
        if not any(_matches(name, pattern) for name in names):
            raise ValueError(_no_match(pattern, names))
    return {
        name: module
        for name, module in model.named_modules()
        if name and any(_matches(name, pattern) for pattern in patterns)
    }


def resolve_sites(
    model: nn.Module, layer: LayerSpec | Iterable[LayerSpec], at_input: bool = False
) -> tuple[list[Site], bool]:
    """The sites that `layer` names, and whether they are to be returned as several layers.

    One module, or one string that matches one layer, is a single layer; a list, or a pattern that
    matches several, is several.
    """
    several = not isinstance(layer, nn.Module | str) or isinstance(layer, nn.ModuleList)
    specs: Sequence[LayerSpec] = list(layer) if several else [layer]  # type: ignore
    modules: dict[str, nn.Module] = {}
    for spec in specs:
        modules.update(_resolve(model, spec))
    if not modules:
        raise ValueError("expected at least one layer, got an empty list")
    sites = [Site(name, module, at_input) for name, module in modules.items()]
    return sites, several or len(sites) > 1


def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """The model's blocks in order: the outermost ``ModuleList`` with the most parameters."""
    lists = [list(blocks) for blocks in _outermost_module_lists(model)]
    return max(lists, key=_n_parameters, default=[])


def _n_parameters(modules: list[nn.Module]) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def _outermost_module_lists(module: nn.Module) -> list[nn.ModuleList]:
    found: list[nn.ModuleList] = []
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            found.append(child)
        else:
            found.extend(_outermost_module_lists(child))
    return found


def _resolve(model: nn.Module, spec: LayerSpec) -> dict[str, nn.Module]:
    if isinstance(spec, str):
        return find_layers(model, spec)
    if not isinstance(spec, nn.Module):
        raise TypeError(f"a layer must be a module, a name or a pattern, got {spec!r}")
    for name, module in model.named_modules():
        if module is spec:
            return {name: module}
    raise ValueError(
        f"the layer {type(spec).__name__} is not part of the model {type(model).__name__}: "
        "pass a submodule of the model that the attribution method was created with, or its name"
    )


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or name.rpartition(".")[2] == pattern


def _no_match(pattern: str, names: list[str]) -> str:
    short = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    close = get_close_matches(pattern, names + short, n=5, cutoff=0.5)
    hint = f"close names: {', '.join(close)}" if close else f"layers: {', '.join(short[:8])}, …"
    return f"no layer of the model matches {pattern!r}; {hint}"


def token_embedding(model: nn.Module) -> nn.Module:
    """The embedding of the token ids.

    Raises ValueError where the model does not name it and has several.
    """
    found = known_token_embedding(model)
    if found is None:
        raise ValueError(
            f"cannot tell which embedding of {type(model).__name__} is that of the tokens: give "
            "the model a get_input_embeddings(), or use a token id as the baseline"
        )
    return found


def known_token_embedding(model: nn.Module) -> nn.Module | None:
    """The embedding that the model names, or its only one, or None."""
    named = named_by_model(model, "get_input_embeddings")
    only = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    return named if named is not None or len(only) != 1 else only[0]


def input_device(model: nn.Module) -> torch.device:
    """Where the ids go: to the embeddings, also where a model is spread over devices.

    An offloaded model keeps its weights on no device; accelerate's hook knows where it runs.
    """
    embedding = known_token_embedding(model)
    weight = getattr(embedding, "weight", None)
    if isinstance(weight, Tensor) and weight.device.type != "meta":
        return weight.device
    hooks = (getattr(module, "_hf_hook", None) for module in (embedding, model))
    devices = [getattr(hook, "execution_device", None) for hook in hooks]
    devices += [getattr(model, "device", None), *(p.device for p in model.parameters())]
    return torch.device(next((device for device in devices if device is not None), "cpu"))


@torch.no_grad()
def embedded(ids: Tensor, model: nn.Module) -> Tensor:
    """The embeddings (…, hidden) of token ids, as the model embeds them, in float32."""
    values: Tensor = token_embedding(model)(ids.to(input_device(model)))
    return values.float()


def output_head(model: nn.Module) -> nn.Module | None:
    return named_by_model(model, "get_output_embeddings")


def named_by_model(model: nn.Module, getter: str) -> nn.Module | None:
    """The module that a transformers model names itself, where it does."""
    try:
        module = getattr(model, getter, lambda: None)()
    except NotImplementedError:
        return None
    return module if isinstance(module, nn.Module) else None


def accepts(model: nn.Module, argument: str) -> bool:
    """Whether the model's forward has an argument of this name."""
    return argument in inspect.signature(model.forward).parameters
