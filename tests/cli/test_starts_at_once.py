"""Help, the version and errors of arguments come without torch; the names in them are right."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Collection

import pytest

from captum_llm_ext._version import __version__
from captum_llm_ext.attention.maps import REDUCTIONS
from captum_llm_ext.compat import FIXED_RULES
from captum_llm_ext.gradients.integrated_gradients import ADAPTIVE
from captum_llm_ext.gradients.method import NORMS
from captum_llm_ext.gradients.wrapper import LAYER_MODES
from captum_llm_ext.inputs.chats import CHAT_FEATURES
from captum_llm_ext.inputs.questions import QA_FEATURES
from captum_llm_ext.inputs.statements import BY_OUTPUT
from captum_llm_ext.inputs.targets import GRADIENT_TARGETS, PERTURBATION_TARGETS
from captum_llm_ext.model.loading import QUANTIZATIONS
from captum_llm_ext.model.relevance_rules import RULES
from captum_llm_ext.registry import CHOICES
from captum_llm_ext.results.attention import OVER_LAYERS
from captum_llm_ext.scoring.tasks import TASKS

HEAVY = ("torch", "transformers", "captum", "numpy", "matplotlib")


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Another interpreter, which has imported nothing yet."""
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)


def command(*words: str) -> tuple[int, str, str, list[str]]:
    """Exit code, output, errors and heavy modules of the command line."""
    code = (
        "import atexit, runpy, sys\n"
        f"names = {HEAVY}\n"
        "atexit.register(lambda: print(*(n for n in names if n in sys.modules), file=sys.stderr))\n"
        f"sys.argv = ['captum-llm-ext', *{words}]\n"
        "runpy.run_module('captum_llm_ext', run_name='__main__')\n"
    )
    done = python("-c", code)
    *errors, imported = done.stderr.splitlines()
    return done.returncode, done.stdout, "\n".join(errors), imported.split()


def test_help_without_torch() -> None:
    code, out, errors, imported = command("--help")
    assert (code, errors, imported) == (0, "", [])
    assert out.startswith("usage: captum-llm-ext PROMPT [options]")


def test_the_module_prints_the_same_help() -> None:
    done = python("-m", "captum_llm_ext", "--help")
    assert (done.returncode, done.stdout) == (0, command("--help")[1])


def test_both_parsers_without_torch() -> None:
    code = (
        "import sys, captum_llm_ext.cli.entry\n"
        "from captum_llm_ext.cli import many, one\n"
        "print(len(one.build_parser().format_help()), len(many.build_parser().format_help()))\n"
        f"print(*(name for name in {HEAVY} if name in sys.modules))\n"
    )
    lengths, imported = python("-c", code).stdout.splitlines()
    assert all(int(length) > 1000 for length in lengths.split())
    assert imported == ""


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--version"], 0, f"captum-llm-ext {__version__}"),
        (["batch", "--help"], 0, "usage: captum-llm-ext batch PROMPTS"),
        ([], 2, "the following arguments are required: prompt"),
        (["x", "--method", "nonsense"], 2, "invalid choice: 'nonsense'"),
        (["x", "--steps", "many"], 2, "expected a whole number of at least 1, got 'many'"),
        (["x", "--out", "picture.gif"], 2, "expected a file name that ends in .png"),
        (["x", "--chat", "--values", "y"], 2, "--chat and --values exclude each other"),
        (["x", "--task", "qa"], 2, "--task qa needs a --model"),
        (["batch", "x.jsonl"], 2, "the following arguments are required: --out"),
        (["batch", "x.jsonl", "--out", "y.jsonl", "--dtype", "float16"], 2, "--dtype: only for a"),
    ],
)
def test_answers_without_torch(words: list[str], code: int, text: str) -> None:
    returned, out, errors, imported = command(*words)
    assert (returned, imported) == (code, [])
    assert text in (errors if code else out)


IMPLEMENTED: dict[str, Collection[str]] = {
    "attr_target": {*PERTURBATION_TARGETS, *GRADIENT_TARGETS},
    "by": {*CHAT_FEATURES, *QA_FEATURES},
    "by_output": BY_OUTPUT,
    "layer_mode": LAYER_MODES,
    "norm": NORMS.keys() - {"sum"},
    "quadrature": {ADAPTIVE, *FIXED_RULES},
    "quantization": QUANTIZATIONS,
    "reduction": REDUCTIONS,
    "rules": RULES,
    "task": TASKS,
}


@pytest.mark.parametrize("option", CHOICES)
def test_choices_are_what_is_implemented(option: str) -> None:
    assert len(CHOICES[option]) == len(set(CHOICES[option]))
    assert set(CHOICES[option]) == set(IMPLEMENTED[option])


def test_reductions_go_over_layers_too() -> None:
    assert list(CHOICES["reduction"]) == list(REDUCTIONS) == list(OVER_LAYERS)
