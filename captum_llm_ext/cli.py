"""The command line: a thin skin over ``explain``."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from captum_llm_ext import __version__
from captum_llm_ext.attention_maps import LAYER_MAPS
from captum_llm_ext.display.tokens import readable_token, short_layer_names
from captum_llm_ext.explain import METHODS, PERTURBATION_METHODS, READOUT_METHODS, explain
from captum_llm_ext.models import load_demo_model, load_model
from captum_llm_ext.result import LLMAttributionResult, LLMLayerAttributionResult
from captum_llm_ext.tasks import CAUSAL, TASKS

USER_ERRORS = (ValueError, TypeError, OSError, ImportError)
PICTURE_DPI = 100
STRONGEST_TOKENS = 3
SAMPLING_METHODS = ("gradshap", "shapley_sampling", "lime", "kernelshap")

DESCRIPTION = "Show which words of a prompt made a language model say what it said."
EXAMPLES = """\
examples:
  captum-llm-ext "The capital of France is" --target " Paris"
  captum-llm-ext "The capital of France is" --method ig --steps 100 --out capital.png
  captum-llm-ext "Name a fruit." --chat --max-new-tokens 5
  captum-llm-ext "The capital of France is" --layers "model.layers.*.mlp" q_proj --out layers.png
  captum-llm-ext "The capital of France is" --model path/to/model --sequence-only
  captum-llm-ext "Das Haus ist alt." --model path/to/translator --method ig --adaptive
  captum-llm-ext "Who plays golf?" --context "Dave plays golf." --model path/to/qa-model
"""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = _Parser(
        prog="captum-llm-ext",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("prompt", help="the text whose tokens are to be attributed")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    _add_model_arguments(parser.add_argument_group("what the model says"))
    _add_method_arguments(parser.add_argument_group("how it is attributed"))
    _add_output_arguments(parser.add_argument_group("what is shown"))
    return parser


def _add_model_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--model",
        metavar="NAME",
        help="folder or name of a causal language model, an encoder-decoder model or a question "
        "answering model (default: a small demo model, 98 MB, fetched once)",
    )
    group.add_argument(
        "--task",
        choices=TASKS,
        help="causal: the prompt goes on; seq2seq: it is translated or summarised; qa: an answer "
        "is found in the context (default: what the model was saved as)",
    )
    group.add_argument(
        "--context", metavar="TEXT", help="of qa: the text that holds the answer to the prompt"
    )
    group.add_argument(
        "--target",
        metavar="TEXT",
        help='the continuation, with its leading space, such as " Paris" (default: generated)',
    )
    group.add_argument(
        "--chat", action="store_true", help="put the prompt through the model's chat template"
    )
    group.add_argument(
        "--max-new-tokens",
        type=_positive,
        metavar="N",
        help="length of a generated target (default: 25, or up to the model's end of sequence)",
    )


def _add_method_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--method",
        choices=METHODS,
        default="saliency",
        help="saliency: L1 norm of the gradient; ig: integrated gradients; gradxact: gradient x "
        "activation; gradshap: gradient SHAP; ablation, two_stage, shapley, "
        "shapley_sampling, lime, kernelshap: by perturbing the prompt; attention: the weights "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--layers",
        nargs="+",
        metavar="PATTERN",
        help='layers by name or pattern, such as q_proj or "model.layers.*.mlp"; put them after '
        "the prompt (default: the input embeddings; of attention: all layers)",
    )
    group.add_argument(
        "--heads",
        nargs="+",
        type=int,
        metavar="N",
        help="heads of attention, from 0 (default: all)",
    )
    group.add_argument(
        "--reduction",
        choices=LAYER_MAPS,
        help="how attention of all heads and layers becomes one map (default: mean)",
    )
    group.add_argument(
        "--steps", type=_positive, metavar="N", help="steps of integrated gradients (default: 50)"
    )
    group.add_argument(
        "--adaptive",
        action="store_true",
        help="of integrated gradients: take gradients where the path needs them, until the "
        "attributions sum to the score difference within 5 %%",
    )
    group.add_argument(
        "--baseline",
        metavar="NAME",
        help="where the path of ig and gradshap starts: pad, eos, unk, zero, mean, nearest or a "
        "token (default: token id 0); of ablation: pad, eos, unk, nearest or a token",
    )
    group.add_argument(
        "--samples",
        type=_positive,
        metavar="N",
        help="samples of gradshap, shapley_sampling, lime and kernelshap",
    )
    group.add_argument(
        "--sequence-only",
        action="store_true",
        help="attribute the target as a whole, not each of its tokens: faster",
    )


def _add_output_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--out", type=_picture, metavar="FILE.png", help="write a picture too")
    group.add_argument("--no-color", action="store_true", help="print the table without colours")
    group.add_argument(
        "--verbose", action="store_true", help="tell what is being done; show tracebacks"
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def _picture(text: str) -> Path:
    """Checked before any work is done, so that a long run does not end in a typing mistake."""
    path = Path(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(
            f"expected a file name that ends in .png (the only format so far), got {text!r}"
        )
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {str(path.parent)!r} to write into")
    return path


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: the arguments. Default: those of the process.

    Returns:
        0, or 2 where the request cannot be met, 1 for any other error, 130 when interrupted.

    Raises:
        SystemExit: from argparse, for ``--help``, ``--version`` (0) and wrong arguments (2).

    Example:
        >>> main(["The capital of France is", "--target", " Paris"])  # doctest: +SKIP
        0
    """
    arguments = build_parser().parse_args(argv)
    with _messages_on_stderr(arguments.verbose):
        try:
            _run(arguments)
            sys.stdout.flush()
        except BrokenPipeError:
            # The reader (head, less) went away: leave nothing to flush at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except KeyboardInterrupt:
            print("captum-llm-ext: interrupted", file=sys.stderr)
            return 130
        except Exception as error:
            return _report(error, arguments.verbose)
    return 0


def _run(arguments: argparse.Namespace) -> None:
    options = _attribute_options(arguments)
    model, tokenizer = _load(arguments)
    prompt: Any = arguments.prompt
    if arguments.chat:
        prompt = [{"role": "user", "content": prompt}]
    layers = arguments.layers
    if layers is not None and len(layers) == 1:
        layers = layers[0]
    result = explain(
        model,
        tokenizer,
        prompt,
        arguments.target,
        arguments.method,
        layers,
        context=arguments.context,
        **options,
    )
    _show(result, color=not arguments.no_color)
    if arguments.out:
        _save_picture(result, arguments.out)


def _load(arguments: argparse.Namespace) -> tuple[Any, Any]:
    if arguments.model:
        return load_model(arguments.model, task=arguments.task)
    if arguments.task not in (None, CAUSAL):
        raise ValueError(f"--task {arguments.task} needs a --model: the demo model is causal")
    return load_demo_model()


def _attribute_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keywords of ``attribute``; options that would do nothing are refused."""
    options: dict[str, Any] = {"show_progress": sys.stderr.isatty()}
    if arguments.sequence_only:
        if arguments.method in (*PERTURBATION_METHODS, *READOUT_METHODS):
            raise ValueError(f"--sequence-only saves nothing with --method {arguments.method}")
        options["include_per_token_attr"] = False
    if arguments.steps is not None:
        if arguments.method != "ig":
            raise ValueError(f"--steps belongs to --method ig, got --method {arguments.method}")
        options["n_steps"] = arguments.steps
    if arguments.adaptive:
        if arguments.method != "ig" or arguments.steps is not None:
            raise ValueError("--adaptive belongs to --method ig, without --steps")
        options["quadrature"] = "adaptive"
    if arguments.baseline is not None:
        if arguments.method in ("saliency", "gradxact", *READOUT_METHODS):
            raise ValueError(f"--baseline means nothing to --method {arguments.method}")
        options["baselines"] = arguments.baseline
    if arguments.samples is not None:
        if arguments.method not in SAMPLING_METHODS:
            raise ValueError(
                f"--samples belongs to --method {', '.join(SAMPLING_METHODS)}; "
                f"got --method {arguments.method}"
            )
        options["n_samples"] = arguments.samples
    for name in ("heads", "reduction"):
        if getattr(arguments, name) is not None:
            if arguments.method != "attention":
                raise ValueError(f"--{name} belongs to --method attention")
            options[name] = getattr(arguments, name)
    if arguments.max_new_tokens is not None:
        if arguments.target is not None:
            raise ValueError("--max-new-tokens is for a generated target: leave out --target")
        options["gen_args"] = {"max_new_tokens": arguments.max_new_tokens, "do_sample": False}
    return options


def _show(result: LLMAttributionResult, color: bool) -> None:
    if color:
        result.print()
    else:
        print(result.to_text(color=False))
    if isinstance(result, LLMLayerAttributionResult):
        print("\n".join(_layer_summary(result)))


def _layer_summary(result: LLMLayerAttributionResult) -> list[str]:
    """One line per layer: its strongest tokens, each with its share of the layer's total."""
    names = short_layer_names(result.layer_names)
    tokens = [readable_token(token).strip() for token in result.input_tokens]
    width = max(len(name) for name in names)
    lines = [f"{'layer':<{width}}  strongest tokens (share of the layer's absolute attribution)"]
    for name, attribution in zip(names, result.layer_seq_attr.abs(), strict=True):
        share = 100 * attribution / attribution.sum().clamp_min(1e-30)
        top = share.topk(min(STRONGEST_TOKENS, len(tokens)))
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        strongest = ", ".join(f"{tokens[i]} {value:.0f} %" for i, value in pairs if value > 0)
        lines.append(f"{name:<{width}}  {strongest or 'none: the layer does not see the prompt'}")
    return lines


def _save_picture(result: LLMAttributionResult, path: Path) -> None:
    plot: Any
    if isinstance(result, LLMLayerAttributionResult):
        plot = result.plot_layer_attr
    elif result.token_attr is None:
        plot = result.plot_seq_attr
    else:
        plot = result.plot_token_attr
    figure, _ = plot()
    figure.savefig(path, dpi=PICTURE_DPI, bbox_inches="tight")
    print(f"captum-llm-ext: wrote {path}", file=sys.stderr)


def _report(error: Exception, verbose: bool) -> int:
    if verbose:
        traceback.print_exception(error)
    expected = isinstance(error, USER_ERRORS)
    message = " ".join(str(error).split()) or type(error).__name__
    if not expected:
        message = f"{type(error).__name__}: {message} (--verbose shows where)"
    print(f"captum-llm-ext: error: {message}", file=sys.stderr)
    return 2 if expected else 1


@contextmanager
def _messages_on_stderr(verbose: bool) -> Iterator[None]:
    """Warnings as one line each, and with ``verbose`` the package's log, for the time of a run."""
    package = logging.getLogger("captum_llm_ext")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("captum-llm-ext: %(message)s"))
    level = package.level
    if verbose:
        package.addHandler(handler)
        package.setLevel(logging.INFO)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            yield
        finally:
            package.removeHandler(handler)
            package.setLevel(level)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"captum-llm-ext: warning: {' '.join(str(message).split())}", file=sys.stderr)
