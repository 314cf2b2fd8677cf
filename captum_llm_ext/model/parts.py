"""The parts of a model that it names itself: token embedding, output head, and where ids go."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor, nn


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
