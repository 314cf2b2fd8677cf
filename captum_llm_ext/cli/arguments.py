"""The arguments that both commands take, by the names that Python uses.

An argument without a default is in the result only where the caller gave it. `options.py` turns
the arguments into keywords: an argument that nothing there takes out is a keyword of `explain`, so
a further option of `explain` is one `add(...)` here. This module imports neither torch nor Captum.
"""

from __future__ import annotations

import argparse
import json
import re
from argparse import SUPPRESS, ArgumentTypeError, BooleanOptionalAction
from contextlib import suppress
from functools import partial
from typing import Any, NoReturn

from captum_llm_ext.registry import AUTOMATIC, CHOICES, METHODS, did_you_mean

DTYPES = ("float32", "bfloat16", "float16")


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage before it."""

    def __init__(self, **settings: Any) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(argument_default=SUPPRESS, formatter_class=formatter, **settings)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"captum-llm-ext: error: {message}{self._hint(message)}\n")

    def _hint(self, message: str) -> str:
        """The flag or value that is close to the one that the parser did not take."""
        if found := re.search(r"unrecognized arguments: .*?(--[\w-]+)", message):
            return did_you_mean(found[1], (o for a in self._actions for o in a.option_strings))
        if found := re.search(r"argument (\S+): invalid choice: '(.*?)'", message):
            flags = found[1].split("/")
            values = (a.choices or () for a in self._actions if flags[0] in a.option_strings)
            return did_you_mean(found[2], (value for choices in values for value in choices))
        return ""


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("the model").add_argument
    add(
        "--model",
        metavar="NAME",
        help="folder or name of a causal language model, an encoder-decoder model or a question "
        "answering model (default: a small demo model, 98 MB, fetched once)",
    )
    add(
        "--task",
        choices=CHOICES["task"],
        help="causal: the model continues the prompt; seq2seq: it translates or summarises it; "
        "qa: it finds the answer in a context (default: what the model was saved as)",
    )
    add("--quantization", choices=CHOICES["quantization"], help="load the weights in 4 or 8 bits")
    add("--dtype", choices=DTYPES, help="dtype of the weights (default: as stored)")
    add(
        "--device-map",
        type=_value,
        metavar="WHERE",
        help='device of the weights, such as "cuda" or "auto" (default: the CPU; with several '
        "processes, a GPU for each process where there are any)",
    )
    add(
        "--trust-remote-code",
        action="store_true",
        help="run Python code from the model's folder, with all your rights, where it needs any",
    )


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("prompt and target").add_argument
    add(
        "--by",
        choices=CHOICES["by"],
        default="token",
        help="what a feature of the prompt is; message is for chats, part for a question with its "
        "context (default: %(default)s)",
    )
    add(
        "--roles",
        nargs="+",
        default=["user"],
        metavar="ROLE",
        help="the roles in a chat whose messages hold the features (default: user)",
    )
    add(
        "--target",
        metavar="TEXT",
        help='the continuation, with its leading space, such as " Paris" (default: generated)',
    )
    add(
        "--contrast-target",
        metavar="TEXT",
        help="attribute the score of the target minus the score of this text, which has one token "
        "or as many as the target",
    )
    add(
        "--max-new-tokens",
        type=_positive,
        metavar="N",
        help="length of a generated target (default: 25, or up to the model's end of sequence)",
    )
    add(
        "--gen-args",
        nargs="+",
        type=_assignment,
        metavar="NAME=VALUE",
        help="arguments of the model's generate, such as do_sample=true",
    )


def add_method_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("method").add_argument
    add(
        "--method",
        choices=METHODS,
        default=None,
        help="; ".join(f"{name}: {method.help}" for name, method in METHODS.items())
        + f" (default: {AUTOMATIC[0]} where the model's attention can be read and neither --layers "
        f"nor an option is given that it lacks, else {AUTOMATIC[-1]})",
    )
    add(
        "--layers",
        nargs="+",
        metavar="PATTERN",
        help='layers by name or pattern, such as q_proj or "model.layers.*.mlp"; put them after '
        "the prompt (default: the input embeddings; for attention, every layer)",
    )
    add(
        "--layer-mode",
        choices=CHOICES["layer_mode"],
        help="treat each of several layers as if it were alone (default), or move all together",
    )
    add(
        "--attribute-to-layer-input",
        action="store_true",
        help="attribute to the input of the layers instead of their output",
    )
    add(
        "--attr-target",
        choices=CHOICES["attr_target"],
        help="the score that is attributed (default: log_prob)",
    )
    add("--norm", choices=CHOICES["norm"], help="norm that saliency takes (default: l1)")
    add("--rules", choices=CHOICES["rules"], help="rules that relevance takes (default: cp)")
    add(
        "--heads",
        nargs="+",
        type=int,
        metavar="N",
        help="attention heads, counted from 0 (default: all)",
    )
    add(
        "--reduction",
        choices=CHOICES["reduction"],
        help="how the attention of all heads and layers becomes one map (default: mean)",
    )
    add(
        "--include-prompt-attention",
        action="store_true",
        help="also keep the attention among the tokens of the prompt",
    )
    _add_path_arguments(parser)
    _add_work_arguments(parser)
    for name, methods in _methods_by_setting().items():
        values = {"choices": CHOICES[name]} if name in CHOICES else {"type": _value}
        with suppress(argparse.ArgumentError):  # written out above
            flag = "--" + name.replace("_", "-")
            add(flag, help=f"setting of {', '.join(methods)}", **values)


def _add_path_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("paths, baselines and samples").add_argument
    add(
        "--baselines",
        "--baseline",
        nargs="+",
        type=_baseline,
        metavar="NAME",
        help="where the path of ig, conductance and gradshap starts: pad, eos, unk, zero, mean, "
        "nearest, a token or its id (default: 0), or several to average over; for perturbations "
        "of tokens, what replaces an absent token; with --values, one for each value",
    )
    add(
        "--n-steps",
        "--steps",
        type=_positive,
        metavar="N",
        help="steps of ig and conductance (default: 50)",
    )
    add(
        "--quadrature",
        choices=CHOICES["quadrature"],
        help="rule of ig and conductance; adaptive takes gradients where the path needs them, "
        "until the attributions sum to the score difference within --tol (default: gausslegendre)",
    )
    add(
        "--adaptive",
        dest="quadrature",
        action="store_const",
        const="adaptive",
        help="short for --quadrature adaptive",
    )
    add("--tol", type=float, metavar="X", help="tolerance of adaptive quadrature (default: 0.05)")
    add(
        "--max-evaluations",
        "--max-rows",
        type=_positive,
        metavar="N",
        help="most points of adaptive quadrature (default: 1000), or most masked prompts of guided "
        "(default: 64)",
    )
    add(
        "--n-samples",
        "--samples",
        type=_positive,
        metavar="N",
        help="samples of methods that draw at random",
    )
    add("--stdevs", type=float, metavar="X", help="noise of gradshap on the layer (default: 0)")
    add("--num-trials", type=_positive, metavar="N", help="average over N runs (default: 1)")
    add("--seed", type=_whole, metavar="N", help="seed of all random draws")


def _add_work_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what is kept, and how it is computed").add_argument
    add(
        "--include-per-token-attr",
        action=BooleanOptionalAction,
        help="attribute each token of the target (default), or the target as a whole: faster",
    )
    add(
        "--by-output",
        choices=CHOICES["by_output"],
        help="what a row is: a token of the target (default), or a sentence of it",
    )
    add(
        "--sequence-only",
        dest="include_per_token_attr",
        action="store_false",
        help="the same as --no-include-per-token-attr",
    )
    add("--include-generated", action="store_true", help="earlier target tokens are features too")
    add("--include-hidden-attr", action="store_true", help="keep attributions per hidden unit")
    add("--internal-batch-size", type=_positive, metavar="N", help="rows per pass of the model")
    add("--autocast", choices=DTYPES[1:], help="run the passes in this dtype: faster, less exact")
    add(
        "--reuse-prefix",
        action=BooleanOptionalAction,
        help="run the tokens before all features once (default)",
    )
    add(
        "--forward-mode",
        action=BooleanOptionalAction,
        help="one derivative per feature, not per target token (default: where it is cheaper)",
    )


def _methods_by_setting() -> dict[str, list[str]]:
    """The names of the methods that are made with each keyword of the registry."""
    methods: dict[str, list[str]] = {}
    for name, method in METHODS.items():
        for setting in (*method.wrapped_by.settings, *method.settings):
            methods.setdefault(setting, []).append(name)
    return methods


def _whole(text: str, least: int = 0) -> int:
    if not text.isdecimal() or int(text) < least:
        raise ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
    return int(text)


_positive = partial(_whole, least=1)


def _baseline(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _value(text: str) -> Any:
    """A number, list or object as JSON writes it; other text as it is."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _assignment(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    return name, _value(value)
