"""Attributions as a page: the prompt as shaded text, for each output token and each layer.

The page needs no network and no framework. Without scripts it still shows the attribution to the
whole output.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from html import escape
from importlib.resources import files

import numpy as np
import numpy.typing as npt
from matplotlib.colors import to_hex

from captum_llm_ext.display.scale import ColorScale, FloatArray, text_color
from captum_llm_ext.inputs.token_text import SAME_CHARACTER, readable_text, token_texts

_MOST_BYTES = 285_000  # for tokens and values, which leaves 15 kB of 300 kB for the scripts
_BYTES_OF_VIEW = 400
_BYTES_OF_VALUE = 8 / 3  # two bytes, in base64
_LONGEST_TOKEN = 200  # characters
_LEVELS = 65  # colours of a palette
_FAINTEST = 0.02  # negative values are underlined from this share of the scale on


@dataclass(frozen=True)
class View:
    """The attributions at one position of the slider.

    seq_attr: (n_input,); token_attr: (n_output, n_input), or the first of these rows, or None;
    sink: whether the first token may be an attention sink, see `ColorScale.of`.
    """

    name: str
    seq_attr: FloatArray
    token_attr: FloatArray | None
    sink: bool = False

    @property
    def scale(self) -> ColorScale:
        """Colours of `seq_attr`."""
        return ColorScale.of(self.seq_attr, self.sink)

    @property
    def rows(self) -> FloatArray:
        """Attributions to the sequence and to each output token, (1 + n_output, n_input)."""
        rows = self.seq_attr[None]
        return rows if self.token_attr is None else np.concatenate([rows, self.token_attr])


def render_view(
    title: str,
    input_tokens: Sequence[str],
    output_tokens: Sequence[str],
    views: Sequence[View],
    footers: Mapping[str, FloatArray],
    foot: Sequence[str] = (),
) -> str:
    """A `div` for a page or a notebook, which may hold several of them.

    Args:
        title: first line.
        input_tokens, output_tokens: entries of the vocabulary.
        views: at least one; a slider chooses among several, such as layers.
        footers: name → a number for each output token, shape (n_output,), or for the sequence,
            shape (1,).
        foot: lines below, where the attributions come from.
    """
    scale = views[0].scale
    inputs = shaded_spans(input_tokens, views[0].seq_attr, scale)
    outputs = _outputs(output_tokens, footers)
    views, note = _views_that_fit(views, _MOST_BYTES - len((inputs + outputs).encode()))
    return _fill(
        "view.html",
        scope=_scope(),
        style=_style(),
        script=_script(),
        title=escape(title),
        views=escape(json.dumps([_data(view) for view in views], allow_nan=False)),
        last_view=str(len(views) - 1),
        outputs=outputs,
        legend=_legend(scale),
        inputs=inputs,
        note=escape(note),
        foot="<br>".join(escape(readable_text(line)) for line in foot),
    )


def render_document(title: str, view: str) -> str:
    """A page with one view, whose policy allows its script alone and no request."""
    digest = base64.b64encode(hashlib.sha256(_script().encode()).digest()).decode()
    return _fill("document.html", title=escape(title), view=view, script_hash=f"sha256-{digest}")


def _views_that_fit(views: Sequence[View], n_bytes: int) -> tuple[list[View], str]:
    """As much of the views as `n_bytes` hold, and a note of what is left out."""
    whole, *layers = views
    sequences = [replace(layer, token_attr=None) for layer in layers]
    plans = [
        ([whole, *layers], ""),
        ([whole, *sequences], "Too large for a page: output tokens of single layers left out."),
        ([whole], "Too large for a page: single layers left out."),
    ]
    for plan, note in plans:
        if sum(_BYTES_OF_VIEW + _BYTES_OF_VALUE * view.rows.size for view in plan) <= n_bytes:
            return plan, note
    if whole.token_attr is None:
        return [whole], note
    n_rows = max(0, int((n_bytes - _BYTES_OF_VIEW) / _BYTES_OF_VALUE) // whole.seq_attr.size - 1)
    note = f"Too large for a page: rows of {n_rows} of {len(whole.token_attr)} output tokens shown"
    also = ", and no single layers." if layers else "."
    return [replace(whole, token_attr=whole.token_attr[:n_rows])], note + also


def _data(view: View) -> dict[str, object]:
    """A view as the script reads it: scales, and values as half floats relative to the largest."""
    rows = view.rows.astype(np.float64)
    unit = float(np.abs(rows[np.isfinite(rows)]).max(initial=0.0)) or 1.0
    halves = (rows / unit).astype("<f2")
    of_tokens = None if view.token_attr is None else ColorScale.of(view.token_attr, view.sink)
    return {
        "name": readable_text(view.name, _LONGEST_TOKEN),
        "unit": unit,
        "sequence": asdict(view.scale),
        "tokens": of_tokens and asdict(of_tokens),
        "values": base64.b64encode(halves.tobytes()).decode(),
    }


def shaded_spans(tokens: Sequence[str], values: FloatArray, scale: ColorScale) -> str:
    """A `span` for each token, on the colour of its value."""
    spans = []
    for text, value, color in zip(_texts(tokens), values, scale.colors(values), strict=True):
        negative = "negative" if value <= -_FAINTEST * scale.limit else ""
        beyond = "beyond" if np.isfinite(value) and scale.beyond(value) else ""
        classes = f"{negative} {beyond}".strip()
        class_attribute = f' class="{classes}"' if classes else ""
        style = "background:{};color:{}".format(*_background_and_text(color))
        title = scale.format(float(value))
        spans.append(f'<span{class_attribute} style="{style}" title="{title}">{text}</span>')
    return "".join(spans)


def _outputs(tokens: Sequence[str], footers: Mapping[str, FloatArray]) -> str:
    sequence_title, *token_titles = _titles(len(tokens), footers)
    whole = f'<span class="whole shown"{sequence_title}>whole output</span>'
    texts = _texts(tokens)
    # the tokens of a target can lack the spaces that would separate them
    apart = "" if any(text.startswith(" ") for text in texts) else ' class="apart"'
    spans = zip(texts, token_titles, strict=True)
    return whole + "".join(f"<span{apart}{title}>{text}</span>" for text, title in spans)


def _titles(n_output: int, footers: Mapping[str, FloatArray]) -> list[str]:
    """HTML attribute with the footers of the sequence, and of each output token."""
    titles: list[list[str]] = [[] for _ in range(1 + n_output)]
    for name, values in footers.items():
        first = 0 if len(values) == 1 and n_output > 1 else 1
        for title, value in zip(titles[first:], values, strict=False):
            title.append(f"{name} {value:.3g}")
    return [f' title="{escape(", ".join(title))}"' if title else "" for title in titles]


def _legend(scale: ColorScale) -> str:
    low = scale.format(-scale.limit) if scale.signed else "0"
    kind = "signed" if scale.signed else "positive"
    sign, cut = ("" if scale.signed else " hidden"), ("" if scale.is_cut else " hidden")
    return (
        f'<span class="low">{low}</span><span class="bar {kind}"></span>'
        f'<span class="high">{scale.format(scale.limit)}</span>'
        f'<span class="sign"{sign}><span class="negative">underlined</span>: negative</span>'
        f'<span class="cut"{cut}>framed: beyond the colours, '
        f'<span class="peak">{scale.format(scale.peak)}</span></span>'
    )


def _texts(tokens: Sequence[str]) -> list[str]:
    """Tokens as text of a page: newlines break the line, markup is escaped."""
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
    """A file of `page/` with each {{name}} replaced; braces in the values stay as they are."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match.group(1)], _resource(name))


@cache
def _resource(name: str) -> str:
    return (files("captum_llm_ext.display") / "page" / name).read_text(encoding="utf-8")


@lru_cache(maxsize=1)
def _scope() -> str:
    """Class of the `div`; it differs between versions, since a page can hold several."""
    source = _resource("view.css") + _resource("view.js") + _resource("view.html")
    return "captum-llm-ext-" + hashlib.sha256(source.encode()).hexdigest()[:8]


@lru_cache(maxsize=1)
def _style() -> str:
    gradients = {
        name: ",".join(background for background, _ in palette)
        for name, palette in _palettes(9).items()
    }
    return _fill("view.css", scope=_scope(), **gradients)


@lru_cache(maxsize=1)
def _script() -> str:
    palettes = json.dumps(_palettes(_LEVELS))
    return _fill("view.js", scope=_scope(), palettes=palettes, faintest=str(_FAINTEST))


def _palettes(levels: int) -> dict[str, list[tuple[str, str]]]:
    """Colours of background and text from the lowest to the highest value of a scale."""
    palettes = {}
    for name, low in {"signed": -1.0, "positive": 0.0}.items():
        values = np.linspace(low, 1.0, levels, dtype=np.float32)
        colors = ColorScale.of(values).colors(values)
        palettes[name] = [_background_and_text(color) for color in colors]
    return palettes


def _background_and_text(color: npt.NDArray[np.float64]) -> tuple[str, str]:
    return to_hex(tuple(color)), text_color(color)
