"""Memory: rows for the free memory, halves where it runs out, and nothing kept after a call."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, count
from typing import Any

import pytest
import torch
from captum.attr import (
    FeatureAblation,
    LayerGradientShap,
    LayerIntegratedGradients,
)
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from captum_llm_ext import LLMAttribution
from captum_llm_ext.gradients import run as gradient_run
from captum_llm_ext.gradients.trace import Trace
from captum_llm_ext.inputs.features import read_features
from captum_llm_ext.model.layers import resolve_sites
from captum_llm_ext.model.memory import Halving, free_bytes, is_out_of_memory
from captum_llm_ext.scoring.target_scores import Target
from captum_llm_ext.scoring.teacher_forcing import TeacherForcing
from tests.models.families import tiny_model, tiny_tokenizer
from tests.oracles.cases import (
    assert_close,
    differentiating,
    in_pairs,
    our_attribution,
    prompt_input,
    target_ids,
)

pytestmark = pytest.mark.filterwarnings("ignore:integrated gradients have not converged")

METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "fixed rule": (LayerIntegratedGradients, {"n_steps": 8}),
    "sequence alone": (LayerIntegratedGradients, {"n_steps": 8, "include_per_token_attr": False}),
    "adaptive": (LayerIntegratedGradients, {"n_steps": None, "method": "adaptive", "tol": 0.05}),
    "gradient shap": (LayerGradientShap, {"n_samples": 8, "stdevs": 0.2}),
    "hidden": (LayerIntegratedGradients, {"n_steps": 8, "include_hidden_attr": True}),
}


@contextmanager
def limited(model: nn.Module, rows: int, error: Any = None) -> Iterator[list[int]]:
    """Memory for this many rows; it yields the rows of every pass, also of those that failed."""
    seen: list[int] = []

    def check(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].size(0))
        if args[0].size(0) > rows:
            raise error or torch.OutOfMemoryError("CUDA out of memory (of the test)")

    hook = model.get_input_embeddings().register_forward_pre_hook(check)
    try:
        yield seen
    finally:
        hook.remove()


@contextmanager
def limited_backward(model: nn.Module, rows: int) -> Iterator[None]:
    """Memory that runs out in the middle of the backward passes, after some are done."""
    calls = count(1)

    def stop(gradient: Tensor) -> None:
        if next(calls) > 5 and gradient.size(0) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory (of the test)")

    def attach(_: nn.Module, __: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(stop)

    hook = model.model.norm.register_forward_hook(attach)
    try:
        yield
    finally:
        hook.remove()


def attribute(model: nn.Module, method: str, layer: Any = "model.layers.1", **more: Any) -> Any:
    kind, options = METHODS[method]
    torch.manual_seed(0)
    options = {"target": target_ids(4), **options, **more}
    return our_attribution(kind, model, layer, prompt_input(), **options)


def assert_same(result: Any, expected: Any) -> None:
    assert_close(result.seq_attr, expected.seq_attr, 1e-5)
    for name in ("token_attr", "hidden_attr", "convergence_delta"):
        if getattr(expected, name) is not None:
            torch.testing.assert_close(
                getattr(result, name), getattr(expected, name), rtol=1e-4, atol=1e-4
            )
    assert result.n_evaluations == expected.n_evaluations


# --- smaller batches where memory runs out -------------------------------------------------------


def test_rows_stay_reduced() -> None:
    """A batch that did not fit is not tried again in the same path."""
    model = tiny_model("llama", fresh=True)
    with limited(model, 2) as seen:
        attribute(
            model,
            "fixed rule",
            "model.embed_tokens",
            target=target_ids(1),
            internal_batch_size=8,
        )
    assert [rows for rows in seen if rows > 2] == [8, 4]
    assert seen[-4:] == [2, 2, 2, 2]


def test_adaptive_takes_no_more_rows_than_internal_batch_size() -> None:
    """It splits even the three rows of one interval."""
    model = tiny_model("llama", fresh=True)
    expected = attribute(model, "adaptive")
    with limited(model, 10**6) as seen:
        result = attribute(model, "adaptive", internal_batch_size=1)
    assert max(seen) <= 2  # the path's two ends are scored together
    assert_same(result, expected)


@in_pairs(method=list(METHODS), rows=[2, 4], layer=["model.embed_tokens", "model.layers.1"])
def test_results_after_running_out_of_memory(method: str, rows: int, layer: str) -> None:
    model = tiny_model("llama", fresh=True)
    expected = attribute(model, method, layer)
    with limited(model, rows) as seen:
        result = attribute(model, method, layer)
    assert max(seen) > rows, "memory never ran out: this case tests nothing"
    assert_same(result, expected)


@pytest.mark.parametrize("method", METHODS)
def test_results_after_running_out_in_a_backward(method: str) -> None:
    """Nothing that the failed rows had added counts twice."""
    model = tiny_model("llama", fresh=True)
    expected = attribute(model, method)
    with limited_backward(model, 2):
        result = attribute(model, method)
    assert_same(result, expected)


def test_results_after_running_out_in_forward_mode() -> None:
    model = tiny_model("llama", fresh=True)
    model.set_attn_implementation("eager")
    with differentiating(forward=True):
        expected = attribute(model, "fixed rule")
        with limited(model, 3) as seen:
            result = attribute(model, "fixed rule")
    assert max(seen) > 3
    assert_same(result, expected)


def test_joint_layers_after_running_out_of_memory() -> None:
    model, layers = tiny_model("llama", fresh=True), ["model.layers.1.mlp", "model.layers.2.mlp"]
    expected = attribute(model, "fixed rule", layers, layer_mode="joint")
    with limited(model, 3):
        result = attribute(model, "fixed rule", layers, layer_mode="joint")
    assert_close(result.layer_token_attr, expected.layer_token_attr, 1e-5)


def test_progress_counts_every_row_once(monkeypatch: Any) -> None:
    model, told = tiny_model("llama", fresh=True), []
    tqdm: Any = gradient_run.__dict__["tqdm"]

    class Bar(tqdm):
        def update(self, n: float | None = 1) -> Any:
            told.append(n)
            return super().update(n)

    monkeypatch.setattr(gradient_run, "tqdm", Bar)
    with limited(model, 2):
        attribute(model, "fixed rule", target=target_ids(1), internal_batch_size=8)
    assert sum(told) == 8


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_one_row_that_does_not_fit_raises_the_error_of_torch(error: RuntimeError) -> None:
    model = tiny_model("llama", fresh=True)
    assert is_out_of_memory(error)
    with limited(model, 0, error), pytest.raises(RuntimeError, match=r"out of memory|allocate"):
        attribute(model, "fixed rule")


def test_the_error_of_the_processor_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_other_errors_are_not_tried_again() -> None:
    model = tiny_model("llama", fresh=True)
    with (
        limited(model, 2, RuntimeError("shapes do not match")) as seen,
        pytest.raises(RuntimeError, match="shapes do not match"),
    ):
        attribute(model, "fixed rule", internal_batch_size=8)
    assert len([rows for rows in seen if rows > 2]) == 1


@pytest.mark.parametrize("rows", [1, 2])
def test_prompts_after_running_out_of_memory(rows: int) -> None:
    model = tiny_model("llama", fresh=True)
    wrapper = LLMAttribution(FeatureAblation(model), tiny_tokenizer())
    expected = wrapper.attribute(prompt_input(), target=target_ids(3))
    with limited(model, rows) as seen:
        result = wrapper.attribute(prompt_input(), target=target_ids(3))
    assert max(seen) > rows
    assert_close(result.token_attr, expected.token_attr, 1e-5)


@pytest.mark.parametrize("max_rows", [None, 1, 3, 7, 50])
@pytest.mark.parametrize("fits", [1, 2, 5, 100])
def test_halving_covers_every_row_once_and_in_order(max_rows: int | None, fits: int) -> None:
    def work(rows: slice) -> list[int]:
        if rows.stop - rows.start > fits:
            raise torch.OutOfMemoryError("of the test")
        return list(range(rows.start, rows.stop))

    halving = Halving(max_rows)
    for rows in (23, 4, 0):
        assert list(chain(*halving(work, rows))) == list(range(rows))


# --- rows for the memory that is free ------------------------------------------------------------


def rows_tried(free: int | None, monkeypatch: Any) -> list[int]:
    """The rows of the passes along the path, where this many bytes are free."""
    monkeypatch.setattr(gradient_run, "free_bytes", lambda device: free)
    model = tiny_model("llama", fresh=True)
    with limited(model, 10**6) as seen:
        attribute(model, "fixed rule", "model.embed_tokens", target=target_ids(1))
    return seen


def saved_bytes(model: nn.Module, prompt: Tensor) -> int:
    """What the pass at the input finds that autograd keeps of it."""
    forcing = TeacherForcing(model, prompt, Target(target_ids(1)))
    sites, _ = resolve_sites(model, model.get_input_embeddings())
    features = read_features(prompt_input(), tiny_tokenizer(), prompt.device)
    return Trace.of(forcing, forcing.whole, sites, features, for_paths=True)[0].saved_bytes


def test_rows_are_chosen_for_the_free_memory(monkeypatch: Any) -> None:
    model = tiny_model("llama").requires_grad_(False)
    one = saved_bytes(model, prompt_input().inp_tensor)
    largest = {rows: max(rows_tried(2 * rows * one + 100, monkeypatch)) for rows in (2, 4)}
    assert largest == {2: 2, 4: 4}
    assert 8 in rows_tried(10**12, monkeypatch)


def test_at_least_one_row_however_little_is_free(monkeypatch: Any) -> None:
    assert max(rows_tried(0, monkeypatch)) <= 2  # the path's two ends are scored together


def test_a_device_that_does_not_tell_gets_all_rows(monkeypatch: Any) -> None:
    assert free_bytes(torch.device("meta")) is None
    assert 8 in rows_tried(None, monkeypatch)


def test_the_free_memory_of_this_machine() -> None:
    free = free_bytes(torch.device("cpu"))
    assert free is not None
    assert 10**6 < free < 10**14


def kept_by_autograd(run: Callable[[], Any], parameters: list[Tensor]) -> int:
    """The bytes of the storages of all tensors that a backward pass would unpack."""
    storages: dict[int, int] = {}
    alive: list[Any] = []
    of_parameters = {p.untyped_storage().data_ptr() for p in parameters}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        alive.append(storage)
        if storage.data_ptr() not in of_parameters:
            storages[storage.data_ptr()] = storage.size()
        return tensor.detach()

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storages.values())


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_saved_bytes_is_what_autograd_keeps(family: str) -> None:
    model = tiny_model(family, fresh=True).requires_grad_(False)
    prompt = prompt_input().inp_tensor
    embedding = model.get_input_embeddings()

    def run() -> Any:
        values = embedding(prompt).detach().requires_grad_()
        logits = model(inputs_embeds=values, use_cache=False, logits_to_keep=1).logits
        return logits.float().log_softmax(-1)

    truth = kept_by_autograd(run, list(model.parameters()))
    assert 0.7 * truth < saved_bytes(model, prompt) < 1.5 * truth


def test_saved_bytes_grow_with_the_prompt() -> None:
    model = tiny_model("llama", fresh=True).requires_grad_(False)
    short = saved_bytes(model, prompt_input().inp_tensor)
    long = saved_bytes(model, prompt_input().inp_tensor.repeat(1, 3))
    assert 2 < long / short < 6


# --- nothing is kept -----------------------------------------------------------------------------


def tensors() -> int:
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize("method", METHODS)
def test_no_tensor_is_kept(method: str) -> None:
    model = tiny_model("llama", fresh=True)
    attribute(model, method)
    before = tensors()
    for _ in range(2):
        attribute(model, method)
    assert tensors() <= before


def test_no_tensor_is_kept_after_running_out_of_memory() -> None:
    model = tiny_model("llama", fresh=True)
    attribute(model, "fixed rule")
    before = tensors()
    for _ in range(2):
        with limited(model, 3):
            attribute(model, "fixed rule")
        with limited(model, 0), pytest.raises(torch.OutOfMemoryError):
            attribute(model, "fixed rule")
    assert tensors() <= before


def test_no_tensor_is_kept_by_perturbation() -> None:
    wrapper = LLMAttribution(FeatureAblation(tiny_model("llama")), tiny_tokenizer())
    wrapper.attribute(prompt_input(), target=target_ids(3))
    before = tensors()
    for _ in range(2):
        wrapper.attribute(prompt_input(), target=target_ids(3))
    assert tensors() <= before
