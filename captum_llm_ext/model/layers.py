"""Layers by module, name or pattern, and the parts of a model: embedding, blocks, output head."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from captum_llm_ext.model.compiled import original_name
from captum_llm_ext.model.signatures import takes_any

LayerSpec = nn.Module | str


@dataclass(frozen=True, eq=False)
class Site:
    """Where a tensor is read and replaced: at a layer's output, or at its input."""

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
    names = [name for name, _ in named_layers(model) if name]
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"a layer pattern must be a str, got {type(pattern).__name__}")
        if not any(_matches(name, pattern) for name in names):
            raise _no_match(pattern, names)
    return {
        name: module
        for name, module in named_layers(model)
        if name and any(_matches(name, pattern) for pattern in patterns)
    }


def resolve_sites(
    model: nn.Module, layer: LayerSpec | Iterable[LayerSpec], at_input: bool = False
) -> tuple[list[Site], bool]:
    """The sites that `layer` names, and whether the result has several layers.

    One module, or one string that matches one layer, is a single layer; a list, or a pattern that
    matches several, is several.
    """
    several = not isinstance(layer, nn.Module | str) or isinstance(layer, nn.ModuleList)
    specs: Sequence[LayerSpec] = list(layer) if several else [layer]  # type: ignore
    names = {module: name for name, module in named_layers(model)}
    modules: dict[str, nn.Module] = {}
    for spec in specs:
        if isinstance(spec, str):
            modules.update(find_layers(model, spec))
        elif isinstance(spec, nn.Module) and spec in names:
            modules[names[spec]] = spec
        else:
            raise _no_layer(model, spec)
    if not modules:
        raise ValueError("expected at least one layer, got an empty list")
    sites = [Site(name, module, at_input) for name, module in modules.items()]
    return sites, several or len(sites) > 1


def named_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names and modules, named as if nothing were compiled; an original follows its wrapper."""
    return [(original_name(name), module) for name, module in model.named_modules()]


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or name.rpartition(".")[2] == pattern


def _no_match(pattern: str, names: list[str]) -> ValueError:
    short = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    close = get_close_matches(pattern, names + short, n=5, cutoff=0.5)
    hint = f"close names: {', '.join(close)}" if close else f"layers: {', '.join(short[:8])}, …"
    return ValueError(f"no layer of the model matches {pattern!r}; {hint}")


def _no_layer(model: nn.Module, spec: object) -> TypeError | ValueError:
    if not isinstance(spec, nn.Module):
        return TypeError(f"a layer must be a module, a name or a pattern, got {spec!r}")
    return ValueError(
        f"the layer {type(spec).__name__} is not part of the model {type(model).__name__}: "
        "pass a submodule of the model that the attribution method was created with, or its name"
    )


def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """The model's blocks in order: the outermost ``ModuleList`` with the most parameters."""
    lists: list[list[nn.Module]] = []
    inside: set[nn.Module] = set()
    for module in model.modules():  # an outer list comes before the lists inside it
        if isinstance(module, nn.ModuleList) and module not in inside:
            lists.append(list(module))
            inside.update(module.modules())
    return max(
        lists,
        key=lambda blocks: sum(p.numel() for block in blocks for p in block.parameters()),
        default=[],
    )


def token_embedding(model: nn.Module) -> nn.Module:
    """The embedding of the token ids.

    Raises ValueError where the model does not name it and has several.
    """
    embedding = find_token_embedding(model)
    if embedding is None:
        raise ValueError(
            f"cannot tell which embedding of {type(model).__name__} is that of the tokens: give "
            "the model a get_input_embeddings(), or use a token id as the baseline"
        )
    return embedding


def find_token_embedding(model: nn.Module) -> nn.Module | None:
    """The embedding that the model names, or its only one, or None."""
    owner = owner_of(model, "get_input_embeddings")
    named = module_from_getter(model if owner is None else owner, "get_input_embeddings")
    if named is None:  # halves that are plain modules, as FSMT's, keep to the name all the same
        named = getattr(model, "embed_tokens", None)
    if isinstance(named, nn.Module):
        return named
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return embeddings[0] if len(embeddings) == 1 else None


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that gives the logits, where the model names it."""
    return module_from_getter(model, "get_output_embeddings")


def owner_of(model: nn.Module, attribute: str) -> nn.Module | None:
    """The model, or the one inside its wrappers, that has the attribute; None where none has.

    A wrapper hands on what it is given: it takes any keyword, and has one child alone.
    """
    while not hasattr(model, attribute):
        children = list(model.children())
        if len(children) != 1 or not takes_any(model.forward):
            return None
        (model,) = children
    return model


def module_from_getter(model: nn.Module, getter: str) -> nn.Module | None:
    """What a getter of transformers models returns, or None where the model lacks it."""
    try:
        module = getattr(model, getter, lambda: None)()
    except NotImplementedError:
        return None
    return module if isinstance(module, nn.Module) else None


def input_device(model: nn.Module) -> torch.device:
    """The device of the token ids: that of the embeddings, also where devices share a model.

    An offloaded model keeps its weights on no device; accelerate's hook knows where it runs.
    """
    embedding = find_token_embedding(model)
    weight = getattr(embedding, "weight", None)
    if isinstance(weight, Tensor) and weight.device.type != "meta":
        return weight.device
    hooks = (getattr(module, "_hf_hook", None) for module in (embedding, model))
    devices = [getattr(hook, "execution_device", None) for hook in hooks]
    devices += [getattr(model, "device", None), *(p.device for p in model.parameters())]
    return torch.device(next((device for device in devices if device is not None), "cpu"))


@torch.no_grad()
def embed(ids: Tensor, model: nn.Module) -> Tensor:
    """The embeddings (…, hidden) of token ids, as the model embeds them, in float32."""
    values: Tensor = token_embedding(model)(ids.to(input_device(model)))
    return values.float()
