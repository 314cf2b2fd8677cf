"""What stands for an absent token: nothing (it is removed), or a token that may hide others."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from captum_llm_ext import (
    FeatureAblation,
    LayerIntegratedGradients,
    LLMAttribution,
    LLMGradientAttribution,
    TextTokenInput,
    explain,
    faithfulness,
    qa_input,
    segment_input,
)
from tests.models.families import CausalToy, tiny_model, tiny_tokenizer
from tests.models.question_answering import ANSWER, CONTEXT, QUESTION, qa_tokenizer, tiny_qa
from tests.oracles.cases import assert_close, target_ids

PROMPT = "Dave lives in Palm Coast"
LONG = "Rain is due. The Louvre is in Paris. Cats sleep a lot. Dogs bark at night. The museum is in"


def log_p(model: Any, ids: list[int], target: torch.Tensor) -> torch.Tensor:
    row = torch.cat([torch.tensor(ids), target])
    with torch.no_grad():
        logits = model(row[None]).logits[0].log_softmax(-1)
    return logits[len(ids) - 1 : -1].gather(1, target[:, None]).sum()


def test_removal_by_hand() -> None:
    """Each token's drop is the score of the whole prompt less that of the prompt without it."""
    model, tokenizer, target = tiny_model("llama"), tiny_tokenizer(), target_ids(2)
    ids = tokenizer.encode(PROMPT)
    result = LLMAttribution(FeatureAblation(model), tokenizer).attribute(
        TextTokenInput(PROMPT, tokenizer), target=target, baselines="remove"
    )
    whole = log_p(model, ids, target)
    expected = [whole - log_p(model, ids[:i] + ids[i + 1 :], target) for i in range(len(ids))]
    assert_close(result.seq_attr, torch.stack(expected))


def test_the_last_token_stays_where_nothing_would_be_left() -> None:
    tokenizer = tiny_tokenizer()
    inp = TextTokenInput("golf", tokenizer, skip_tokens=["<s>"])
    model = tiny_model("llama")
    result = LLMAttribution(FeatureAblation(model), tokenizer).attribute(
        inp, target=target_ids(1), baselines="remove"
    )
    assert result.seq_attr.isfinite().all()
    alone = TextTokenInput("Dave", tokenizer)
    alone.inp_tensor, alone.itp_tensor = alone.inp_tensor[:, -1:], alone.itp_tensor[:, -1:]
    alone.values, alone.n_itp_features = alone.values[-1:], 1
    with pytest.warns(UserWarning, match="is a single token, which stays .* is 0 whatever it does"):
        only = LLMAttribution(FeatureAblation(model), tokenizer).attribute(
            alone, target=target_ids(1), baselines="remove"
        )
    assert only.seq_attr.tolist() == [0.0]


def test_explain_removes_and_captums_input_keeps_its_default() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    wrapper = LLMAttribution(FeatureAblation(model), tokenizer)
    inp = TextTokenInput(PROMPT, tokenizer)
    removed = wrapper.attribute(inp, target=target_ids(2), baselines="remove")
    chosen = explain(model, tokenizer, PROMPT, target_ids(2), "ablation")
    assert_close(chosen.seq_attr, removed.seq_attr)
    by_id = explain(model, tokenizer, PROMPT, target_ids(2), "ablation", baselines=0)
    assert_close(by_id.seq_attr, wrapper.attribute(inp, target=target_ids(2)).seq_attr)
    assert not torch.allclose(by_id.seq_attr, removed.seq_attr)


def test_faithfulness_judges_by_removal_what_was_attributed_by_it() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    result = explain(model, tokenizer, PROMPT, target_ids(2), "ablation")
    judged = faithfulness(model, tokenizer, result, target_ids(2))
    named = faithfulness(model, tokenizer, result, target_ids(2), baselines="remove")
    assert torch.equal(judged.curves.deletion, named.curves.deletion)
    other = faithfulness(model, tokenizer, result, target_ids(2), baselines=0)
    assert not torch.equal(judged.curves.deletion, other.curves.deletion)


def test_what_cannot_remove_says_so() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    inp = TextTokenInput(PROMPT, tokenizer)
    method = LayerIntegratedGradients(model, model.model.embed_tokens)
    with pytest.raises(ValueError, match="only perturbation of token inputs"):
        LLMGradientAttribution(method, tokenizer).attribute(inp, " golf", baselines="remove")
    wrapper = LLMAttribution(FeatureAblation(model), tokenizer)
    with pytest.raises(ValueError, match="an empty one removes its value"):
        wrapper.attribute(segment_input(PROMPT, by="word"), " golf", baselines="remove")
    answers, pairs = tiny_qa("bert"), qa_tokenizer("bert")
    question = qa_input(QUESTION, CONTEXT, pairs)
    with pytest.raises(ValueError, match="moves the answer's positions"):
        LLMAttribution(FeatureAblation(answers), pairs).attribute(
            question, ANSWER, baselines="remove"
        )


@pytest.mark.real_model
@pytest.mark.parametrize(
    ("prompt", "target"),
    [
        ("In the winter the lake is covered with", " ice"),
        ("My sister is a nurse, and every morning she goes to the", " hospital"),
    ],
)
def test_a_separator_hides_short_prompts_too(demo_model: Any, prompt: str, target: str) -> None:
    model, tokenizer = demo_model
    wrapper = LLMAttribution(FeatureAblation(model), tokenizer)
    inp = TextTokenInput(prompt, tokenizer)
    with pytest.warns(UserWarning, match="hides what stands before"):
        wrapper.attribute(inp, target)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapper.attribute(inp, target, baselines="pad")


@pytest.mark.real_model
def test_a_separator_that_hides_the_prompt_is_warned_of(demo_model: Any) -> None:
    """Id 0 of the demo model ends a document; its pad token does not."""
    model, tokenizer = demo_model
    wrapper = LLMAttribution(FeatureAblation(model), tokenizer)
    inp = TextTokenInput(LONG, tokenizer)
    target = " Paris"
    with pytest.warns(UserWarning, match=r"'<\|endoftext\|>' \(id 0\) hides what stands before"):
        wrapper.attribute(inp, target)
    wrapped = LLMAttribution(FeatureAblation(nn.DataParallel(model).eval()), tokenizer)
    with pytest.warns(UserWarning, match="hides what stands before"):
        wrapped.attribute(inp, target)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for sound in ("pad", "remove"):
            wrapper.attribute(inp, target, baselines=sound)


@pytest.mark.parametrize("name", ["llama", "gpt2", "toy"])
def test_no_false_alarm(name: str) -> None:
    model = CausalToy() if name == "toy" else tiny_model(name)
    inp = TextTokenInput(LONG[:60], tiny_tokenizer())
    assert inp.n_itp_features > 16
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapper = LLMAttribution(FeatureAblation(model), tiny_tokenizer())
        result = wrapper.attribute(inp, target=target_ids(2))
    assert result.seq_attr.isfinite().all()
