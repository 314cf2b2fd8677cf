"""The arguments that commands have in common, by the names that Python uses.

Those without a default are in the namespace only where they were given; `options.py` reads them.
"""

from __future__ import annotations

import argparse
import json
from argparse import SUPPRESS, ArgumentTypeError, BooleanOptionalAction
from typing import Any, NoReturn

from captum_llm_ext.attention.maps import LAYER_MAPS
from captum_llm_ext.compat import FIXED_RULES
from captum_llm_ext.gradients.integrated_gradients import ADAPTIVE
from captum_llm_ext.gradients.method import NORMS
from captum_llm_ext.inputs.chats import CHAT_FEATURES
from captum_llm_ext.inputs.questions import QA_FEATURES
from captum_llm_ext.inputs.targets import PERTURBATION_TARGETS
from captum_llm_ext.model.loading import QUANTIZATIONS
from captum_llm_ext.registry import METHODS
from captum_llm_ext.scoring.tasks import TASKS

DTYPES = ("float32", "bfloat16", "float16")


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage before it."""

    def __init__(self, **settings: Any) -> None:
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(argument_default=SUPPRESS, formatter_class=formatter, **settings)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"captum-llm-ext: error: {message}\n")


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
        choices=TASKS,
        help="causal: the prompt goes on; seq2seq: it is translated or summarised; qa: an answer "
        "is found in the context (default: what the model was saved as)",
    )
    add("--quantization", choices=QUANTIZATIONS, help="load its weights in 4 or 8 bits")
    add("--dtype", choices=DTYPES, help="of its weights (default: as stored)")
    add(
        "--device-map",
        type=_value,
        metavar="WHERE",
        help='where its weights go, such as "cuda" or "auto" (default: the CPU; of several '
        "processes, each process's own GPU where there are any)",
    )


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prompt and target")
    add = group.add_argument
    add(
        "--by",
        choices=list(dict.fromkeys((*CHAT_FEATURES, *QA_FEATURES))),
        default="token",
        help="what a feature of the prompt is (default: %(default)s; message: of chats; part: "
        "question and context)",
    )
    add(
        "--roles",
        nargs="+",
        default=["user"],
        metavar="ROLE",
        help="whose messages of a chat hold the features (default: user)",
    )
    add(
        "--target",
        metavar="TEXT",
        help='the continuation, with its leading space, such as " Paris" (default: generated)',
    )
    add(
        "--contrast-target",
        metavar="TEXT",
        help="attribute the score of the target less that of this one, of as many tokens or one",
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
        default="saliency",
        help="; ".join(f"{name}: {method.help}" for name, method in METHODS.items())
        + " (default: %(default)s)",
    )
    add(
        "--layers",
        nargs="+",
        metavar="PATTERN",
        help='layers by name or pattern, such as q_proj or "model.layers.*.mlp"; put them after '
        "the prompt (default: the input embeddings; of attention: all layers)",
    )
    add(
        "--layer-mode",
        choices=("independent", "joint"),
        help="of several layers: each as if it were alone (default), or all move together",
    )
    add(
        "--attribute-to-layer-input",
        action="store_true",
        help="attribute to the input of the layers instead of their output",
    )
    add("--attr-target", choices=PERTURBATION_TARGETS, help="the score (default: log_prob)")
    add(
        "--norm",
        choices=[name for name in NORMS if name != "sum"],
        help="of saliency (default: l1)",
    )
    add("--heads", nargs="+", type=int, metavar="N", help="of attention, from 0 (default: all)")
    add(
        "--reduction",
        choices=LAYER_MAPS,
        help="how attention of all heads and layers becomes one map (default: mean)",
    )
    add(
        "--include-prompt-attention",
        action="store_true",
        help="keep the attention among the tokens of the prompt too",
    )
    _add_path_arguments(parser)
    _add_work_arguments(parser)


def _add_path_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("paths, baselines and samples").add_argument
    add(
        "--baselines",
        "--baseline",
        nargs="+",
        type=_baseline,
        metavar="NAME",
        help="where the path of ig, conductance and gradshap starts: pad, eos, unk, zero, mean, "
        "nearest, a token or its id (default: 0), several to average over; of perturbations of "
        "tokens what stands for an absent one; of --values one for each",
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
        choices=(ADAPTIVE, *FIXED_RULES),
        help="their rule; adaptive takes gradients where the path needs them, "
        "until the attributions sum to the score difference within --tol (default: gausslegendre)",
    )
    add(
        "--adaptive",
        dest="quadrature",
        action="store_const",
        const=ADAPTIVE,
        help="short for --quadrature adaptive",
    )
    add("--tol", type=float, metavar="X", help="of adaptive quadrature (default: 0.05)")
    add(
        "--max-evaluations",
        "--max-rows",
        type=_positive,
        metavar="N",
        help="most points of it (default: 1000)",
    )
    add(
        "--n-samples",
        "--samples",
        type=_positive,
        metavar="N",
        help="samples of methods that draw at random",
    )
    add("--stdevs", type=float, metavar="X", help="noise of gradshap on the layer (default: 0)")
    add("--num-trials", type=_positive, metavar="N", help="average over so many runs (default: 1)")
    add("--seed", type=_whole, metavar="N", help="of what is drawn at random")


def _add_work_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what is kept, and how it is computed").add_argument
    add(
        "--include-per-token-attr",
        action=BooleanOptionalAction,
        help="attribute each token of the target (default), or the target as a whole: faster",
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
    add("--autocast", choices=DTYPES[1:], help="run the passes in this type: faster, less exact")
    add(
        "--reuse-prefix",
        action=BooleanOptionalAction,
        help="run what precedes all features once (default)",
    )
    add(
        "--forward-mode",
        action=BooleanOptionalAction,
        help="one derivative per feature, not per target token (default: where it is cheaper)",
    )


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise ArgumentTypeError(f"expected a whole number, got {text!r}")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _baseline(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _value(text: str) -> Any:
    """A number, list or object as JSON has it, else the text as it is."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _assignment(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    return name, _value(value)
