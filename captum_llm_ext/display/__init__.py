"""How attributions look: tokens as text, colour scales, plots and terminal tables.

Every function here takes plain arrays and labels and knows nothing of results or models.
A further format belongs beside `terminal` and `html`, built on the same `tokens` and `scale`.
"""

from __future__ import annotations

from captum_llm_ext.display.html import View, render_document, render_view
from captum_llm_ext.display.paths import draw_path
from captum_llm_ext.display.plots import draw_bars, draw_heat_map
from captum_llm_ext.display.removal import draw_measures, draw_removal_curves
from captum_llm_ext.display.scale import ColorScale, relative_to_rows
from captum_llm_ext.display.shaded import draw_shaded_text
from captum_llm_ext.display.terminal import AttributionText, print_text, render_text
from captum_llm_ext.display.tokens import (
    distinct_names,
    readable_token,
    readable_tokens,
    short_layer_names,
    token_text,
    token_texts,
)
from captum_llm_ext.display.words import word_spans, word_texts

__all__ = [
    "AttributionText",
    "ColorScale",
    "View",
    "distinct_names",
    "draw_bars",
    "draw_heat_map",
    "draw_measures",
    "draw_path",
    "draw_removal_curves",
    "draw_shaded_text",
    "print_text",
    "readable_token",
    "readable_tokens",
    "relative_to_rows",
    "render_document",
    "render_text",
    "render_view",
    "short_layer_names",
    "token_text",
    "token_texts",
    "word_spans",
    "word_texts",
]
