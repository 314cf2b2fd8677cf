"""Read, replace and replay layers while a model runs; everything is undone on leaving, always."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from captum_llm_ext.model.layers import Site, named_by_model, output_head

Change = Callable[[Tensor], Tensor]


@contextmanager
def frozen_parameters(model: nn.Module) -> Iterator[None]:
    """No gradients for weights: they cost time and memory, and attribution does not use them."""
    # By name, since offloading replaces the parameter of a layer as it runs.
    trainable = [
        (module, name)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad
    ]
    try:
        for module, name in trainable:
            getattr(module, name).requires_grad_(False)
        yield
    finally:
        for module, name in trainable:
            getattr(module, name).requires_grad_(True)


@contextmanager
def without_checkpointing(model: nn.Module) -> Iterator[None]:
    """No gradient checkpointing: inside it hooks see no gradients."""
    modules = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) is True]
    try:
        for module in modules:
            module.gradient_checkpointing = False  # type: ignore[assignment]
        yield
    finally:
        for module in modules:
            module.gradient_checkpointing = True  # type: ignore[assignment]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout: every module in evaluation mode for a while."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def reading(sites: Sequence[Site]) -> Iterator[dict[Site, Tensor]]:
    """Record the tensor at each site as the model runs, ready to be differentiated.

    A tensor that carries no gradient yet becomes a leaf that does. The model goes on with a copy,
    since some models write into a layer's output (Falcon adds the residual in place).
    """
    values: dict[Site, Tensor] = {}

    def record(site: Site, tensor: Tensor) -> Tensor:
        if site in values:
            raise _runs_again(site)
        values[site] = tensor if tensor.requires_grad else tensor.detach().requires_grad_()
        return values[site].clone()

    with ExitStack() as stack:
        for site in sites:
            stack.callback(_attach(site, partial(record, site)).remove)
        yield values


def _runs_again(site: Site) -> ValueError:
    return ValueError(
        f"layer {site.name!r} runs more than once in a forward pass, so its attribution is not "
        "defined; choose one that runs once, e.g. a decoder block"
    )


@contextmanager
def writing(values: Mapping[Site, Tensor]) -> Iterator[None]:
    """Put `values` (rows, sequence, …) in place of what the sites hold."""

    def write(value: Tensor, tensor: Tensor) -> Tensor:
        return value.to(tensor, copy=True).reshape(-1, *tensor.shape[1:])

    with ExitStack() as stack:
        for site, value in values.items():
            stack.callback(_attach(site, partial(write, value)).remove)
        yield


@contextmanager
def replaying(blocks: Sequence[nn.Module], state: Any, rows: int) -> Iterator[None]:
    """Let `blocks` return the stored `state` of the last one, over `rows` rows, without running."""
    unset = object()
    forwards = [(block, block.__dict__.get("forward", unset)) for block in blocks]
    try:
        for block in blocks:
            block.forward = lambda *args, **kwargs: _expand(state, rows)
        yield
    finally:
        for block, forward in forwards:
            if forward is unset:
                block.__dict__.pop("forward", None)
            else:
                block.forward = forward  # e.g. the wrapper that accelerate puts there


@dataclass
class HeadInput:
    """The hidden states that the output head reads: `below` has the graph, `above` is a leaf."""

    below: Tensor | None = None
    above: Tensor | None = None


@contextmanager
def split_at_head(model: nn.Module, sites: Sequence[Site] = ()) -> Iterator[HeadInput]:
    """Cut the graph at the input of the output head, so that the head is walked back only once.

    A token's score depends on one position of the head's input, so one backward gives the
    gradients there for all target tokens. The graph stays whole where one of the `sites`, whose
    gradients are to be taken, lies in the head. The copy to a contiguous tensor matters too: on a
    slice the product falls back to a far slower one.
    """
    split, head = HeadInput(), output_head(model)
    keep_graph = head is not None and any(s.module in set(head.modules()) for s in sites)

    def cut(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0].contiguous()
        if keep_graph or not hidden.requires_grad:
            return (hidden, *args[1:])
        split.below, split.above = hidden, hidden.detach().requires_grad_()
        return (split.above, *args[1:])

    hook = head.register_forward_pre_hook(cut) if head is not None else None
    try:
        yield split
    finally:
        if hook is not None:
            hook.remove()


@dataclass
class LayerState:
    """What a site held in one forward pass."""

    tensor: Tensor
    depends_on_tokens: bool
    blocks_before: int


@contextmanager
def tracing(
    model: nn.Module, sites: Sequence[Site], blocks: Sequence[nn.Module], ids: Tensor
) -> Iterator[tuple[dict[Site, LayerState], list[Any]]]:
    """Record each site's state, and the outputs of the `blocks` in the order in which they ran."""
    states: dict[Site, LayerState] = {}
    outputs: list[Any] = []
    with ExitStack() as stack:
        leaves = stack.enter_context(embedding_leaves(model, ids))
        for block in blocks:
            hook = block.register_forward_hook(
                lambda _, __, output: outputs.append(_map_tensors(output, Tensor.detach))
            )
            stack.callback(hook.remove)

        def record(site: Site, tensor: Tensor) -> Tensor:
            depends = tensor.requires_grad or not leaves
            if depends and site in states:
                raise _runs_again(site)
            states[site] = LayerState(tensor.detach().clone(), depends, len(outputs))
            return tensor

        for site in sites:
            stack.callback(_attach(site, partial(record, site)).remove)
        yield states, outputs


@contextmanager
def embedding_leaves(model: nn.Module, ids: Tensor) -> Iterator[list[Tensor]]:
    """Let gradients start at the embeddings of `ids`, which says what depends on the tokens."""
    leaves: list[Tensor] = []

    def make_leaf(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not (args and is_ids(args[0], ids) and torch.is_grad_enabled()):
            return None
        # An embedding inside a wrapper, as of LoRA, has its leaf already.
        leaf = output if output.requires_grad else output.detach().requires_grad_()
        leaves.append(leaf)
        return leaf

    with ExitStack() as stack:
        named = named_by_model(model, "get_input_embeddings")
        for module in (m for m in model.modules() if isinstance(m, nn.Embedding) or m is named):
            stack.callback(module.register_forward_hook(make_leaf).remove)
        yield leaves


def is_ids(tensor: Any, ids: Tensor) -> bool:
    return (
        isinstance(tensor, Tensor)
        and not tensor.is_floating_point()
        and tensor.numel() == ids.numel()
        and torch.equal(tensor.reshape(ids.shape).to(ids.device), ids)
    )


def _attach(site: Site, change: Change) -> RemovableHandle:
    if not site.at_input:
        return site.module.register_forward_hook(
            lambda module, args, output: _change_output(output, change, site)
        )
    return site.module.register_forward_pre_hook(
        lambda module, args, kwargs: _change_input(args, kwargs, change, site), with_kwargs=True
    )


def _change_output(output: Any, change: Change, site: Site) -> Any:
    """Change the first floating-point tensor of a layer's output."""
    if _is_float(output):
        return change(output)
    if isinstance(output, tuple | list):
        index, items = _first_float(enumerate(output), site), list(output)
        items[index] = change(items[index])
        return type(output)(items)
    if isinstance(output, Mapping):
        changed, key = copy(output), _first_float(output.items(), site)
        changed[key] = change(output[key])  # type: ignore[index]
        return changed
    raise ValueError(_no_tensor(site))


def _change_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], change: Change, site: Site
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Change the first floating-point tensor that a layer is called with."""
    if any(_is_float(arg) for arg in args):
        return _change_output(args, change, site), kwargs
    key = "hidden_states" if _is_float(kwargs.get("hidden_states")) else None
    key = key or _first_float(kwargs.items(), site)
    return args, {**kwargs, key: change(kwargs[key])}


def _first_float(items: Any, site: Site) -> Any:
    for key, value in items:
        if _is_float(value):
            return key
    raise ValueError(_no_tensor(site))


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _no_tensor(site: Site) -> str:
    where = "input" if site.at_input else "output"
    other = "output (attribute_to_layer_input=False)" if site.at_input else "input"
    return (
        f"expected a floating-point tensor in the {where} of layer {site.name!r}, got none; "
        f"attribute to its {other} or to another layer"
    )


def _expand(state: Any, rows: int) -> Any:
    return _map_tensors(
        state, lambda t: t.expand(rows, *t.shape[1:]).clone() if t.dim() and t.size(0) == 1 else t
    )


def _map_tensors(state: Any, change: Change) -> Any:
    if isinstance(state, Tensor):
        return change(state)
    if isinstance(state, tuple | list):
        return type(state)(_map_tensors(item, change) for item in state)
    return state
