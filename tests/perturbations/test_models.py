"""Models that cannot batch, have no cache, or are not causal: the same numbers all the same."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import captum.attr
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor, nn

from tests.models.families import (
    BidirectionalToy,
    CausalToy,
    MinimalTokenizer,
    _model,
    tiny_model,
)
from tests.oracles.cases import assert_close, target_ids
from tests.perturbations.cases import (
    ENTRIES,
    IgnoresMask,
    OneRowOnly,
    SeesPicture,
    WithoutCache,
    ablation,
    filled_template,
    game,
    ours,
    replaced_tokens,
    rows,
    shapley,
    template_input,
    truth,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@contextmanager
def said(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """What was said by warning or log."""
    messages: list[str] = []
    caplog.clear()
    with (
        caplog.at_level(logging.DEBUG, "captum_llm_ext"),
        warnings.catch_warnings(record=True) as w,
    ):
        warnings.simplefilter("always")
        yield messages
        messages += [str(one.message) for one in w]
    messages += [record.getMessage() for record in caplog.records]


def other_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    makers: dict[str, Any] = {
        "ids only": CausalToy,
        "not causal": BidirectionalToy,
        "one row": OneRowOnly,
        "mask ignored": IgnoresMask,
        "no cache": lambda: WithoutCache(tiny_model("llama")),
        "no cache, absolute positions": lambda: WithoutCache(tiny_model("gpt2")),
    }
    return makers[name]()


OTHER_MODELS = [
    "ids only",
    "not causal",
    "one row",
    "mask ignored",
    "no cache",
    "no cache, absolute positions",
]


def test_a_model_that_takes_one_row() -> None:
    model, (make, count) = OneRowOnly(), ENTRIES["token"]
    expected = ablation(truth("token", model, target_ids(2)), count)
    assert_close(rows(ours("feature_ablation", model, make(), target=target_ids(2))), expected)


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("feature_ablation", "token"),
        ("feature_ablation", "template"),
        ("shapley", "emptied template"),
    ],
)
@pytest.mark.parametrize("n_output", [1, 3])
@pytest.mark.parametrize("name", OTHER_MODELS)
def test_other_models(name: str, n_output: int, kind: str, method: str) -> None:
    """Of one target token too: what fills up shorter prompts is seen by a model that looks on."""
    make, count = ENTRIES[kind]
    model, target = other_model(name), target_ids(n_output)
    formula = {"feature_ablation": ablation, "shapley": shapley}[method]
    expected = formula(truth(kind, model, target), count)
    for per_eval in (1, 100):
        result = ours(method, model, make(), target=target, perturbations_per_eval=per_eval)
        assert_close(rows(result), expected)


@pytest.mark.parametrize("toy", [CausalToy, BidirectionalToy])
def test_minimal_tokenizer(toy: type[CausalToy]) -> None:
    tokenizer = MinimalTokenizer()
    model = toy(len(tokenizer.words))
    target = torch.tensor(tokenizer.encode("plays golf, hiking"))
    ids = tokenizer.encode("Dave lives in Palm")
    inp = captum.attr.TextTokenInput("Dave lives in Palm", tokenizer)
    given = {"target": "plays golf, hiking", "tokenizer": tokenizer}
    expected = ablation(game(model, replaced_tokens(ids, 0), target), 4)
    result = ours("feature_ablation", model, inp, **given)
    assert_close(rows(result), expected)
    assert len(result.output_tokens) == 3

    values, absent = ["Dave", "Palm Coast"], ["capital", "France"]
    inp = template_input("{} lives in {} and", list(values), list(absent))
    prompt_of = filled_template("{} lives in {} and", values, absent, tokenizer)
    expected = ablation(game(model, prompt_of, target), 2)
    assert_close(rows(ours("feature_ablation", model, inp, **given)), expected)


@pytest.mark.parametrize(("name", "word"), [("not causal", "causal"), ("one row", "row|batch")])
def test_falling_back_is_said_once(name: str, word: str, caplog: pytest.LogCaptureFixture) -> None:
    model = other_model(name)
    with said(caplog) as messages:
        ours("shapley_sampling", model, ENTRIES["emptied template"][0](), target=target_ids(3))
    assert len([m for m in messages if re.search(word, m, re.IGNORECASE)]) == 1


def test_models_of_the_family_say_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with said(caplog) as messages:
        for make, _ in ENTRIES.values():
            ours("feature_ablation", tiny_model("llama"), make(), target=target_ids(3))
    assert [m for m in messages if "causal" in m or "cache" in m or "batch" in m] == []


@pytest.mark.parametrize("reuse_prefix", [True, False])
@pytest.mark.parametrize("kind", ENTRIES)
@pytest.mark.parametrize("name", ["bloom", "mamba", "switched off", "eager", "recurrent"])
def test_models_with_another_kind_of_memory(name: str, kind: str, reuse_prefix: bool) -> None:
    """ALiBi positions, a state instead of keys and values, a cache that its owner switched off."""
    common = {"vocab_size": 352, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 3}
    if name == "bloom":
        model = _model("Bloom", vocab_size=352, hidden_size=32, n_layer=2, n_head=4)
    elif name == "mamba":
        model = _model("Mamba", **common, state_size=4)
    elif name == "recurrent":
        model = _model(
            "RecurrentGemma",
            **{**common, "num_hidden_layers": 3},
            num_attention_heads=4,
            intermediate_size=48,
            lru_width=32,
            attention_window_size=4,
        )
    else:
        model = tiny_model("llama", fresh=True)
        if name == "switched off":
            model.config.use_cache = False
        else:
            model.set_attn_implementation("eager")
    make, count = ENTRIES[kind]
    target = target_ids(3)
    expected = ablation(truth(kind, model, target), count)
    result = ours("feature_ablation", model, make(), target=target, reuse_prefix=reuse_prefix)
    assert_close(rows(result), expected)


def test_half_precision_is_close_to_the_truth() -> None:
    target = target_ids(3)
    expected = ablation(truth("emptied template", tiny_model("llama"), target), 4)
    model = tiny_model("llama", fresh=True).to(torch.bfloat16)
    result = ours("feature_ablation", model, ENTRIES["emptied template"][0](), target=target)
    both = torch.stack([rows(result).float().flatten(), expected.flatten()])
    assert torch.corrcoef(both)[0, 1] > 0.95


class FourDimensional(CausalToy):
    """Logits (rows, 1, length, vocabulary), as Llama 4 returns them."""

    def forward(self, ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=super().forward(ids).logits[:, None])


def test_logits_of_four_dimensions() -> None:
    target, plain, model = target_ids(3), CausalToy(), FourDimensional()
    model.load_state_dict(plain.state_dict())
    expected = ablation(truth("emptied template", plain, target), 4)
    make = ENTRIES["emptied template"][0]
    assert_close(rows(ours("feature_ablation", model, make(), target=target)), expected)


# --- pictures ------------------------------------------------------------------------------------

GROUPS = [0, 0, 1, 2, 2]


@pytest.mark.parametrize("perturbations_per_eval", [1, 100])
@pytest.mark.parametrize("method", ["feature_ablation", "shapley"])
def test_picture_reaches_the_model_row_by_row(method: str, perturbations_per_eval: int) -> None:
    model, target = SeesPicture(), target_ids(2)
    columns = np.array([[40, 80, 120, 160, 200]] * 2, dtype=np.uint8)
    prompt = torch.tensor([[1, 17, 30]])

    def pixels(image: Any) -> Tensor:
        return torch.tensor(np.array(image)[0, :, 0].astype(np.float32))[None] / 255

    def processor(image: Any) -> Any:
        fields = {
            "input_ids": prompt,
            "attention_mask": torch.ones_like(prompt),
            "pixel_values": pixels(image),
        }
        return transformers.BatchFeature(fields)

    groups = torch.tensor([GROUPS] * 2)
    inp = captum.attr.ImageMaskInput(
        Image.fromarray(np.stack([columns] * 3, axis=-1)), groups, processor_fn=processor
    )

    def value(present: frozenset[int]) -> Tensor:
        shown = [c if g in present else 255 for c, g in zip(columns[0], GROUPS, strict=True)]
        seen = torch.tensor(np.array(shown, dtype=np.float32))[None] / 255
        found = []
        with torch.no_grad():
            for t in range(len(target)):
                ids = torch.cat([prompt[0], target[:t]])[None]
                logits = model(ids, pixel_values=seen).logits[0, -1]
                found.append(logits.double().log_softmax(-1)[target[t]])
        return torch.stack([torch.stack(found).sum(), *found])

    expected = {"feature_ablation": ablation, "shapley": shapley}[method](value, 3)
    result = ours(method, model, inp, target=target, perturbations_per_eval=perturbations_per_eval)
    assert_close(rows(result), expected)
