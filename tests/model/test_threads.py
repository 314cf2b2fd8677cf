"""Threads that share a model wait for one another, and get the numbers of a single thread."""

from __future__ import annotations

import copy
import gc
import inspect
import logging
import pickle
import random
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_llm_ext import LLMGradientAttribution, batch, compare_methods, explain, faithfulness
from captum_llm_ext.attention.interface import reading_heads
from captum_llm_ext.compat import ATTENTION_KERNELS
from captum_llm_ext.inputs.targets import captum_labels
from captum_llm_ext.model import compiled, lock
from captum_llm_ext.model.lock import holding, only_one_call
from captum_llm_ext.model.quantized import quiet_bitsandbytes
from captum_llm_ext.model.random_state import seeded
from tests.models.families import PROMPT, TARGET, tiny_model, tiny_tokenizer
from tests.perturbations.cases import WithoutCache

METHODS: list[tuple[str, dict[str, Any]]] = [
    ("saliency", {"layers": "model.layers.2"}),
    ("ig", {"n_steps": 5, "baselines": "pad"}),
    ("ablation", {"baselines": "pad"}),
    ("attention", {}),
    ("attention", {"reduction": "rollout"}),
    ("attention", {"reduction": "flow"}),
]


def attributed(model: nn.Module, number: int) -> Tensor:
    method, options = METHODS[number]
    result = explain(model, tiny_tokenizer(), PROMPT, TARGET, method, **options)
    return torch.as_tensor(result.seq_attr)


def share(first: Any, second: Any) -> bool:
    """Whether a thread that takes the second waits for one that holds the first."""
    return not lock._parts(first).isdisjoint(lock._parts(second))


def is_held(thing: Any) -> bool:
    return any(not lock._parts(thing).isdisjoint(call.parts) for call in lock._RUNNING)


@pytest.mark.parametrize("families", [["llama"], ["llama", "qwen2"]])
def test_eight_threads_get_the_numbers_of_one(families: list[str]) -> None:
    models = [tiny_model(family, fresh=True) for family in families]
    kernels = dict(ATTENTION_KERNELS)
    implementations = [model.config._attn_implementation for model in models]
    works = [(model, number) for model in models for number in range(len(METHODS))]
    works = list(islice(cycle(works), 160 // len(models)))  # 20 calls of each thread for one model
    expected = {work: attributed(*work) for work in dict.fromkeys(works)}
    with ThreadPoolExecutor(8) as threads:
        results = list(threads.map(lambda work: attributed(*work), works))
    for work, result in zip(works, results, strict=True):
        torch.testing.assert_close(result, expected[work], atol=1e-6, rtol=1e-5)
    assert [model.config._attn_implementation for model in models] == implementations
    assert dict(ATTENTION_KERNELS) == kernels


def test_a_second_thread_waits_until_the_first_has_left() -> None:
    model, order = tiny_model("llama"), []

    def take() -> None:
        with holding(WithoutCache(model)):
            order.append("taken")

    def take_another() -> None:
        with holding(tiny_model("qwen2")):
            pass

    with ThreadPoolExecutor(2) as threads:
        with holding(model):
            taken = threads.submit(take)
            threads.submit(take_another).result(60)  # which does not wait
            order.append("left")
        taken.result(60)
    assert order == ["left", "taken"]


def test_what_shares_a_part_waits_and_nothing_else() -> None:
    model, other = tiny_model("llama", fresh=True), tiny_model("llama", fresh=True)
    assert share(model, model)
    assert share(model, WithoutCache(model))
    assert share(model.model, model)
    assert share(WithoutCache(model), WithoutCache(model))
    assert not share(model, other)
    assert not share(model, copy.deepcopy(model))
    tied = tiny_model("llama", fresh=True)
    tied.lm_head.weight = model.lm_head.weight
    assert share(model, tied)
    same_config = type(model)(model.config)  # whose attention implementation a call changes
    assert share(model, same_config)


def test_a_call_inside_a_call_does_not_wait() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()

    def nested(model: Any, tokenizer: Any, inp: Any, target: Tensor) -> Any:
        return explain(model, tokenizer, inp, target, "attention")

    with only_one_call(model):
        compared = compare_methods(
            model, tokenizer, [PROMPT], [nested], [TARGET], n_random=2, baselines="pad"
        )
    assert list(compared.table.index) == ["nested"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_thread_that_raises_leaves_the_model_free(error: type[BaseException]) -> None:
    model = tiny_model("llama", fresh=True)
    expected = attributed(model, 0)

    def stop(*_: Any) -> None:
        raise error("stopped by the test")

    def fail() -> None:
        hook = model.lm_head.register_forward_hook(stop)
        with pytest.raises(error):
            attributed(model, 0)
        hook.remove()

    with ThreadPoolExecutor(1) as threads:
        threads.submit(fail).result(60)
    assert not is_held(model)
    assert torch.equal(attributed(model, 0), expected)


def test_judges_hold_the_model_too() -> None:
    model, tokenizer = tiny_model("llama", fresh=True), tiny_tokenizer()
    result = explain(model, tokenizer, PROMPT, TARGET, "saliency")
    held: list[bool] = []
    model.lm_head.register_forward_hook(lambda *_: held.append(is_held(model)))
    faithfulness(model, tokenizer, result, TARGET, baselines="pad", n_random=2)
    compare_methods(model, tokenizer, [PROMPT], ["saliency"], [TARGET], n_random=2, baselines="pad")
    assert held
    assert all(held)


def test_the_lock_keeps_no_model_and_is_not_copied() -> None:
    model = tiny_model("qwen2", fresh=True)
    attributed(model, 0)
    assert not any("lock" in name for module in model.modules() for name in vars(module))
    pickle.dumps(copy.deepcopy(model))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


# --- what the whole process shares ---------------------------------------------------------------


def crossed(first: Any, second: Any) -> None:
    """Enter the first, enter the second, leave the first, leave the second."""
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)


def test_kernels_are_restored_in_whatever_order_threads_leave() -> None:
    before = dict(ATTENTION_KERNELS)
    crossed(reading_heads([], lambda _: None), reading_heads([], lambda _: None))
    assert dict(ATTENTION_KERNELS) == before


def test_a_kernel_that_is_added_meanwhile_stays() -> None:
    def kernel(*_: Any, **__: Any) -> None: ...

    try:
        with reading_heads([], lambda _: None):
            ATTENTION_KERNELS["of the test"] = kernel
        assert ATTENTION_KERNELS["of the test"] is kernel
    finally:
        ATTENTION_KERNELS.pop("of the test", None)


def test_no_kernel_is_missing_while_they_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model in another thread may look its kernel up at any moment."""

    class Watched(dict[str, Any]):
        def clear(self) -> None:
            raise AssertionError("no kernel is there for a moment")

    monkeypatch.setattr(
        "captum_llm_ext.attention.interface.ATTENTION_KERNELS", Watched(ATTENTION_KERNELS)
    )
    with reading_heads([], lambda _: None):
        pass


def test_the_log_of_bitsandbytes_is_as_before() -> None:
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    level, filters = logger.level, list(logger.filters)
    crossed(quiet_bitsandbytes(), quiet_bitsandbytes())
    assert (logger.level, logger.filters) == (level, filters)


def test_warning_filters_are_not_changed_by_two_threads() -> None:
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as threads:
        list(
            threads.map(lambda _: captum_labels(torch.tensor([5, 6]), tiny_tokenizer()), range(99))
        )
    assert warnings.filters == before


def test_the_random_generators_are_held_while_they_are_seeded() -> None:
    with seeded(1):
        assert is_held(random)
    assert not is_held(random)


def test_a_line_of_a_batch_runs_alone(tmp_path: Path) -> None:
    model, held = tiny_model("llama", fresh=True), []
    model.lm_head.register_forward_hook(
        lambda *_: held.append([is_held(thing) for thing in (model, warnings, random)])
    )
    lines = [{"prompt": PROMPT, "target": TARGET}]
    batch(model, tiny_tokenizer(), lines, tmp_path / "results.jsonl", show_progress=False)
    assert held
    assert all(all(things) for things in held)


def test_two_calls_run_uncompiled_in_whatever_order_they_end() -> None:
    import torch._dynamo.eval_frame as frames

    before = frames._stance
    crossed(compiled.uncompiled(), compiled.uncompiled())
    assert frames._stance == before


def test_wrappers_show_the_arguments_of_attribute() -> None:
    assert "layer_mode" in inspect.signature(LLMGradientAttribution.attribute).parameters
