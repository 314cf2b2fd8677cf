"""What changes the cost alone: batches, the cached prefix, what is remembered."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_llm_ext.perturbations.masked_prompts import MaskedPrompts
from captum_llm_ext.scoring.tasks import Request
from tests.models.families import CORPUS, FAMILIES, tiny_model, tiny_tokenizer
from tests.oracles.cases import assert_close, pairwise, target_ids
from tests.perturbations.cases import (
    INPUTS,
    OTHERS,
    TEMPLATE,
    VALUES,
    captums,
    ours,
    rows,
    template_input,
    token_input,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

# About 40 tokens, where the windows of Mistral, Gemma2 and Gemma3 are 4.
EXAMPLES = ["France: Paris. ", "Japan: Tokyo. ", "Coast: Palm golf. ", "Dave: hiking. "]
LONG: dict[str, Any] = {
    "tokens": lambda: token_input(f"{CORPUS[1]} {CORPUS[0][:30]}", baselines=11),
    "first words": lambda: template_input(
        "{} {} of {} is {} and " + CORPUS[2], ["The", "capital", "Japan", "Tokyo"]
    ),
    "last words": lambda: template_input(
        CORPUS[2] + " {} {} in {} and {}", list(VALUES), list(OTHERS)
    ),
    "examples": lambda: template_input("Palm: Coast. {}{}{}{}France:", list(EXAMPLES)),
    "one word for many": lambda: template_input(
        "{} is {} with {} and {}",
        ["Dave", CORPUS[2][:60], "golf", "he"],
        ["he", "in", "a", CORPUS[0][:30]],
    ),
}
SETTINGS = {
    "perturbations_per_eval": (1, 3, 100),
    "internal_batch_size": (1, 2, None),
    "reuse_prefix": (True, False),
    "use_cached_outputs": (True, False),
    "forward_in_tokens": (True, False),
}
GRID = list(
    pairwise(
        {
            "kind": list(LONG),
            "method": ("feature_ablation", "shapley_sampling", "kernel_shap"),
            **SETTINGS,
        }
    )
)


@cache
def reference(family: str, kind: str, method: str) -> Tensor:
    return rows(captums(method, tiny_model(family), LONG[kind](), target=target_ids(4)))


def test_ablation_costs_a_row_for_each_feature() -> None:
    """The probe has two rows in a first call, the whole prompt one."""
    assert work_of("feature_ablation", token_input("Dave lives")).rows == 2 + 1 + 4


def test_the_prompts_are_long() -> None:
    for kind, make in LONG.items():
        inp = make()
        model = tiny_model("llama")
        with counted(model) as seen:
            captums("feature_ablation", model, inp, target=target_ids(1))
        assert 25 < seen.widest <= 60, kind


@pytest.mark.parametrize("row", GRID, ids=lambda row: "-".join(map(str, row)))
@pytest.mark.parametrize("family", FAMILIES)
def test_settings_change_no_number(family: str, row: tuple[Any, ...]) -> None:
    kind, method, *values = row
    settings = dict(zip(SETTINGS, values, strict=True))
    result = ours(method, tiny_model(family), LONG[kind](), target=target_ids(4), **settings)
    expected = reference(family, kind, method)
    if (family, kind) == ("mistral", "first words"):
        # out of sight: four layers with windows of 4 look back over 12 tokens
        assert max(rows(result).abs().max(), expected.abs().max()) < 1e-4
    else:
        assert_close(rows(result), expected, 3e-5)


# --- how much work is done -----------------------------------------------------------------------


class Work:
    """What came to the embeddings and to the output head."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, int]] = []
        self.head: list[tuple[int, int]] = []

    @property
    def rows(self) -> int:
        return sum(count for count, _ in self.shapes)

    @property
    def most_rows(self) -> int:
        return max(count for count, _ in self.shapes)

    @property
    def tokens(self) -> int:
        return sum(count * length for count, length in self.shapes)

    @property
    def widest(self) -> int:
        return max(length for _, length in self.shapes)


@contextmanager
def counted(model: nn.Module) -> Iterator[Work]:
    work = Work()

    def embedded(_: nn.Module, __: Any, output: Tensor) -> None:
        work.shapes.append((output.shape[0], output.shape[1]))

    def read_out(_: nn.Module, __: Any, output: Tensor) -> None:
        work.head.append((output.shape[0], output.shape[1]))

    handles = [
        model.get_input_embeddings().register_forward_hook(embedded),
        model.get_output_embeddings().register_forward_hook(read_out),
    ]
    try:
        yield work
    finally:
        for handle in handles:
            handle.remove()


def work_of(method: str, inp: Any, family: str = "llama", **kwargs: Any) -> Work:
    model = tiny_model(family)
    with counted(model) as work:
        ours(method, model, inp, target=target_ids(3), **kwargs)
    return work


@pytest.mark.parametrize("perturbations_per_eval", [1, 3, 100])
def test_scores_of_masks_are_remembered(perturbations_per_eval: int) -> None:
    """25 orders of 4 features ask for 100 evaluations and more; there are 16 masks."""
    given = {"n_samples": 25, "perturbations_per_eval": perturbations_per_eval}
    work = work_of("shapley_sampling", INPUTS["template_list"](), **given)
    assert work.rows <= 2**4 + 6  # the shared prefix and the look at causality


def test_scores_of_masks_are_remembered_for_kernel_shap() -> None:
    given = {"n_samples": 60}
    assert work_of("kernel_shap", INPUTS["template_list"](), **given).rows <= 2**4 + 6


def test_draws_of_one_trial_are_remembered_too() -> None:
    drawn = template_input(TEMPLATE, list(VALUES), lambda: list(OTHERS))
    work = work_of("shapley_sampling", drawn, n_samples=25, num_trials=2)
    assert work.rows <= 2 * (2**4 + 6)


def test_one_row_per_perturbation_whatever_the_target() -> None:
    """Captum's default walks once over the prompt for each target token."""
    inp = LONG["tokens"]()
    work = work_of("feature_ablation", inp)
    hiding = 10  # the look whether the baseline hides what stands before it
    assert work.rows <= inp.n_itp_features + 1 + 6 + hiding


def test_perturbations_share_passes() -> None:
    inp = LONG["tokens"]()
    work = work_of("feature_ablation", inp, reuse_prefix=False)
    assert len(work.shapes) <= 4 + inp.n_itp_features // 4


@pytest.mark.parametrize("kind", ["tokens", "examples"])
def test_logits_at_the_target_alone(kind: str) -> None:
    work = work_of("feature_ablation", LONG[kind]())
    assert sum(count * length for count, length in work.head) <= 3 * (work.rows + 2)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gpt_neox"])
def test_prefix_is_not_computed_again(family: str) -> None:
    """All features are in the last third of the prompt."""
    alone = work_of("shapley_sampling", LONG["last words"](), family, reuse_prefix=False)
    shared = work_of("shapley_sampling", LONG["last words"](), family, reuse_prefix=True)
    assert shared.tokens < 0.6 * alone.tokens


@pytest.mark.parametrize("internal_batch_size", [2, 3, 5])
@pytest.mark.parametrize("reuse_prefix", [True, False])
@pytest.mark.parametrize("kind", ["tokens", "examples"])
def test_rows_of_a_pass_are_limited(
    kind: str, reuse_prefix: bool, internal_batch_size: int
) -> None:
    work = work_of(
        "feature_ablation",
        LONG[kind](),
        perturbations_per_eval=100,
        internal_batch_size=internal_batch_size,
        reuse_prefix=reuse_prefix,
    )
    assert 1 < work.most_rows <= internal_batch_size


# --- running out of memory -----------------------------------------------------------------------


class SmallMemory:
    """A forward that has room for so many rows."""

    def __init__(self, model: nn.Module, room: int, error: Exception) -> None:
        self.inner, self.room, self.error = model.forward, room, error
        self.refused = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        ids = args[0] if args else kwargs["input_ids"]
        if len(ids) > self.room:
            self.refused += 1
            raise self.error
        return self.inner(*args, **kwargs)


ERRORS = {
    "gpu": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:119] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 68719476736 bytes. Error code 12 (Cannot allocate memory)"
    ),
}


@pytest.mark.parametrize("reuse_prefix", [True, False])
@pytest.mark.parametrize("kind", ["tokens", "examples"])
@pytest.mark.parametrize("error", ERRORS)
def test_batch_is_halved_where_memory_ends(
    error: str, kind: str, reuse_prefix: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", fresh=True)
    small = SmallMemory(model, 2, ERRORS[error])
    monkeypatch.setattr(model, "forward", small)
    result = ours(
        "feature_ablation",
        model,
        LONG[kind](),
        target=target_ids(4),
        perturbations_per_eval=100,
        reuse_prefix=reuse_prefix,
    )
    assert_close(rows(result), reference("llama", kind, "feature_ablation"), 3e-5)
    # learned from, not tried again with every batch
    assert 1 <= small.refused <= 8


@pytest.mark.parametrize("error", ERRORS)
def test_no_room_for_one_row_is_the_users_to_know(
    error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", fresh=True)
    monkeypatch.setattr(model, "forward", SmallMemory(model, 0, ERRORS[error]))
    with pytest.raises(RuntimeError, match="memory"):
        ours("feature_ablation", model, INPUTS["template_list"](), target=target_ids(2))


def test_other_errors_are_not_taken_for_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", fresh=True)
    small = SmallMemory(model, 0, RuntimeError("a fault of the model's own"))
    monkeypatch.setattr(model, "forward", small)
    with pytest.raises(RuntimeError, match="a fault of the model's own"):
        ours("feature_ablation", model, INPUTS["template_list"](), target=target_ids(2))


# --- progress ------------------------------------------------------------------------------------


def test_progress_is_shown_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    given = {"target": target_ids(2), "perturbations_per_eval": 1}
    ours("shapley_sampling", tiny_model("llama"), INPUTS["token"](), **given)
    silent = capsys.readouterr()
    ours("shapley_sampling", tiny_model("llama"), INPUTS["token"](), show_progress=True, **given)
    shown = capsys.readouterr()
    assert silent.out == silent.err == ""
    assert "%" in shown.err


def test_prompts_scored_one_by_one_cost_no_more_the_more_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The key of a prompt is read off its ids once."""
    inp = template_input(" ".join(["{}"] * 8), CORPUS[0].split()[:8])
    request = Request(target_ids(1))
    prompts = MaskedPrompts.of(tiny_model("llama"), tiny_tokenizer(), inp, request)
    read, tolist = [], Tensor.tolist

    def counting(tensor: Tensor) -> Any:
        read.append(tensor.dtype)
        return tolist(tensor)

    monkeypatch.setattr(Tensor, "tolist", counting)
    scores = []
    with torch.no_grad():
        for number in range(1, 65):
            mask = torch.tensor([[number >> bit & 1 for bit in range(8)]])
            scores.append(prompts.scores(mask.float()))
    assert read.count(torch.int64) <= 2 * 64
    assert len({float(one[0, 0]) for one in scores}) > 32
