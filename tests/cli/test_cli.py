"""The command line, run in this process on a tiny saved model."""

from __future__ import annotations

import logging
import shlex
import sys
import warnings
from typing import Any

import pytest

from captum_llm_ext import __version__, cli, explain
from captum_llm_ext.cli import entry, many, one
from captum_llm_ext.model.loading import load_model
from tests.models.families import TARGET, tiny_model, tiny_tokenizer
from tests.printed import assert_printed_alike

# Outside pytest these are not shown; here each would add a line to the checked output.
pytestmark = pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")

PROMPT = "Palm Coast"
PNG = b"\x89PNG"
EXPLAIN = "captum_llm_ext.explaining.explain"
LOAD_DEMO_MODEL = "captum_llm_ext.model.loading.load_demo_model"
# Design figures of the L1 saliency of each prompt token.
SALIENCY = """\
5 input tokens -> 1 output token, saliency

          sequence  Paris
The           80.8   80.8
 capital      61.4   61.4
 of           17.6   17.6
 France       26.4   26.4
 is           10.7   10.7
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(path)
    tokenizer = tiny_tokenizer()
    template = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
    tokenizer.save_pretrained(path)
    (path / "chat_template.jinja").write_text(template)
    return path


@pytest.fixture
def run(folder, capsys):
    """Run the command line on the tiny model: (exit code, standard output, standard error)."""

    def command(*arguments: str, prompt: str = PROMPT):
        try:
            code: Any = cli.main([prompt, "--model", str(folder), *arguments])
        except SystemExit as stop:
            code = stop.code
        return (code, *capsys.readouterr())

    return command


def examples(command) -> list[str]:
    """The lines of a command's examples that are commands."""
    lines = command.EXAMPLES.splitlines()
    return [line.strip() for line in lines if line.startswith("  ")]


def one_line(text: str) -> bool:
    return text.count("\n") == 1 and text.endswith("\n") and "Traceback" not in text


def test_one_command_prints_the_table_of_explain(run, folder):
    code, out, err = run("--target", TARGET, "--no-color")
    expected = explain(*load_model(folder), PROMPT, TARGET)
    assert (code, out, err) == (0, expected.to_text(color=False) + "\n", "")


def test_another_method_has_another_table(run, folder):
    _, out, _ = run("--target", TARGET, "--method", "gradxact", "--no-color")
    expected = explain(*load_model(folder), PROMPT, TARGET, "gradxact")
    assert out == expected.to_text(color=False) + "\n"


def test_a_method_without_a_convergence_delta(run):
    code, out, _ = run("--target", TARGET, "--method", "gradshap", "--no-color")
    assert code == 0
    assert "convergence delta" not in out


def test_steps_reach_integrated_gradients(run, folder):
    _, out, _ = run("--target", TARGET, "--method", "ig", "--steps", "7", "--no-color")
    model, tokenizer = load_model(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected, other = (
            explain(model, tokenizer, PROMPT, TARGET, "ig", n_steps=steps).to_text(color=False)
            for steps in (7, 3)
        )
    assert out == expected + "\n"
    assert out != other + "\n"


def test_warnings_are_one_line_each(run):
    _, _, err = run("--target", TARGET, "--method", "ig", "--steps", "1")
    assert err.startswith("captum-llm-ext: warning: integrated gradients have not converged")
    assert one_line(err)


def test_generated_target(run):
    _, out, _ = run("--max-new-tokens", "1", "--no-color")
    assert "-> 1 output token, flow\n" in out


def test_chat(run, folder):
    code, out, _ = run("--chat", "--target", TARGET, "--no-color")
    model, tokenizer = load_model(folder)
    messages = [{"role": "user", "content": PROMPT}]
    assert (code, out) == (
        0,
        explain(model, tokenizer, messages, TARGET).to_text(color=False) + "\n",
    )


def test_sequence_only(run, tmp_path):
    picture = tmp_path / "sequence.png"
    code, out, _ = run("--target", TARGET, "--sequence-only", "--out", str(picture))
    assert code == 0
    assert "sequence" in out
    assert "golf" not in out
    assert picture.read_bytes().startswith(PNG)


def test_layers_are_summarised(run, folder, tmp_path):
    picture = tmp_path / "layers.png"
    code, out, err = run(
        "--target", TARGET, "--layers", "q_proj", "model.layers.*.mlp", "--out", str(picture)
    )
    assert code == 0
    summary = out[out.index("layer ") :].splitlines()[1:]
    rows = dict(line.split("  ", 1) for line in summary)
    assert set(rows) == {
        f"{block} {kind}"
        for block in range(len(tiny_model("llama").model.layers))
        for kind in ("q_proj", "mlp")
    }
    model, tokenizer = load_model(folder)
    attribution = explain(model, tokenizer, PROMPT, TARGET, layers="model.layers.1.mlp")
    strongest = attribution.input_tokens[attribution.seq_attr.argmax()].lstrip("Ġ")
    share = 100 * attribution.seq_attr.max() / attribution.seq_attr.sum()
    assert rows["1 mlp"].strip().startswith(f"{strongest} {share:.0f} %")
    assert picture.read_bytes().startswith(PNG)
    assert str(picture) in err


def test_a_layer_that_does_not_see_the_prompt(run):
    _, out, _ = run("--target", TARGET, "--layers", "rotary_emb", "model.norm")
    (line,) = [line for line in out.splitlines() if line.startswith("rotary_emb")]
    assert "none: the layer does not see the prompt" in line


def test_picture_of_the_tokens(run, tmp_path):
    picture = tmp_path / "tokens.PNG"
    assert run("--target", TARGET, "--out", str(picture))[0] == 0
    assert picture.read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", ""], "target"),
        (["--layers", "q_projection"], "q_proj"),
        (["--layers", "q_proj", "nothing.*"], "nothing.*"),
        (["--method", "nonsense"], "choose from"),
        (["--method", "ig", "--steps", "0"], "at least 1, got '0'"),
        (["--method", "ig", "--steps", "many"], "at least 1, got 'many'"),
        (["--steps", "3"], "saliency does not take n_steps; it takes attribute_to_layer_input, "),
        (["--target", TARGET, "--max-new-tokens", "3"], "gen_args is only for a generated target"),
        (["--out", "picture.gif"], "ends in .png, .pdf, .svg, .html, .json, .csv, .npz, .txt"),
        (["--out", "picture"], "ends in .png"),
        (["--out", "no/such/folder/picture.png"], "no folder 'no/such/folder'"),
        (["--model", "./no-such-folder"], "no such folder"),
        (["--what"], "--what"),
        (["--target", TARGET * 40], "64"),
    ],
)
def test_errors_are_one_line(run, arguments, message):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("captum-llm-ext: error: ")
    assert message in err
    assert one_line(err)


def test_empty_prompt(run):
    code, _, err = run("--target", TARGET, prompt="")
    assert code == 2
    assert one_line(err)


def test_a_file_that_cannot_be_written(run, tmp_path):
    (tmp_path / "folder.png").mkdir()
    code, _, err = run("--target", TARGET, "--out", str(tmp_path / "folder.png"))
    assert code == 2
    assert one_line(err)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (RuntimeError("out of\nmemory"), 1, "RuntimeError: out of memory"),
        (MemoryError(), 1, "MemoryError"),
    ],
)
def test_interruptions_and_unexpected_errors(run, monkeypatch, error, code, message):
    def stop(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(EXPLAIN, stop)
    result, _, err = run("--target", TARGET)
    assert result == code
    assert message in err
    assert one_line(err)


def test_verbose_shows_the_traceback_and_the_log(run, monkeypatch):
    def stop(*_: object, **__: object) -> None:
        logging.getLogger("captum_llm_ext.gradients.wrapper").info("about to fail")
        raise ValueError("that is why")

    monkeypatch.setattr(EXPLAIN, stop)
    code, _, err = run("--verbose")
    assert code == 2
    assert "captum-llm-ext: about to fail\n" in err
    assert "Traceback" in err
    assert err.endswith("captum-llm-ext: error: that is why\n")
    assert "about to fail" not in run()[2]


def test_logging_and_warnings_are_left_as_they_were(run):
    package = logging.getLogger("captum_llm_ext")
    before = (package.level, list(package.handlers), warnings.showwarning)
    run("--target", TARGET, "--verbose")
    assert (package.level, list(package.handlers), warnings.showwarning) == before


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_only_on_a_terminal(run, monkeypatch, terminal):
    keywords = {}

    def stop(*_: object, **options: object) -> None:
        keywords.update(options)
        raise ValueError

    monkeypatch.setattr(EXPLAIN, stop)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    run()
    assert keywords["show_progress"] is terminal


def test_demo_model_is_the_default(monkeypatch, capsys):
    monkeypatch.setattr(LOAD_DEMO_MODEL, lambda: (tiny_model("llama"), tiny_tokenizer()))
    assert cli.main([PROMPT, "--target", TARGET, "--no-color"]) == 0
    expected = explain(tiny_model("llama"), tiny_tokenizer(), PROMPT, TARGET)
    assert capsys.readouterr().out == expected.to_text(color=False) + "\n"


def test_help_has_examples_that_parse(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    assert one.EXAMPLES.strip() in capsys.readouterr().out


@pytest.mark.parametrize("line", [*examples(one), *examples(many)])
def test_every_example_parses(line):
    program, *arguments = shlex.split(line.replace("accelerate launch --multi_gpu", "-m"))
    if program == "-m":
        arguments = arguments[arguments.index("captum_llm_ext") + 1 :]
    command = entry.COMMANDS.get(arguments[0])
    if command is None:
        assert one.build_parser().parse_args(arguments).prompt == arguments[0]
    elif arguments[0] == "batch":
        assert command.build_parser().parse_args(arguments[1:]).prompts.endswith(".jsonl")
    else:
        command.build_parser().parse_args(arguments[1:])


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"captum-llm-ext {__version__}\n"


@pytest.mark.real_model
def test_demo_model_from_the_command_line(demo_model, monkeypatch, capsys):
    monkeypatch.setattr(LOAD_DEMO_MODEL, lambda: demo_model)
    arguments = ["--method", "saliency", "--max-new-tokens", "1", "--no-color"]
    assert cli.main(["The capital of France is", *arguments]) == 0
    assert_printed_alike(capsys.readouterr().out, SALIENCY)


def test_perturbation_method(run):
    code, out, _ = run("--target", TARGET, "--method", "shapley_sampling", "--samples", "2")
    assert code == 0
    assert "input tokens" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "ablation", "--sequence-only"), "does not take include_per_token_attr"),
        (("--method", "ig", "--samples", "3"), "does not take n_samples"),
        (("--method", "ig", "--samples", "3"), "quadrature"),
        (("--method", "attention", "--n-steps", "3"), "does not take n_steps"),
        (("--method", "attention", "--attr-target", "logit"), "does not take attr_target"),
        (("--method", "ablation", "--heads", "1"), "does not take heads"),
        (("--method", "ig", "--norm", "l2"), "does not take norm"),
        (("--adaptive",), "quadrature belongs to 'ig' and"),
        (("--baseline", "pad"), "baselines mean nothing to LayerSaliency"),
        (("--values", "x"), "the template leaves out value 0"),
        (("--values", "x", "--chat"), "exclude each other"),
        (("--chat", "--context", "x"), "a context belongs to a prompt that is a question"),
        (("--by", "message"), "(of a chat: message too)"),
        (
            ("--plot", "layer", "--out", "x.png"),
            "--plot layer: only for a result of several",
        ),
    ],
)
def test_options_without_meaning_are_refused(run, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run("--target", TARGET, *arguments)
    assert code == 2
    assert message in err
    assert one_line(err)


def test_adaptive_and_baseline(run):
    code, out, err = run("--target", TARGET, "--method", "ig", "--adaptive", "--baseline", "pad")
    assert (code, err) == (0, "")
    assert "input tokens" in out
