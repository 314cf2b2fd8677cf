"""Target tokens are labelled as Captum labels them, and never with nothing."""

from __future__ import annotations

from typing import Any

import captum.attr
import pytest
import torch
import transformers

from captum_llm_ext import explain
from captum_llm_ext.inputs.targets import output_tokens
from captum_llm_ext.metrics import faithfulness
from tests.models.families import PROMPT, tiny_model, tiny_tokenizer


def test_labels_are_the_tokens() -> None:
    ids = torch.tensor(tiny_tokenizer().encode(" golf with friends", add_special_tokens=False))
    assert output_tokens(ids, tiny_tokenizer()) == ["golf", "with", "friends"]


SPACES: dict[str, list[str]] = {
    " ": ["␣"],
    "  golf": ["␣", "golf"],
    "golf  ": ["go", "lf", "␣", "␣"],
    " \n": ["␣", "\\n"],
    "  😀": ["␣", "␣", "😀", "😀 [OVERLAP]", "😀 [OVERLAP]", "😀 [OVERLAP]"],
}


def captums(text: str) -> Any:
    """The result of Captum's perturbation wrapper."""
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    wrapper = captum.attr.LLMAttribution(captum.attr.FeatureAblation(model), tokenizer)
    inp = captum.attr.TextTokenInput(PROMPT, tokenizer)
    return wrapper.attribute(inp, target=text, forward_in_tokens=False, use_cached_outputs=False)


@pytest.mark.parametrize("text", SPACES)
def test_a_token_that_is_only_a_space_is_seen(text: str) -> None:
    result = explain(tiny_model("llama"), tiny_tokenizer(), PROMPT, text, "ablation")
    assert result.output_tokens == SPACES[text]
    blank = ["" if label == "␣" else label for label in SPACES[text]]
    assert captums(text).output_tokens == blank


@pytest.mark.parametrize("text", [" plays golf", "a\n\nb", "é日", " plays</s>"])
def test_all_others_are_captums(text: str) -> None:
    result = explain(tiny_model("llama"), tiny_tokenizer(), PROMPT, text, "ablation")
    assert result.output_tokens == captums(text).output_tokens


def test_a_space_of_sentencepiece() -> None:
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), ("▁golf", -2.0)]
    tokenizer = transformers.T5Tokenizer(vocab=vocab, extra_ids=0)
    ids = torch.tensor(tokenizer.convert_tokens_to_ids(["▁", "▁golf"]))
    assert output_tokens(ids, tokenizer) == ["␣", "golf"]


def test_faithfulness_takes_captums_result() -> None:
    result = captums("  golf")
    assert result.output_tokens == ["", "golf"]
    inp = captum.attr.TextTokenInput(PROMPT, tiny_tokenizer())
    judged = faithfulness(
        tiny_model("llama"), tiny_tokenizer(), result, "  golf", inp=inp, n_random=1
    )
    assert judged.deletion_area != 0
