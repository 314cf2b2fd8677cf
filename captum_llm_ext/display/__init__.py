"""How attributions look: colour scales, plots, pages and terminal tables.

Each function here takes plain arrays and labels, and knows nothing of results or models. A new
format is a file beside `terminal` and `html`, which colours values with `scale` too.
"""

from __future__ import annotations

from captum_llm_ext.display.figures import finished, say_below, sized_axes
from captum_llm_ext.display.html import View, render_document, render_view
from captum_llm_ext.display.names import clean_labels, distinct_names, short_layer_names
from captum_llm_ext.display.path_plot import draw_path
from captum_llm_ext.display.plots import draw_bars, draw_heat_map
from captum_llm_ext.display.removal import draw_measures, draw_removal_curves
from captum_llm_ext.display.scale import ColorScale, relative_to_rows
from captum_llm_ext.display.shaded_text import draw_shaded_text
from captum_llm_ext.display.side_by_side import render_side_by_side
from captum_llm_ext.display.terminal import AttributionText, print_text, render_text
from captum_llm_ext.display.words import word_spans, word_texts

__all__ = [
    "AttributionText",
    "ColorScale",
    "View",
    "clean_labels",
    "distinct_names",
    "draw_bars",
    "draw_heat_map",
    "draw_measures",
    "draw_path",
    "draw_removal_curves",
    "draw_shaded_text",
    "finished",
    "print_text",
    "relative_to_rows",
    "render_document",
    "render_side_by_side",
    "render_text",
    "render_view",
    "say_below",
    "short_layer_names",
    "sized_axes",
    "word_spans",
    "word_texts",
]
