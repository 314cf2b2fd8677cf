"""Dropout that is active is warned of, wherever a model has it; a model without it is not."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from captum_llm_ext import explain
from captum_llm_ext.metrics import faithfulness
from captum_llm_ext.scoring.checks import warn_of_dropout
from captum_llm_ext.scoring.target_scores import Target
from captum_llm_ext.scoring.teacher_forcing import TeacherForcing
from tests.models.encoder_decoder import CONFIGS, fresh_seq2seq
from tests.models.families import tiny_model, tiny_tokenizer
from tests.oracles.cases import target_ids

METHODS = ("saliency", "ablation", "attention")


def _falcon(rate: float) -> nn.Module:
    model: Any = tiny_model("falcon", fresh=True)
    model.config.hidden_dropout = rate
    return model


def _bart(**rates: float) -> nn.Module:
    kind, settings = CONFIGS["bart"]
    config = getattr(transformers, kind)(**settings, **rates)
    return transformers.AutoModelForSeq2SeqLM.from_config(config)


DROPPING: dict[str, Callable[[], nn.Module]] = {
    "module": lambda: tiny_model("gpt2", fresh=True),
    "function": lambda: tiny_model("opt", fresh=True),
    "function, by the configuration": lambda: _falcon(0.1),
    "of attention alone": lambda: _bart(dropout=0.0, attention_dropout=0.3),
    "bart": lambda: fresh_seq2seq("bart"),
    "marian": lambda: fresh_seq2seq("marian"),
    "t5": lambda: fresh_seq2seq("t5"),
}
# BART draws a number for every layer that it may skip, also where it skips none.
STEADY: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: tiny_model("llama", fresh=True),
    "falcon": lambda: _falcon(0.0),
    "bart": lambda: _bart(dropout=0.0, attention_dropout=0.0, activation_dropout=0.0),
}


def explained(model: nn.Module, method: str) -> Any:
    return explain(model, tiny_tokenizer(), "Dave lives", target_ids(2), method)


def warned(run: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(one.message) for one in caught if "dropout" in str(one.message)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", DROPPING)
def test_dropout_is_warned_of(name: str, method: str) -> None:
    model = DROPPING[name]().train()
    assert len(warned(lambda: explained(model, method))) == 1
    assert not warned(lambda: explained(model.eval(), method))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", STEADY)
def test_a_model_in_training_without_dropout(name: str, method: str) -> None:
    model = STEADY[name]()
    expected = explained(model.eval(), method).seq_attr
    found: list[torch.Tensor] = []
    assert not warned(lambda: found.append(explained(model.train(), method).seq_attr))
    torch.testing.assert_close(found[0], expected)


def test_one_part_in_training_is_enough() -> None:
    model: Any = tiny_model("opt", fresh=True)
    model.model.decoder.layers[2].train()
    assert len(warned(lambda: explained(model, "saliency"))) == 1


def test_faithfulness_warns_too() -> None:
    model, target = tiny_model("opt", fresh=True), target_ids(2)
    result = explained(model, "ablation")
    model.train()
    assert warned(lambda: faithfulness(model, tiny_tokenizer(), result, target, n_random=1))


def test_random_draws_go_on_as_if_nothing_had_been_asked() -> None:
    ids = torch.tensor([tiny_tokenizer().encode("Dave lives")])
    for model in (tiny_model("gpt2", fresh=True).train(), tiny_model("opt", fresh=True).train()):
        torch.manual_seed(5)
        expected = torch.rand(3)
        torch.manual_seed(5)
        with pytest.warns(UserWarning, match="dropout"):
            warn_of_dropout(TeacherForcing(model, ids, Target(target_ids(2))))
        assert torch.equal(torch.rand(3), expected)
