"""Target tokens are labelled as Captum labels them, and never with nothing."""

from __future__ import annotations

from typing import Any

import captum.attr
import pytest
import torch
import transformers

from captum_llm_ext import explain
from captum_llm_ext.compat import _convert_ids_to_pretty_tokens
from captum_llm_ext.inputs.targets import output_labels, output_tokens
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


CUT = "東京は日本 golf 😀"


@pytest.mark.parametrize("n_tokens", range(1, len(tiny_tokenizer().encode(CUT))))
def test_a_character_that_is_cut_off_leaves_the_other_labels(n_tokens: int) -> None:
    tokenizer = tiny_tokenizer()
    ids = torch.tensor(tokenizer.encode(CUT, add_special_tokens=False)[:n_tokens])
    n_whole = max(
        n for n in range(n_tokens + 1) if CUT.startswith(tokenizer.decode(ids[:n].tolist()))
    )
    rest = tokenizer.convert_ids_to_tokens(ids[n_whole:].tolist())
    try:
        labels = list(_convert_ids_to_pretty_tokens(ids, tokenizer))
    except Exception:
        whole = _convert_ids_to_pretty_tokens(ids[:n_whole], tokenizer) if n_whole else []
        labels = whole + rest
    assert output_tokens(ids, tokenizer) == [label if label.strip() else "␣" for label in labels]
    shown = output_labels(ids[None, :0], ids, tokenizer)
    assert shown[n_whole:] == rest
    text = "".join(shown[:n_whole]).replace("⋯", "").replace("␣", " ")
    assert text == tokenizer.decode(ids[:n_whole].tolist())


def test_characters_cut_off_at_both_ends_and_inside() -> None:
    tokenizer = tiny_tokenizer()
    cut = tokenizer.encode("東", add_special_tokens=False)
    golf = tokenizer.encode(" golf", add_special_tokens=False)
    assert len(cut) == 3
    ids = torch.tensor([cut[2], *golf, *cut[:2], *golf, *cut, cut[0]])
    first, second, third = list(tokenizer.convert_ids_to_tokens(cut))
    assert output_labels(ids[None, :0], ids, tokenizer) == [
        third,
        " golf",
        first,
        second,
        " golf",
        "東",
        "⋯",
        "⋯",
        first,
    ]


def test_tables_and_plots_show_a_character_once() -> None:
    result = explain(tiny_model("llama"), tiny_tokenizer(), PROMPT, " 東!", "ablation")
    assert result.output_labels == ["␣", "東", "⋯", "⋯", "!"]
    assert "OVERLAP" not in result.to_text(color=False)


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
