"""Compiled models: the numbers and names of the same model before it was compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from captum_llm_ext import explain, find_layers
from captum_llm_ext.batches.lines import read_lines
from captum_llm_ext.batches.settings import batch_settings
from tests.models.families import PROMPT, TARGET, tiny_model, tiny_tokenizer

METHODS: list[tuple[str, dict[str, Any]]] = [
    ("saliency", {}),
    ("saliency", {"layers": "model.layers.1"}),
    ("ig", {"layers": ["model.layers.0.mlp", "model.layers.2"], "n_steps": 4, "baselines": "pad"}),
    ("ablation", {"baselines": "pad"}),
    ("attention", {}),
    ("attention", {"reduction": "rollout"}),
]


def compiled_model(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def compiled_in_place(model: Any) -> Any:
    model.compile(backend="eager")
    return model


def compiled_forward(model: Any) -> Any:
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def compiled_blocks(model: Any) -> Any:
    layers = model.model.layers
    for i, block in enumerate(layers):
        layers[i] = torch.compile(block, backend="eager")
    return model


def compiled_function(model: Any) -> Any:
    return CompiledInside(model)


class CompiledInside(nn.Module):
    """A wrapper that runs the model in a compiled function."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model: Any = model.model
        self.lm_head: Any = model.lm_head
        self.config = model.config
        self.run = torch.compile(self._run, backend="eager")

    def get_input_embeddings(self) -> nn.Module:
        embedding: nn.Module = self.model.embed_tokens
        return embedding

    def _run(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(self.model(ids, use_cache=False)[0])
        return logits

    def forward(self, ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.run(ids))


WAYS: list[Callable[[Any], Any]] = [
    compiled_model,
    compiled_in_place,
    compiled_forward,
    compiled_blocks,
    compiled_function,
]


@pytest.fixture(autouse=True)
def _forget_what_was_compiled() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def attributed(model: nn.Module, method: str, options: dict[str, Any]) -> Any:
    return explain(model, tiny_tokenizer(), PROMPT, TARGET, method, **options)


def test_saliency_of_a_block_of_a_compiled_model() -> None:
    options = {"layers": "model.layers.1"}
    expected = attributed(tiny_model("llama"), "saliency", options)
    model = torch.compile(tiny_model("llama", fresh=True), backend="eager")
    assert torch.equal(attributed(model, "saliency", options).seq_attr, expected.seq_attr)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_same_numbers_and_names(way: Callable[[Any], Any]) -> None:
    model = way(tiny_model("llama", fresh=True))
    ids = torch.tensor([[1, 5, 9, 8]])
    with torch.no_grad():
        before = model(ids).logits  # what was compiled before the call must not be run in it
    for method, options in METHODS:
        expected = attributed(tiny_model("llama"), method, options)
        result = attributed(model, method, options)
        torch.testing.assert_close(result.token_attr, expected.token_attr, atol=1e-6, rtol=1e-5)
        assert getattr(result, "layer_names", None) == getattr(expected, "layer_names", None)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("way", WAYS[:4], ids=lambda way: way.__name__)
def test_layers_keep_their_names(way: Callable[[Any], Any]) -> None:
    model = way(tiny_model("llama", fresh=True))
    assert list(find_layers(model, "mlp")) == list(find_layers(tiny_model("llama"), "mlp"))


def test_the_model_stays_compiled_after_the_call() -> None:
    model = compiled_model(tiny_model("llama", fresh=True))
    attributed(model, "saliency", {})
    runs: list[int] = []

    def backend(graph: Any, _: Any) -> Any:
        runs.append(1)
        return graph.forward

    compiled = torch.compile(tiny_model("llama", fresh=True), backend=backend)
    attributed(compiled, "saliency", {})
    assert not runs
    with torch.no_grad():
        compiled(torch.tensor([[1, 5, 9]]))
    assert runs


def test_a_compiled_model_without_the_right_head_is_refused() -> None:
    config = transformers.BertConfig(
        vocab_size=352, hidden_size=32, num_hidden_layers=1, num_attention_heads=4
    )
    model = transformers.BertForMaskedLM(config).eval()
    for wrapped in (compiled_model(model), nn.DataParallel(model)):
        with pytest.raises(ValueError, match="BertForMaskedLM is not causal"):
            explain(wrapped, tiny_tokenizer(), PROMPT, TARGET, "ablation")


def test_a_batch_goes_on_with_the_model_compiled() -> None:
    model: Any = tiny_model("llama", fresh=True)
    lines = [{"prompt": PROMPT, "target": TARGET}]
    settings = [
        batch_settings(m, tiny_tokenizer(), read_lines(lines), {"layers": m.model.layers[1]})
        for m in (model, compiled_model(model))
    ]
    assert settings[0] == settings[1]
