"""Every option of the command line does what the keyword of that name does in Python."""

from __future__ import annotations

import inspect
import json
import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from captum_llm_ext import (
    LLMAttentionAttribution,
    LLMAttribution,
    LLMAttributionResult,
    LLMGradientAttribution,
    TextTemplateInput,
    chat_input,
    cli,
    explain,
    load_model,
    segment_input,
)
from captum_llm_ext.cli import one, options, outputs
from captum_llm_ext.explaining import make_wrapper
from captum_llm_ext.inputs.chats import CHAT_FEATURES
from captum_llm_ext.model.random_state import seeded
from captum_llm_ext.registry import GRADIENT, METHODS, Method
from tests.models.families import TARGET, tiny_model, tiny_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore::PendingDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*have not converged"),
]

PROMPT = "Dave lives in Palm Coast"
TEMPLATE = "{} lives in {}"
TEXT = "It rains. Stay in.\n\nDave plays golf."
CHAT = [{"role": "user", "content": TEXT}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    template = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
    (path / "chat_template.jinja").write_text(template)
    return path


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(folder)


@pytest.fixture
def stored(folder, tmp_path, capsys):
    """The result that the command line writes as JSON."""

    def run(prompt: str, *arguments: str) -> LLMAttributionResult:
        path = tmp_path / "result.json"
        command = [prompt, *arguments, "--model", str(folder), "--out", str(path)]
        assert cli.main(command) == 0, capsys.readouterr().err
        return LLMAttributionResult.from_json(path)

    return run


def python(loaded: Any, prompt: Any, *args: Any, **kwargs: Any) -> Any:
    with seeded(3), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, tokenizer = loaded
        return explain(model, tokenizer, prompt, *args, **kwargs)


def same(result: Any, expected: Any) -> bool:
    return LLMAttributionResult.from_json(expected.to_json()) == result


def test_one_option(stored, loaded):
    result = stored(PROMPT, "--target", TARGET, "--norm", "l2")
    assert same(result, python(loaded, PROMPT, TARGET, norm="l2"))


@pytest.mark.parametrize("method", METHODS)
def test_every_method(stored, loaded, method):
    short = "Palm Coast"  # Shapley values take every permutation of its tokens
    result = stored(short, "--target", TARGET, "--method", method, "--seed", "3")
    assert same(result, python(loaded, short, TARGET, method))


@pytest.mark.parametrize(
    ("arguments", "keywords"),
    [
        ("--method ig --n-steps 4 --baselines pad", {"n_steps": 4, "baselines": "pad"}),
        ("--method ig --n-steps 4 --baselines pad 7", {"n_steps": 4, "baselines": ["pad", 7]}),
        (
            "--method ig --n-steps 4 --quadrature riemann_left",
            {"n_steps": 4, "quadrature": "riemann_left"},
        ),
        (
            "--method ig --quadrature adaptive --tol 0.3 --max-rows 30",
            {"quadrature": "adaptive", "tol": 0.3, "max_rows": 30},
        ),
        ("--method ig --n-steps 4 --no-forward-mode", {"n_steps": 4, "forward_mode": False}),
        (
            "--method ig --n-steps 4 --layer-mode joint --layers model.layers.*.mlp",
            {"n_steps": 4, "layer_mode": "joint", "layers": "model.layers.*.mlp"},
        ),
        (
            "--method gradshap --n-samples 3 --stdevs 0.1 --num-trials 2",
            {"n_samples": 3, "stdevs": 0.1, "num_trials": 2},
        ),
        ("--method saliency --norm l2 --layers q_proj", {"norm": "l2", "layers": "q_proj"}),
        ("--method saliency --attr-target logit", {"attr_target": "logit"}),
        ("--method relevance --rules attnlrp", {"rules": "attnlrp"}),
        ("--method saliency --include-generated", {"include_generated": True}),
        ("--method saliency --no-include-per-token-attr", {"include_per_token_attr": False}),
        ("--method saliency --include-hidden-attr", {"include_hidden_attr": True}),
        ("--method saliency --no-reuse-prefix", {"reuse_prefix": False}),
        ("--method saliency --autocast bfloat16", {"dtype": torch.bfloat16}),
        (
            "--method gradxact --layers model.layers.1.mlp --attribute-to-layer-input",
            {"layers": "model.layers.1.mlp", "attribute_to_layer_input": True},
        ),
        ("--method gradxact --contrast-target golf", {"contrast_target": "g"}),
        ("--method ablation --attr-target rank", {"attr_target": "rank"}),
        ("--method ablation --baselines pad --internal-batch-size 2", {"baselines": "pad"}),
        ("--method shapley_sampling --n-samples 2", {"n_samples": 2}),
        (
            "--method attention --heads 0 2 --reduction max --layers model.layers.[12].self_attn",
            {"heads": [0, 2], "reduction": "max", "layers": "model.layers.[12].self_attn"},
        ),
        ("--method attention --include-prompt-attention", {"include_prompt_attention": True}),
    ],
)
def test_every_option(stored, loaded, arguments, keywords):
    arguments = arguments.replace("--contrast-target golf", "--contrast-target g").split()
    result = stored(PROMPT, "--target", TARGET, "--seed", "3", *arguments)
    assert same(result, python(loaded, PROMPT, TARGET, arguments[1], **keywords))


def test_no_keyword_is_forgotten():
    """Every keyword of `attribute`, and every option of a method, is an argument, except these."""
    elsewhere = {
        "inp": "prompt",
        "dtype": "autocast",
        "method": "quadrature",
        "max_rows": "the former name of max_evaluations",
        "show_progress": "on a terminal",
        "return_convergence_delta": "always there",
        "grad_kwargs": "of torch.autograd.grad",
        "skip_tokens": "the target is written without them",
        "feature_mask": "a tensor; --values and --by make features",
        "return_input_shape": "the shape of tensors",
        "use_cached_outputs": "without effect",
        "forward_in_tokens": "without effect",
        "perturbations_per_eval": "without effect",
        "_inspect_forward": "a function",
        "check": "a new process remembers no checks",
        "method_options": "",
        "kwargs": "",
        "self": "",
    }
    wrappers = (LLMGradientAttribution, LLMAttribution, LLMAttentionAttribution)
    keywords = {name for kind in wrappers for name in inspect.signature(kind.attribute).parameters}
    for method, row in METHODS.items():
        wrapper, _ = make_wrapper(tiny_model("llama"), tiny_tokenizer(), method, None, {})
        keywords |= {*wrapper.method_options(), *row.settings, *row.wrapped_by.settings}
    arguments = {action.dest for action in one.build_parser()._actions}
    assert keywords - elsewhere.keys() <= arguments
    assert set(inspect.signature(load_model).parameters) - {"name_or_path"} == set(
        options.LOAD_OPTIONS
    )
    assert set(options.LOAD_OPTIONS) <= arguments


def test_a_new_row_brings_its_settings(monkeypatch, capsys):
    """Those that the registry gives no choices take numbers, lists and texts."""
    row = Method("", GRADIENT, "a method to come", settings=("norm", "sharpness"))
    monkeypatch.setitem(METHODS, "new", row)
    command = "x --method new --norm l2 --sharpness 0.5"
    keywords = options.explain_keywords(vars(one.build_parser().parse_args(command.split())))
    assert {name: keywords[name] for name in ("method", "norm", "sharpness")} == {
        "method": "new",
        "norm": "l2",
        "sharpness": 0.5,
    }
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "new: a method to come" in text
    assert "--sharpness SHARPNESS setting of new" in text


def test_generation_options(stored, loaded):
    sampled = ["--gen-args", "do_sample=true", "temperature=0.7", "--max-new-tokens", "3"]
    gen_args = {"do_sample": True, "temperature": 0.7, "max_new_tokens": 3}
    result = stored(PROMPT, *sampled, "--seed", "3")
    assert same(result, python(loaded, PROMPT, gen_args=gen_args))


@pytest.mark.parametrize("by", [feature for feature in CHAT_FEATURES if feature != "message"])
def test_parts_of_a_text(stored, loaded, by):
    prompt = TEXT if by == "token" else segment_input(TEXT, by)
    result = stored(TEXT, "--by", by, "--target", TARGET)
    assert same(result, python(loaded, prompt, TARGET))


@pytest.mark.parametrize("by", CHAT_FEATURES)
def test_parts_of_a_chat(stored, loaded, by):
    result = stored(TEXT, "--chat", "--by", by, "--target", TARGET, "--method", "ablation")
    prompt = chat_input(CHAT, loaded[1], by)
    assert same(result, python(loaded, prompt, TARGET, "ablation"))


@pytest.mark.parametrize("baselines", [None, ["He", "a town"]])
@pytest.mark.parametrize("names", [None, ["who", "where"]])
def test_values_of_a_template(stored, loaded, names, baselines):
    values = ["Dave", "Palm Coast"]
    template = TEMPLATE if names is None else "{who} lives in {where}"

    def typed(texts: list[str]) -> list[str]:
        return texts if names is None else [f"{n}={t}" for n, t in zip(names, texts, strict=True)]

    def meant(texts: list[str]) -> Any:
        return texts if names is None else dict(zip(names, texts, strict=True))

    more = ["--baselines", *typed(baselines)] if baselines else []
    arguments = ["--values", *typed(values), *more, "--target", TARGET, "--method", "ablation"]
    prompt = TextTemplateInput(template, meant(values), meant(baselines) if baselines else None)
    assert same(
        stored(template, *arguments),
        python(loaded, prompt, TARGET, "ablation"),
    )


def test_dtype_and_device(stored, folder):
    arguments = ("--target", TARGET, "--dtype", "bfloat16", "--device-map", "cpu")
    low = load_model(folder, dtype="bfloat16")
    assert same(stored(PROMPT, *arguments), python(low, PROMPT, TARGET))


def test_quantization(stored, folder):
    pytest.importorskip("bitsandbytes")
    arguments = ("--target", TARGET, "--quantization", "int8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = stored(PROMPT, *arguments)
        quantized = load_model(folder, "int8")
    torch.testing.assert_close(
        result.seq_attr, python(quantized, PROMPT, TARGET).seq_attr, rtol=1e-4, atol=1e-4
    )


def test_the_demo_model_takes_no_load_options(capsys):
    assert cli.main([PROMPT, "--dtype", "float32"]) == 2
    assert "--dtype: only for a model that --model names" in capsys.readouterr().err


STARTS = {
    ".png": b"\x89PNG",
    ".pdf": b"%PDF",
    ".svg": b"<?xml",
    ".html": b"<!DOCTYPE html>",
    ".json": b'{"schema"',
    ".csv": b"input_token,sequence",
    ".npz": b"PK",
    ".txt": b"5 input tokens",
}


def test_every_output(folder, loaded, tmp_path, capsys):
    paths = [tmp_path / f"result{ending}" for ending in outputs.OUTPUTS]
    command = [PROMPT, "--target", TARGET, "--model", str(folder), "--merge", "word"]
    assert cli.main([*command, "--out", *map(str, paths)]) == 0
    err = capsys.readouterr().err
    assert set(STARTS) == set(outputs.OUTPUTS)
    for path in paths:
        assert str(path) in err
        start = STARTS[path.suffix]
        assert path.suffix == ".txt" or path.read_bytes()[: len(start)].lower() == start.lower()
    expected = python(loaded, PROMPT, TARGET).merge("word")
    table = pd.read_csv(tmp_path / "result.csv", index_col=0, dtype={"sequence": np.float32})
    assert np.array_equal(table["sequence"].to_numpy(), expected.seq_attr.numpy())
    with np.load(tmp_path / "result.npz") as arrays:
        assert np.array_equal(arrays["token_attr"], expected.token_attr.numpy())
    assert (tmp_path / "result.txt").read_text() == expected.to_text(color=False) + "\n"


def test_long_table(folder, tmp_path):
    path = tmp_path / "long.csv"
    command = [PROMPT, "--target", TARGET, "--model", str(folder)]
    assert cli.main([*command, "--long", "--out", str(path)]) == 0
    table = pd.read_csv(path)
    assert list(table)[:2] == ["output_position", "output_token"]


@pytest.mark.parametrize("plot", outputs.PLOTS)
def test_every_plot(folder, tmp_path, monkeypatch, plot):
    drawn, draw = [], outputs.PLOTS[plot]

    def spy(result: Any) -> Any:
        drawn.append(plot)
        return draw(result)

    monkeypatch.setitem(outputs.PLOTS, plot, spy)
    path = tmp_path / "plot.png"
    command = [PROMPT, "--target", TARGET, "--model", str(folder), "--layers", "q_proj", "mlp"]
    command += ["--method", "ig", "--n-steps", "4", "--layer-mode", "joint"]  # one path for both
    assert cli.main([*command, "--plot", plot, "--out", str(path)]) == 0
    assert drawn == [plot]
    assert path.stat().st_size > 1000


def values(record: dict[str, Any]) -> dict[str, Any]:
    """A result as JSON, without where it comes from: a record keeps no seconds."""
    return {name: value for name, value in record.items() if name != "provenance"}


def test_batch_from_the_command_line(folder, loaded, tmp_path, capsys):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "results.jsonl"
    lines = [{"prompt": PROMPT, "id": "a"}, {"messages": CHAT, "target": " golf"}, {"prompt": ""}]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    command = ["batch", str(prompts), "--out", str(out), "--model", str(folder)]
    assert cli.main([*command, "--by", "word", "--target", TARGET, "--method", "ablation"]) == 0
    assert capsys.readouterr().err == f"captum-llm-ext: wrote {out}: 2 results, 1 errors\n"
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["id"] for record in records] == ["a", None, None]
    expected = [
        python(loaded, segment_input(PROMPT, "word"), TARGET, "ablation"),
        python(loaded, chat_input(CHAT, loaded[1], "word"), " golf", "ablation"),
    ]
    assert [values(record["result"]) for record in records[:2]] == [
        values(json.loads(result.to_json())) for result in expected
    ]
    assert records[2]["error"]["type"] == "ValueError"


def test_a_batch_without_any_result_fails(folder, tmp_path, capsys):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "results.jsonl"
    prompts.write_text('{"prompt": ""}\nnot json')
    assert cli.main(["batch", str(prompts), "--out", str(out), "--model", str(folder)]) == 2
    assert "no prompt has a result" in capsys.readouterr().err
    assert len(out.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-file.jsonl", "--out", "x.jsonl"], "no-such-file.jsonl"),
        (["prompts.jsonl", "--out", "x.csv"], "ends in .jsonl or .parquet"),
        (["prompts.jsonl"], "--out"),
        (["prompts.jsonl", "--out", "x.jsonl", "--n-steps", "3"], "does not take n_steps"),
        (["prompts.jsonl", "--out", "x.jsonl", "--layers", "nothing"], "nothing"),
        (["empty.jsonl", "--out", "x.jsonl"], "at least one prompt"),
    ],
)
def test_errors_of_batch_are_one_line(folder, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Palm Coast"}')
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(SystemExit) as stop:
        raise SystemExit(cli.main(["batch", *arguments, "--model", str(folder)]))
    err = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in err
    assert err.count("\n") == 1
