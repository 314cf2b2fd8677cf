"""What `generate` is called with, and which of its ids are the target."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers
from captum.attr import FeatureAblation
from torch import Tensor

from captum_llm_ext import LLMAttribution, TextTokenInput, explain
from captum_llm_ext.compat import DEFAULT_GEN_ARGS
from captum_llm_ext.inputs.targets import generated_ids, generation_settings
from tests.models.encoder_decoder import tiny_seq2seq
from tests.models.families import PROMPT, CausalToy, MinimalTokenizer, tiny_model, tiny_tokenizer


def prompt_ids() -> Tensor:
    return tiny_tokenizer()(PROMPT, return_tensors="pt").input_ids


@pytest.fixture
def calls(monkeypatch: Any) -> list[dict[str, Any]]:
    """The arguments of each call of `generate`."""
    noted: list[dict[str, Any]] = []
    generate = transformers.GenerationMixin.generate

    def note(self: Any, *args: Any, **kwargs: Any) -> Any:
        noted.append(kwargs)
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(transformers.GenerationMixin, "generate", note)
    return noted


def test_generate_gets_the_tokenizer_s_pad_token(calls: list[dict[str, Any]]) -> None:
    explain(tiny_model("llama"), tiny_tokenizer(), PROMPT, method="ablation")
    assert calls[0]["pad_token_id"] == tiny_tokenizer().pad_token_id == 3


@pytest.mark.parametrize("method", ["saliency", "ablation", "attention"])
def test_the_end_of_sequence_pads_where_there_is_no_pad_token(
    calls: list[dict[str, Any]], method: str
) -> None:
    backend = tiny_tokenizer().backend_tokenizer
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    explain(tiny_model("llama"), tokenizer, PROMPT, method=method, gen_args={"max_new_tokens": 2})
    assert (calls[0]["pad_token_id"], calls[0]["max_new_tokens"]) == (2, 2)


def test_a_translation_is_padded_too(calls: list[dict[str, Any]]) -> None:
    explain(tiny_seq2seq("marian"), tiny_tokenizer(), PROMPT, method="ablation")
    assert calls[0]["pad_token_id"] == 3


@pytest.mark.parametrize(
    "gen_args",
    [
        {"pad_token_id": 5, "max_new_tokens": 2},
        {"generation_config": transformers.GenerationConfig(pad_token_id=5, max_new_tokens=2)},
    ],
)
def test_the_caller_s_pad_token_stays(gen_args: dict[str, Any]) -> None:
    model = tiny_model("llama")
    settings = generation_settings(gen_args, tiny_tokenizer(), model.generate)
    assert settings == gen_args


def test_neither_pad_nor_end() -> None:
    settings = generation_settings(None, MinimalTokenizer(), tiny_model("llama").generate)
    assert settings == DEFAULT_GEN_ARGS


class Writing(CausalToy):
    """A module whose own `generate` takes what Captum passes and nothing else."""

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        max_new_tokens: int,
        do_sample: bool = False,
        temperature: Any = None,
        top_p: Any = None,
    ) -> Tensor:
        return torch.cat([input_ids, input_ids[:, :2]], 1)


def test_a_generate_without_that_argument() -> None:
    tokenizer = tiny_tokenizer()
    model = Writing()
    inp = TextTokenInput(PROMPT, tokenizer)
    result = LLMAttribution(FeatureAblation(model), tokenizer).attribute(inp)
    assert len(result.output_tokens) == 2


# --- what is no setting of generate ---------------------------------------------------------------


def test_an_attention_mask_that_hides_nothing() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    mask = torch.ones_like(prompt_ids())
    options: dict[str, Any] = {"max_new_tokens": 2}
    expected = explain(model, tokenizer, PROMPT, method="ablation", gen_args=options)
    masked = {**options, "attention_mask": mask}
    result = explain(model, tokenizer, PROMPT, method="ablation", gen_args=masked)
    assert torch.equal(result.token_attr, expected.token_attr)


def test_an_attention_mask_that_hides_tokens() -> None:
    mask = torch.ones_like(prompt_ids())
    mask[0, 1] = 0
    with pytest.raises(ValueError, match="attention_mask in gen_args hides tokens"):
        explain(tiny_model("llama"), tiny_tokenizer(), PROMPT, gen_args={"attention_mask": mask})


@pytest.mark.parametrize("name", ["input_ids", "inputs", "inputs_embeds"])
def test_inputs_of_the_model(name: str) -> None:
    gen_args = {name: prompt_ids()}
    with pytest.raises(ValueError, match=re.escape(f"{name} is an input of the model")):
        explain(tiny_model("llama"), tiny_tokenizer(), PROMPT, gen_args=gen_args)


# --- several sequences: the first, without what fills it up ---------------------------------------


class Several:
    """A model that writes these rows after the prompt."""

    def __init__(self, *rows: list[int]) -> None:
        self.rows = torch.tensor(rows)

    def generate(self, input_ids: Tensor, **settings: Any) -> Tensor:
        return torch.cat([input_ids.expand(len(self.rows), -1), self.rows], 1)


@pytest.mark.parametrize(
    ("rows", "pad", "expected"),
    [
        ([[7, 2, 3, 3], [7, 8, 9, 2]], 3, [7, 2]),
        ([[7, 2, 2, 2], [7, 8, 9, 2]], 2, [7, 2]),
        ([[7, 8, 9, 2], [7, 2, 3, 3]], 3, [7, 8, 9, 2]),
        ([[7, 2, 3, 3]], 3, [7, 2, 3, 3]),  # written so: nothing was filled up
        ([[3, 3], [7, 2]], 3, [3]),
    ],
)
def test_the_first_of_several(rows: list[list[int]], pad: int, expected: list[int]) -> None:
    model: Any = Several(*rows)
    config = transformers.GenerationConfig(pad_token_id=pad)
    for named in ({"pad_token_id": pad}, {"generation_config": config}):
        gen_args = {"num_return_sequences": len(rows), **named}
        ids = generated_ids(model, prompt_ids(), gen_args, tiny_tokenizer())
        assert ids.tolist() == expected


def test_beams_of_different_lengths() -> None:
    gen_args = {
        "max_new_tokens": 8,
        "num_beams": 4,
        "num_return_sequences": 4,
        "length_penalty": -1.0,  # short ones first
        "eos_token_id": list(range(4, 60)),
    }
    model: Any = tiny_model("llama")
    rows = model.generate(prompt_ids(), **gen_args)[:, prompt_ids().size(1) :]
    ids = generated_ids(model, prompt_ids(), gen_args, tiny_tokenizer())
    assert rows[0].tolist() == [*ids.tolist(), 3, 3, 3]
