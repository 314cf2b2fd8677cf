"""The task is that of the model: loading, explain and the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from captum_llm_ext import cli, explain, load_model
from captum_llm_ext.registry import ATTENTION, METHODS
from tests.models.encoder_decoder import tiny_seq2seq
from tests.models.families import PROMPT, tiny_model, tiny_tokenizer
from tests.models.question_answering import (
    ANSWER,
    CONTEXT,
    QUESTION,
    encoded,
    qa_tokenizer,
    tiny_qa,
)

# Few steps and samples are enough to see that a method runs.
pytestmark = pytest.mark.filterwarnings("ignore")

MODELS: dict[str, Any] = {
    "causal": lambda: (tiny_model("llama"), tiny_tokenizer()),
    "t5": lambda: (tiny_seq2seq("t5"), tiny_tokenizer()),
    "bart": lambda: (tiny_seq2seq("bart"), tiny_tokenizer()),
    "marian": lambda: (tiny_seq2seq("marian"), tiny_tokenizer()),
    "bert": lambda: (tiny_qa("bert"), qa_tokenizer("bert")),
    "roberta": lambda: (tiny_qa("roberta"), qa_tokenizer("roberta")),
}
TASKS = {"causal": "causal", "t5": "seq2seq", "bart": "seq2seq", "marian": "seq2seq"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name, make in MODELS.items():
        found[name] = tmp_path_factory.mktemp(name)
        for part in make():
            part.save_pretrained(found[name])
    return found


def outputs(name: str, model: Any) -> torch.Tensor:
    with torch.no_grad():
        if name in ("bert", "roberta"):
            return model(encoded(name)["input_ids"]).start_logits
        ids = tiny_tokenizer()(PROMPT, return_tensors="pt").input_ids
        more = {} if name == "causal" else {"decoder_input_ids": ids}
        return model(ids, **more).logits


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_the_right_class_is_loaded(folders: Any, name: str, given: bool) -> None:
    model, _ = load_model(folders[name], task=TASKS.get(name, "qa") if given else None)
    own = MODELS[name]()[0]
    assert type(model) is type(own)
    assert not model.training
    torch.testing.assert_close(outputs(name, model), outputs(name, own))


@pytest.mark.parametrize(
    ("name", "task"),
    [("causal", "qa"), ("causal", "seq2seq"), ("t5", "causal"), ("bert", "seq2seq")],
)
def test_another_task_than_the_models(folders: Any, name: str, task: str) -> None:
    """Its head would have random weights: scores of nothing."""
    with pytest.raises(ValueError, match=f"whose task is .*; got task='{task}'"):
        load_model(folders[name], task=task)


def test_unknown_task(folders: Any) -> None:
    with pytest.raises(ValueError, match="expected task to be None, 'causal', 'seq2seq', 'qa'"):
        load_model(folders["t5"], task="translation")


def test_options_of_loading_reach_every_kind(folders: Any) -> None:
    for name in ("t5", "bert"):
        model, tokenizer = load_model(folders[name], dtype="float64")
        assert {p.dtype for p in model.parameters()} == {torch.float64}
        assert tokenizer.pad_token == "<pad>"


GRADIENTS_AND_PERTURBATION = [name for name, m in METHODS.items() if m.wrapper != ATTENTION]


@pytest.mark.parametrize("method", GRADIENTS_AND_PERTURBATION)
def test_explain_a_translation(method: str) -> None:
    model, tokenizer = MODELS["t5"]()
    sampling = method in ("lime", "kernelshap", "shapley_sampling")
    how: dict[str, Any] = {"n_samples": 10} if sampling else {}
    result = explain(model, tokenizer, "Dave lives", " plays golf", method, **how)
    assert result.seq_attr.shape == (len(tokenizer("Dave lives").input_ids),)
    assert len(result.output_tokens) == 3
    assert method == "lime" or result.seq_attr.abs().max() > 0  # its surrogate is sparse


@pytest.mark.parametrize("method", ["saliency", "ig", "gradxact", "gradshap", "ablation"])
@pytest.mark.parametrize("answer", [ANSWER, None])
def test_explain_an_answer(method: str, answer: str | None) -> None:
    model, tokenizer = MODELS["bert"]()
    result = explain(model, tokenizer, QUESTION, answer, method, context=CONTEXT)
    assert [name.split(":")[0] for name in result.output_tokens] == ["start", "end"]
    assert result.token_attr is not None
    assert result.token_attr.abs().max() > 0


def test_plots_and_tables() -> None:
    for name, target, context in (("bart", " golf", None), ("roberta", ANSWER, CONTEXT)):
        model, tokenizer = MODELS[name]()
        result = explain(model, tokenizer, QUESTION, target, context=context)
        assert result.to_text(color=False)
        assert result.plot_token_attr(show=False) is not None


def test_a_context_for_a_model_that_needs_none() -> None:
    model, tokenizer = MODELS["causal"]()
    with pytest.raises(ValueError, match="question answering models"):
        explain(model, tokenizer, PROMPT, " golf", context=CONTEXT)


@pytest.mark.parametrize("context", [None, "  "])
def test_a_question_without_a_context(context: str | None) -> None:
    model, tokenizer = MODELS["bert"]()
    with pytest.raises(ValueError, match="context"):
        explain(model, tokenizer, QUESTION, ANSWER, context=context)


def test_models_that_are_of_no_task() -> None:
    settings = tiny_seq2seq("t5").config
    questions = transformers.T5ForQuestionAnswering(settings).eval()
    with pytest.raises(ValueError, match="one stack"):
        explain(questions, qa_tokenizer("bert"), QUESTION, ANSWER, "ablation", context=CONTEXT)
    classes = transformers.BertForSequenceClassification(tiny_qa("bert").config).eval()
    for method in ("saliency", "ablation"):
        with pytest.raises(ValueError, match=r"\(rows, length, vocabulary\)"):
            explain(classes, tiny_tokenizer(), PROMPT, " golf", method)


# --- the command line ----------------------------------------------------------------------------


def test_command_line_translates(folders: Any, capsys: Any) -> None:
    arguments = ["--model", str(folders["marian"]), "--target", " golf", "--no-color"]
    assert cli.main([PROMPT, *arguments]) == 0
    model, tokenizer = MODELS["marian"]()
    expected = explain(model, tokenizer, PROMPT, " golf").to_text(color=False)
    assert capsys.readouterr().out == expected + "\n"
    assert cli.main([PROMPT, *arguments, "--task", "seq2seq"]) == 0
    assert capsys.readouterr().out == expected + "\n"


def test_command_line_answers(folders: Any, capsys: Any, tmp_path: Path) -> None:
    arguments = ["--model", str(folders["bert"]), "--context", CONTEXT, "--no-color"]
    picture = tmp_path / "answer.png"
    assert cli.main([QUESTION, *arguments, "--target", ANSWER, "--out", str(picture)]) == 0
    model, tokenizer = MODELS["bert"]()
    expected = explain(model, tokenizer, QUESTION, ANSWER, context=CONTEXT)
    assert capsys.readouterr().out == expected.to_text(color=False) + "\n"
    assert picture.stat().st_size > 1000


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("bert", [], "context"),
        ("bert", ["--context", CONTEXT, "--target", "Tokyo"], "not in the context"),
        ("bert", ["--context", CONTEXT, "--max-new-tokens", "3"], "not generated"),
        ("t5", ["--context", CONTEXT], "question answering models"),
        ("t5", ["--task", "qa"], "whose task is 'seq2seq'"),
    ],
)
def test_command_line_errors(
    folders: Any, capsys: Any, name: str, arguments: list[str], message: str
) -> None:
    assert cli.main([QUESTION, "--model", str(folders[name]), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_demo_model_has_its_task(capsys: Any) -> None:
    assert cli.main([QUESTION, "--task", "qa"]) == 2
    assert "the demo model is causal" in capsys.readouterr().err
