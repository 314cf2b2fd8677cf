"""Read, replace and replay layers while a model runs; on leaving, everything is as before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from captum_llm_ext.model.handed_on import BlockGraph, nodes_of
from captum_llm_ext.model.layers import Site, module_from_getter, output_head

Change = Callable[[Site, Tensor], Tensor]


# --- the model's modes ---------------------------------------------------------------------------


@contextmanager
def patched(patches: Iterable[tuple[nn.Module, str, Any]]) -> Iterator[None]:
    """Set attributes of modules; each patch is (module, name, value)."""
    patches, unset = list(patches), object()
    before = [vars(module).get(name, unset) for module, name, _ in patches]
    try:
        for module, name, value in patches:
            setattr(module, name, value)
        yield
    finally:
        for (module, name, _), value in zip(patches, before, strict=True):
            if value is unset:
                vars(module).pop(name, None)
            else:
                setattr(module, name, value)  # such as the `forward` that accelerate puts there


def forward_name(module: nn.Module) -> str:
    """The attribute that holds what a module computes: accelerate's `forward` calls another one."""
    return "_old_forward" if "_old_forward" in vars(module) else "forward"


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Let activations have gradients and weights none, in whatever mode the caller is.

    Gradients of weights cost time and memory, and attribution does not use them.
    """
    # By name, since offloading replaces the parameter of a layer as it runs.
    trainable = [
        (module, name)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad
    ]
    with torch.inference_mode(False), torch.enable_grad(), without_checkpointing(model):
        try:
            for module, name in trainable:
                getattr(module, name).requires_grad_(False)
            yield
        finally:
            for module, name in trainable:
                getattr(module, name).requires_grad_(True)


def without_checkpointing(model: nn.Module) -> AbstractContextManager[None]:
    """No gradient checkpointing: hooks inside a checkpoint see no gradients."""
    modules = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) is True]
    return patched((module, "gradient_checkpointing", False) for module in modules)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, and so no dropout."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


# --- layers --------------------------------------------------------------------------------------


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

    with changing(sites, record):
        yield values


def writing(values: Mapping[Site, Tensor]) -> AbstractContextManager[None]:
    """Put `values` (rows, sequence, …) in place of what the sites hold."""

    def write(site: Site, tensor: Tensor) -> Tensor:
        return values[site].to(tensor, copy=True).reshape(-1, *tensor.shape[1:])

    return changing(values, write)


@dataclass
class LayerState:
    """The value of a site in one forward pass, with its graph."""

    tensor: Tensor
    depends_on_tokens: bool
    blocks_before: int


@dataclass
class BlockState:
    """What a block returned in one forward pass, and its part of the graph."""

    output: Any
    graph: BlockGraph


@contextmanager
def tracing(
    model: nn.Module, sites: Sequence[Site], blocks: Sequence[nn.Module], ids: Tensor
) -> Iterator[tuple[dict[Site, LayerState], list[BlockState]]]:
    """Record each site's state, and those of the `blocks` in the order in which they ran.

    The model goes on with a copy, since some models write into a layer's output (Falcon adds the
    residual in place).
    """
    states: dict[Site, LayerState] = {}
    ended: list[BlockState] = []
    inputs: dict[nn.Module, list[Node]] = {}

    def begin(block: nn.Module, args: Any, kwargs: Any) -> None:
        inputs[block] = nodes_of((args, kwargs))

    def end(block: nn.Module, args: Any, output: Any) -> None:
        graph = BlockGraph(inputs[block], nodes_of(output))
        ended.append(BlockState(_map_tensors(output, Tensor.detach), graph))

    def record(site: Site, tensor: Tensor) -> Tensor:
        depends = tensor.requires_grad or not leaves
        if depends and site in states:
            raise _runs_again(site)
        states[site] = LayerState(tensor, depends, len(ended))
        return tensor.clone()

    with ExitStack() as stack:
        leaves = stack.enter_context(embedding_leaves(model, ids))
        for block in blocks:
            stack.callback(block.register_forward_pre_hook(begin, with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(end).remove)
        stack.enter_context(changing(sites, record))
        yield states, ended


def replaying(blocks: Sequence[nn.Module], state: Any, rows: int) -> AbstractContextManager[None]:
    """Let `blocks` return the stored `state` of the last one, over `rows` rows, without running."""

    def over_rows(tensor: Tensor) -> Tensor:
        one_row = tensor.dim() and tensor.size(0) == 1
        return tensor.expand(rows, *tensor.shape[1:]).clone() if one_row else tensor

    def forward(*args: Any, **kwargs: Any) -> Any:
        return _map_tensors(state, over_rows)

    return patched((block, "forward", forward) for block in blocks)


# --- embeddings and output head ------------------------------------------------------------------


@contextmanager
def embedding_leaves(model: nn.Module, ids: Tensor) -> Iterator[list[Tensor]]:
    """Let gradients start at the embeddings of `ids`: they show which layers see the tokens."""
    leaves: list[Tensor] = []

    def make_leaf(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not (args and is_ids(args[0], ids) and torch.is_grad_enabled()):
            return None
        # An embedding inside a wrapper, as of LoRA, has its leaf already.
        leaf = output if output.requires_grad else output.detach().requires_grad_()
        leaves.append(leaf)
        return leaf

    with ExitStack() as stack:
        named = module_from_getter(model, "get_input_embeddings")
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


@dataclass
class HeadInput:
    """The hidden states that the output head reads: `below` has the graph, `above` is a leaf."""

    below: Tensor | None = None
    above: Tensor | None = None


@contextmanager
def split_at_head(model: nn.Module, sites: Sequence[Site] = ()) -> Iterator[HeadInput]:
    """Cut the graph at the input of the output head, so that one backward through it is enough.

    A token's score depends on one position of the head's input, so one backward gives the
    gradients there for all target tokens. The graph stays whole where one of the `sites`, whose
    gradients will be taken, lies in the head. The copy to a contiguous tensor matters too: the
    product of a slice is far slower.
    """
    split, head = HeadInput(), output_head(model)
    keep_graph = head is not None and any(s.module in set(head.modules()) for s in sites)

    def cut(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0].contiguous()
        if keep_graph or not hidden.requires_grad:
            return (hidden, *args[1:])
        split.below, split.above = hidden, hidden.detach().requires_grad_()
        return (split.above, *args[1:])

    with ExitStack() as stack:
        if head is not None:
            stack.callback(head.register_forward_pre_hook(cut).remove)
        yield split


# --- the tensor of a site ------------------------------------------------------------------------


@contextmanager
def changing(sites: Iterable[Site], change: Change) -> Iterator[None]:
    """Let the model go on with `change(site, tensor)` in place of the tensor at each site.

    That is the first floating-point tensor in the layer's output, or among its arguments.
    """
    with ExitStack() as stack:
        for site in sites:
            if site.at_input:
                on_input = partial(_change_input, site, change)
                hook = site.module.register_forward_pre_hook(on_input, with_kwargs=True)
            else:
                hook = site.module.register_forward_hook(partial(_change_output, site, change))
            stack.callback(hook.remove)
        yield


def _change_output(site: Site, change: Change, _module: nn.Module, _args: Any, output: Any) -> Any:
    if isinstance(output, Tensor) and output.is_floating_point():
        return change(site, output)
    if isinstance(output, tuple | list):
        items = list(output)
        index = _first_float(site, enumerate(items))
        items[index] = change(site, items[index])
        return _like(output, items)
    key = _first_float(site, output.items() if isinstance(output, Mapping) else ())
    changed = copy(output)
    changed[key] = change(site, output[key])
    return changed


def _change_input(
    site: Site, change: Change, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    # Positional arguments come first, then the hidden states, then other keywords.
    named = {"hidden_states": None, **kwargs}
    key = _first_float(site, [*enumerate(args), *named.items()])
    if isinstance(key, int):
        return (*args[:key], change(site, args[key]), *args[key + 1 :]), kwargs
    return args, {**kwargs, key: change(site, kwargs[key])}


def _first_float(site: Site, items: Iterable[tuple[Any, Any]]) -> Any:
    """The key of the first floating-point tensor."""
    for key, value in items:
        if isinstance(value, Tensor) and value.is_floating_point():
            return key
    where, other = ("input", "output") if site.at_input else ("output", "input")
    option = " (attribute_to_layer_input=False)" if site.at_input else ""
    raise ValueError(
        f"expected a floating-point tensor in the {where} of layer {site.name!r}, got none; "
        f"attribute to its {other}{option} or to another layer"
    )


def _map_tensors(state: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Change every tensor of a block's output."""
    if isinstance(state, Tensor):
        return change(state)
    if isinstance(state, tuple | list):
        return _like(state, [_map_tensors(item, change) for item in state])
    return state


def _like(values: Any, items: list[Any]) -> Any:
    """The items as what the values are: a list, a tuple or a named one."""
    return values._make(items) if hasattr(values, "_make") else type(values)(items)


def _runs_again(site: Site) -> ValueError:
    return ValueError(
        f"layer {site.name!r} runs more than once in a forward pass, so its attribution is not "
        "defined; choose one that runs once, e.g. a decoder block"
    )
