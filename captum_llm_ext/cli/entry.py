"""The entry point: chooses the command, and prints its errors and warnings.

Help, the version and errors of arguments come without torch: the commands import it as they run.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from captum_llm_ext.cli import layers, many, methods, one

USER_ERRORS = (ValueError, TypeError, OSError, ImportError)
# Any other first argument is a prompt.
COMMANDS: dict[str, ModuleType] = {"batch": many, "layers": layers, "methods": methods}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: the arguments. Default: those of the process.

    Returns:
        0; 2 where the request cannot be met, 1 for any other error, 130 when interrupted.

    Raises:
        SystemExit: from argparse, for ``--help``, ``--version`` (0) and wrong arguments (2).

    Example:
        >>> main(["The capital of France is", "--target", " Paris"])  # doctest: +SKIP
        0
    """
    words = list(sys.argv[1:] if argv is None else argv)
    command = COMMANDS.get(words[0], one) if words else one
    parser = command.build_parser()
    parser.add_argument(
        "--verbose",
        action="store_true",
        default=False,
        help="log what is being done, and show tracebacks",
    )
    arguments = vars(parser.parse_args(words if command is one else words[1:]))
    verbose = arguments.pop("verbose")
    with _messages_on_stderr(verbose):
        try:
            command.run(arguments)
            sys.stdout.flush()
        except BrokenPipeError:
            # The reader (head, less) has ended: leave nothing to flush at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except KeyboardInterrupt:
            print("captum-llm-ext: interrupted", file=sys.stderr)
            return 130
        except Exception as error:
            return _report(error, verbose)
    return 0


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
    """During a run, print each warning as one line, and with ``verbose`` the package's log."""
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
