"""Attributions as a page: the prompt as shaded text, a row for each output token, layers to slide.

The page is whole in itself: no network, no framework. Without scripts the attribution to the whole
output is there all the same.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from html import escape
from importlib.resources import files

import numpy as np
import numpy.typing as npt
from matplotlib.colors import to_hex

from captum_llm_ext.display.scale import ColorScale, FloatArray, text_color
from captum_llm_ext.display.tokens import SAME_CHARACTER, readable_text, token_texts

_MOST_BYTES = 285_000  # for tokens and values; the rest of a page of 300 kB is the same in all
_BYTES_OF_VIEW = 400
_BYTES_OF_VALUE = 8 / 3  # two in base64
_LONGEST_TOKEN = 200
_LEVELS = 65  # colours of a palette
_FAINTEST = 0.02  # share of the scale from which on a negative value is underlined


Color = npt.NDArray[np.float64]  # red, green, blue and opacity in 0..1


@dataclass(frozen=True)
class View:
    """What one position of the slider shows.

    seq_attr: (n_input,); token_attr: (n_output, n_input), or fewer rows, or None.
    """

    name: str
    seq_attr: FloatArray
    token_attr: FloatArray | None

    @property
    def rows(self) -> FloatArray:
        """The sequence and then the output tokens, shape (1 + n_output, n_input)."""
        rows = self.seq_attr[None]
        return rows if self.token_attr is None else np.concatenate([rows, self.token_attr])


def render_view(
    title: str,
    input_tokens: Sequence[str],
    output_tokens: Sequence[str],
    views: Sequence[View],
    footers: Mapping[str, FloatArray],
) -> str:
    """Fragment of a page, to stand by itself or among others in a notebook.

    Args:
        title: first line.
        input_tokens, output_tokens: as the tokenizer gives them.
        views: at least one; more of them, as of layers, are chosen with a slider.
        footers: said of each output token, name → shape (n_output,), or (1,) of the sequence.
    """
    scale = ColorScale.of(views[0].seq_attr)
    inputs = _inputs(input_tokens, views[0].seq_attr, scale)
    outputs = _outputs(output_tokens, footers)
    shown, note = _fitting(views, _MOST_BYTES - len((inputs + outputs).encode()))
    return _fill(
        "view.html",
        scope=_scope(),
        style=_style(),
        script=_script(),
        title=escape(title),
        views=escape(json.dumps([_data(view) for view in shown], allow_nan=False)),
        last_view=str(len(shown) - 1),
        outputs=outputs,
        legend=_legend(scale),
        inputs=inputs,
        note=escape(note),
    )


def render_document(title: str, view: str) -> str:
    """Page with a view alone, which lets no other script run and nothing be fetched."""
    digest = base64.b64encode(hashlib.sha256(_script().encode()).digest()).decode()
    return _fill("document.html", title=escape(title), view=view, script_hash=f"sha256-{digest}")


def _fitting(views: Sequence[View], room: int) -> tuple[list[View], str]:
    """As much of the views as `room` bytes hold, and what is said of the rest."""
    whole, *layers = views
    sequences = [replace(layer, token_attr=None) for layer in layers]
    plans = [
        ([whole, *layers], ""),
        ([whole, *sequences], "Too large for a page: output tokens of single layers left out."),
        ([whole], "Too large for a page: single layers left out."),
    ]
    for plan, note in plans:
        if sum(_BYTES_OF_VIEW + _BYTES_OF_VALUE * view.rows.size for view in plan) <= room:
            return plan, note
    if whole.token_attr is None:
        return [whole], note
    n_rows = max(0, int((room - _BYTES_OF_VIEW) / _BYTES_OF_VALUE) // whole.seq_attr.size - 1)
    note = f"Too large for a page: rows of {n_rows} of {len(whole.token_attr)} output tokens shown"
    also = ", and no single layers." if layers else "."
    return [replace(whole, token_attr=whole.token_attr[:n_rows])], note + also


def _data(view: View) -> dict[str, object]:
    """Values as half floats in units of the largest, and the scales, as the script reads them."""
    rows = view.rows.astype(np.float64)
    unit = float(np.abs(rows[np.isfinite(rows)]).max(initial=0.0)) or 1.0
    halves = (rows / unit).astype("<f2")
    tokens = None if view.token_attr is None else _scale_data(ColorScale.of(view.token_attr))
    return {
        "name": readable_text(view.name, _LONGEST_TOKEN),
        "unit": unit,
        "sequence": _scale_data(ColorScale.of(view.seq_attr)),
        "tokens": tokens,
        "values": base64.b64encode(halves.tobytes()).decode(),
    }


def _scale_data(scale: ColorScale) -> dict[str, object]:
    return {
        "limit": scale.limit,
        "signed": scale.signed,
        "beyond": scale.beyond,
        "decimals": scale.decimals,
    }


def _inputs(tokens: Sequence[str], values: FloatArray, scale: ColorScale) -> str:
    pieces = zip(_texts(tokens), values, scale.colors(values), strict=True)
    return "".join(_input(text, float(value), color, scale) for text, value, color in pieces)


def _input(text: str, value: float, color: Color, scale: ColorScale) -> str:
    negative = "negative" if value <= -_FAINTEST * scale.limit else ""
    beyond = "beyond" if np.isfinite(value) and abs(value) > scale.limit else ""
    marks = f"{negative} {beyond}".strip()
    style = "background:{};color:{}".format(*_ground_and_text(color))
    kind = f' class="{marks}"' if marks else ""
    return f'<span{kind} style="{style}" title="{scale.format(value)}">{text}</span>'


def _outputs(tokens: Sequence[str], footers: Mapping[str, FloatArray]) -> str:
    sequence, *of_tokens = _remarks(len(tokens), footers)
    whole = f'<span class="whole shown"{sequence}>whole output</span>'
    texts = _texts(tokens)
    # tokens of a target may come without their spaces
    kind = "" if any(text.startswith(" ") for text in texts) else ' class="apart"'
    pieces = zip(texts, of_tokens, strict=True)
    return whole + "".join(f"<span{kind}{remark}>{text}</span>" for text, remark in pieces)


def _remarks(n_output: int, footers: Mapping[str, FloatArray]) -> list[str]:
    """Of the sequence and each output token, as the attribute that shows when pointed at."""
    remarks: list[list[str]] = [[] for _ in range(1 + n_output)]
    for name, values in footers.items():
        first = 0 if len(values) == 1 and n_output > 1 else 1
        for place, value in enumerate(values, start=first):
            remarks[place].append(f"{name} {value:.3g}")
    return [f' title="{escape(", ".join(said))}"' if said else "" for said in remarks]


def _legend(scale: ColorScale) -> str:
    low = scale.format(-scale.limit) if scale.signed else "0"
    kind = "signed" if scale.signed else "positive"
    sign, cut = ("" if scale.signed else " hidden"), ("" if scale.beyond else " hidden")
    return (
        f'<span class="low">{low}</span><span class="bar {kind}"></span>'
        f'<span class="high">{scale.format(scale.limit)}</span>'
        f'<span class="sign"{sign}><span class="negative">underlined</span>: negative</span>'
        f'<span class="cut"{cut}>framed: beyond the colours</span>'
    )


def _texts(tokens: Sequence[str]) -> list[str]:
    """Tokens as text of a page: newlines break the line, nothing is read as markup."""
    texts = zip(token_texts(tokens), tokens, strict=True)
    return [
        escape(_running_text(text)) if text or not token else SAME_CHARACTER
        for text, token in texts
    ]


def _running_text(text: str) -> str:
    cut = text if len(text) <= _LONGEST_TOKEN else text[: _LONGEST_TOKEN - 1] + "…"
    parts = re.findall("\n+|[^\n]+", cut)
    return "".join("↵" * len(p) + "\n" if p[0] == "\n" else readable_text(p) for p in parts)


def _fill(name: str, **values: str) -> str:
    """A file of `page/` with every {{name}} replaced, once: what is put in stays as it is."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match.group(1)], _resource(name))


@cache
def _resource(name: str) -> str:
    return (files("captum_llm_ext.display") / "page" / name).read_text(encoding="utf-8")


@lru_cache(maxsize=1)
def _scope() -> str:
    """Class of the fragment, of this version alone: pages may hold fragments of several."""
    source = _resource("view.css") + _resource("view.js") + _resource("view.html")
    return "captum-llm-ext-" + hashlib.sha256(source.encode()).hexdigest()[:8]


@lru_cache(maxsize=1)
def _style() -> str:
    gradients = {
        name: ",".join(ground for ground, _ in palette) for name, palette in _palettes(9).items()
    }
    return _fill("view.css", scope=_scope(), **gradients)


@lru_cache(maxsize=1)
def _script() -> str:
    palettes = json.dumps(_palettes(_LEVELS))
    return _fill("view.js", scope=_scope(), palettes=palettes, faintest=str(_FAINTEST))


def _palettes(levels: int) -> dict[str, list[tuple[str, str]]]:
    """Colours of ground and text from the least to the most of a scale."""
    lowest = {"signed": -1.0, "positive": 0.0}
    palettes = {}
    for name, low in lowest.items():
        values = np.linspace(low, 1.0, levels, dtype=np.float32)
        colors = ColorScale(1.0, name == "signed", 0).colors(values)
        palettes[name] = [_ground_and_text(color) for color in colors]
    return palettes


def _ground_and_text(color: Color) -> tuple[str, str]:
    return to_hex(tuple(color)), text_color(color)
