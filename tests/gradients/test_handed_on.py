"""Blocks that hand on more than their output are not replayed, however little it changes."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from captum.attr import LayerIntegratedGradients
from torch import Tensor, nn

from captum_llm_ext import LayerSaliency, LLMGradientAttribution
from captum_llm_ext.gradients.path import LayerPath
from captum_llm_ext.model.layers import decoder_blocks
from tests.models.families import VOCAB_SIZE, _randomise, tiny_tokenizer
from tests.models.shared_states import SHARING, sharing_model
from tests.oracles.attention import family_model
from tests.oracles.cases import assert_close, prompt_input, target_ids

STEPS = 3


def attribute(method: Any, n_target: int = 2, /, **options: Any) -> Any:
    wrapper = LLMGradientAttribution(method, tiny_tokenizer())
    return wrapper.attribute(prompt_input(), target_ids(n_target), **options)


def path(model: nn.Module, layer: str) -> Any:
    method = LayerIntegratedGradients(model, layer)
    return attribute(method, n_steps=STEPS, method="riemann_trapezoid", baselines="pad")


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many blocks each path replays in the end."""
    counts, before = list[int](), LayerPath.__post_init__

    def note(self: LayerPath) -> None:
        before(self)
        counts.append(self.replayed)

    monkeypatch.setattr(LayerPath, "__post_init__", note)
    return counts


def without_replay(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> Any:
    with monkeypatch.context() as patch:
        patch.setattr("captum_llm_ext.gradients.trace.Trace.replayable", lambda *_: 0)
        return run()


def test_gemma_4_shares_keys_and_values(
    monkeypatch: pytest.MonkeyPatch, replayed: list[int]
) -> None:
    model = sharing_model("gemma4")
    result = path(model, "model.layers.1")
    assert replayed == [0]
    expected = without_replay(monkeypatch, lambda: path(model, "model.layers.1"))
    assert_close(result.token_attr, expected.token_attr)


@pytest.mark.filterwarnings("ignore:.*have not converged")
@pytest.mark.parametrize("family", SHARING)
@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("n_target", [1, 2])
def test_every_block_of_a_model_that_shares(family: str, index: int, n_target: int) -> None:
    model = sharing_model(family)
    layer = f"model.layers.{index}.mlp"
    for method in (LayerSaliency, LayerIntegratedGradients):
        options = {"n_steps": STEPS} if method is LayerIntegratedGradients else {}
        result = attribute(method(model, layer), n_target, **options)
        assert result.seq_attr.isfinite().all()
        assert result.seq_attr.abs().sum() > 0


class Sharing(nn.Module):
    """Four blocks of a running mean, some of which use more than the state before them.

    weight: of what is shared: small enough that scores at the path's ends do not show it.
    """

    def __init__(self, how: str, weight: float = 1e-4) -> None:
        super().__init__()
        self.how, self.weight = how, weight
        self.embedding = nn.Embedding(VOCAB_SIZE, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(16, VOCAB_SIZE)
        _randomise(self)

    def forward(self, ids: Tensor) -> SimpleNamespace:
        hidden, store = self.embedding(ids), dict[str, Tensor]()
        outputs = [hidden]
        for i, block in enumerate(self.blocks):
            if self.how == "output" and i == 3:
                hidden = hidden + self.weight * outputs[1]
            extra = store if self.how == "dict" else None
            hidden = block(hidden, extra, i, self.weight)
            outputs.append(hidden)
        if self.how == "score":
            hidden = hidden + self.weight * outputs[1]
        return SimpleNamespace(logits=self.head(hidden))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(
        self, hidden: Tensor, store: dict[str, Tensor] | None, index: int, weight: float
    ) -> Tensor:
        counts = torch.arange(1, hidden.size(1) + 1)[:, None]
        inner = torch.tanh(self.layer(hidden.cumsum(1) / counts))
        if store is not None and index == 0:
            store["inner"] = inner
        if store is not None and index == 3 and "inner" in store:  # else silently without it
            inner = inner + weight * store["inner"]
        return hidden + inner


@pytest.mark.parametrize(
    ("how", "expected"),
    [("nothing", [1, 2, 3, 4]), ("dict", [0, 0, 0, 4]), ("output", [1, 1, 1, 4]),
     ("score", [1, 1, 1, 1])],
)  # fmt: skip
def test_the_graph_says_what_may_be_replayed(
    how: str, expected: list[int], replayed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Sharing(how)
    results = [path(model, f"blocks.{i}") for i in range(4)]
    assert replayed == expected
    plain = without_replay(monkeypatch, lambda: [path(model, f"blocks.{i}") for i in range(4)])
    for result, without in zip(results, plain, strict=True):
        assert_close(result.token_attr, without.token_attr)


@pytest.mark.parametrize(
    "family", ["llama", "gemma3", "gpt2", "falcon", "opt", "mixtral", "jamba", "qwen3_next"]
)
def test_other_models_are_replayed(family: str, replayed: list[int]) -> None:
    model = family_model(family)
    names = {module: name for name, module in model.named_modules()}
    path(model, names[decoder_blocks(model)[2]])
    assert replayed == [3]
