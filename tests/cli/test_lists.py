"""`methods` and `layers` list what there is; a misspelt name is met with the one that was meant."""

from __future__ import annotations

from typing import Any

import pytest

from captum_llm_ext import LLMAttentionAttribution, explain
from captum_llm_ext.cli import layers, main
from captum_llm_ext.inputs.chats import _rendered
from captum_llm_ext.registry import CHOICES, METHODS, did_you_mean
from tests.models.families import tiny_model, tiny_tokenizer


def test_methods_lists_every_method_and_every_choice(capsys: Any) -> None:
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[: len(METHODS)]] == list(METHODS)
    assert len(lines) == len(METHODS) + 1 + len(CHOICES)


def test_layers_lists_names_that_select_layers(capsys: Any, monkeypatch: Any) -> None:
    model = tiny_model("llama")
    monkeypatch.setattr(layers, "load", lambda _: (model, tiny_tokenizer()))
    assert main(["layers", "path/to/model"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    counts = {row[0]: int(row[1]) for row in rows}
    n_blocks = len(model.model.layers)
    assert counts["q_proj"] == counts["mlp"] == counts["model.layers.*"] == n_blocks
    assert counts["embed_tokens"] == 1


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["The", "--methud", "ig"], "--method"),
        (["The", "--method", "ablatoin"], "ablation"),
        (["The", "--reduction", "rolout"], "rollout"),
    ],
)
def test_a_misspelt_flag_or_value_is_met_with_what_was_meant(
    arguments: list[str], meant: str, capsys: Any
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert f"did you mean '{meant}'?" in capsys.readouterr().err


def test_python_says_what_was_meant_too() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    with pytest.raises(ValueError, match="did you mean 'saliency'"):
        explain(model, tokenizer, "the cat", method="salency")
    with pytest.raises(ValueError, match="did you mean 'rollout'"):
        LLMAttentionAttribution(model, tokenizer, reduction="roll_out")
    with pytest.raises(ValueError, match="did you mean 'user'"):
        _rendered([{"role": "user", "content": "a"}], tokenizer, ["usr"])
    assert did_you_mean("zzz", METHODS) == ""
