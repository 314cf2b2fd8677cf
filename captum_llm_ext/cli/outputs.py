"""Where a result goes: the terminal, and files by the ending of their names."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

OUTPUT_OPTIONS = ("out", "plot", "merge", "long", "color")
PICTURE_DPI = 100
STRONGEST_TOKENS = 3


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what is shown").add_argument
    add(
        "--out",
        nargs="+",
        type=_file,
        default=[],
        metavar="FILE",
        help=f"also write these files, by their endings: {', '.join(OUTPUTS)}",
    )
    add(
        "--plot",
        choices=PLOTS,
        default=None,
        help="what a picture shows: attributions of the sequence, of each target token or of each "
        "layer (default: the last of these that the result has), or the score along the path",
    )
    add("--merge", choices=["word"], default=None, help="show words of several tokens as one")
    add("--long", action="store_true", default=False, help="one attribution per row of a .csv file")
    add(
        "--no-color",
        dest="color",
        action="store_false",
        default=True,
        help="print the table without colours",
    )


def show(result: Any, options: Mapping[str, Any]) -> None:
    """Print the result, and write the files of --out. `options` holds all `OUTPUT_OPTIONS`."""
    if options["merge"] is not None:
        result = result.merge(options["merge"])
    if options["color"]:
        result.print()
    else:
        print(result.to_text(color=False))
    if _has_layers(result):
        print("\n".join(_layer_summary(result)))
    for path in options["out"]:
        OUTPUTS[path.suffix.lower()](result, path, options)
        print(f"captum-llm-ext: wrote {path}", file=sys.stderr)


def _has_layers(result: Any) -> bool:
    """Whether it is an `LLMLayerAttributionResult`, without importing that class and torch."""
    return hasattr(result, "layer_seq_attr")


def _file(text: str) -> Path:
    """A path that can be written, checked before a long run and not after it."""
    path = Path(text)
    if path.suffix.lower() not in OUTPUTS:
        raise argparse.ArgumentTypeError(
            f"expected a file name that ends in {', '.join(OUTPUTS)}; got {text!r}"
        )
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {str(path.parent)!r} to write into")
    return path


def _write_picture(result: Any, path: Path, options: Mapping[str, Any]) -> None:
    most_detailed = "sequence" if result.token_attr is None else "token"
    default = "layer" if _has_layers(result) else most_detailed
    figure, _ = PLOTS[options["plot"] or default](result)
    figure.savefig(path, dpi=PICTURE_DPI, bbox_inches="tight")


def _plot_layers(result: Any) -> Any:
    if not _has_layers(result):
        raise ValueError("--plot layer: only for a result of several layers (see --layers)")
    return result.plot_layer_attr()


def _write_csv(result: Any, path: Path, options: Mapping[str, Any]) -> None:
    result.to_dataframe(long=options["long"]).to_csv(path, index=not options["long"])


def _write_arrays(result: Any, path: Path, _: Mapping[str, Any]) -> None:
    import numpy as np

    with path.open("wb") as file:
        np.savez(file, **result.to_numpy())


def _write_text(result: Any, path: Path, _: Mapping[str, Any]) -> None:
    path.write_text(result.to_text(color=False) + "\n", encoding="utf-8")


def _layer_summary(result: Any) -> list[str]:
    """One line per layer: its strongest tokens, each with its share of the layer's total."""
    from captum_llm_ext.display.names import short_layer_names
    from captum_llm_ext.inputs.token_text import readable_token

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


PLOTS: dict[str, Callable[[Any], Any]] = {
    "sequence": lambda result: result.plot_seq_attr(),
    "token": lambda result: result.plot_token_attr(),
    "layer": _plot_layers,
    "path": lambda result: result.plot_path(),
}
OUTPUTS: dict[str, Callable[[Any, Path, Mapping[str, Any]], object]] = {
    ".png": _write_picture,
    ".pdf": _write_picture,
    ".svg": _write_picture,
    ".html": lambda result, path, _: result.to_html(path),
    ".json": lambda result, path, _: result.to_json(path),
    ".csv": _write_csv,
    ".npz": _write_arrays,
    ".txt": _write_text,
}
