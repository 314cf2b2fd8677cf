"""Several prompts as shaded text, side by side in equal colours."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from captum_llm_ext.display.html import shaded_spans
from captum_llm_ext.display.scale import ColorScale, FloatArray

_STYLE = {
    "all": "display:flex;flex-wrap:wrap;gap:16px;background:#fff;color:#111;color-scheme:light;"
    "font:15px/1.8 system-ui,sans-serif;padding:12px",
    "one": "flex:1 1 20em;min-width:0;border:1px solid #ccc;border-radius:6px;padding:8px 12px",
    "name": "font-weight:600;border-bottom:1px solid #ccc;margin-bottom:6px",
    "text": "white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:plaintext",
    "legend": "flex-basis:100%;font-size:12.5px;color:#444",
}


def render_side_by_side(
    columns: Sequence[tuple[str, Sequence[str], FloatArray]], scale: ColorScale
) -> str:
    """A `div` without scripts.

    Args:
        columns: name, tokens and values (n_tokens,) of each.
        scale: colours of all values.
    """
    parts = "".join(
        _block(
            "one",
            _block("name", escape(name)) + _block("text", shaded_spans(tokens, values, scale)),
        )
        for name, tokens, values in columns
    )
    low = scale.format(-scale.limit) if scale.signed else "0"
    signs = "; negative values are red" if scale.signed else ""
    legend = f"One scale, {low} to {scale.format(scale.limit)}{signs}."
    return _block("all", parts + _block("legend", legend))


def _block(style: str, content: str) -> str:
    return f'<div dir="auto" style="{_STYLE[style]}">{content}</div>'
