"""Draws the figures of README and of the pages: `python docs/make_images.py [name …]`.

From the demo model, on one thread; without names all of them. "html" needs playwright and Chromium.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import torch
from matplotlib.transforms import Bbox

from captum_llm_ext import chat_input, explain, load_demo_model, segment_input

IMAGES = Path(__file__).parent / "images"
PROMPT, TARGET = "The capital of France is", " Paris"
QUESTION = "Anna sells bread. The train is late. Where does Anna work?"
REFEREE = Path(__file__).parents[1] / "tests/benchmarks/results/faithfulness_smollm2_held-out.json"
KINDS = {"gradient": "tab:blue", "perturbation": "tab:orange", "attention": "tab:green"}
PLACES = [(8, 0), (-8, 0), (0, 12), (0, -12), (8, 10), (-8, 10), (8, -10), (-8, -10)]
PLACES += [(x, y) for y in (22, -22, 34, -34, 46, -46) for x in (14, -14)]
LEADER = {"arrowstyle": "-", "color": "gray", "linewidth": 0.6}
BLOCKS = ["model.layers.[0-9]", "model.layers.[0-9][0-9]"]


def bakery(model: Any, tokenizer: Any) -> None:
    inp = chat_input([{"role": "user", "content": QUESTION}], tokenizer, by="word")
    _save(explain(model, tokenizer, inp).plot_token_attr(), "bakery")


def capital(model: Any, tokenizer: Any) -> None:
    _save(explain(model, tokenizer, PROMPT, TARGET, "saliency").plot_token_attr(), "capital")


def layers(model: Any, tokenizer: Any) -> None:
    found = explain(model, tokenizer, PROMPT, TARGET, "saliency", layers=BLOCKS)
    _save(found.plot_layer_attr(), "layers")  # type: ignore[attr-defined]


def path(model: Any, tokenizer: Any) -> None:
    options = {"quadrature": "adaptive", "baselines": "mean"}
    _save(explain(model, tokenizer, PROMPT, TARGET, "ig", **options).plot_path(), "path")


def words(model: Any, tokenizer: Any) -> None:
    prompt = "My sister is a nurse, and every morning she goes to the"
    inp = segment_input(prompt, by="word")
    found = explain(model, tokenizer, inp, " hospital", "ablation", contrast_target=" market")
    _save(found.plot_seq_attr(), "words")


def staircase(model: Any, tokenizer: Any) -> None:
    """Ablation of each token by token 0, which hides what stands before it, beside removal."""
    prompt = "My sister is a nurse, and every morning she goes to the"
    names = {0: "token 0 in its place", "remove": "the token left out"}
    figure, axes = plt.subplots(figsize=(8, 3))
    for i, (baseline, name) in enumerate(names.items()):
        found = explain(model, tokenizer, prompt, " hospital", "ablation", baselines=baseline)
        places = [place + 0.4 * i - 0.2 for place in range(len(found.input_tokens))]
        axes.bar(places, found.seq_attr.tolist(), width=0.4, label=name)
    axes.set_xticks(range(len(found.input_tokens)), found.merge("word").input_tokens)
    axes.tick_params(axis="x", rotation=45, length=0)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_ylabel('loss of log p(" hospital")')
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    _save((figure, axes), "staircase")


def which_method(model: Any, tokenizer: Any) -> None:
    """Cost and faithfulness of each method, from the referee's summary."""
    summary = json.loads(REFEREE.read_text())
    # The way that has judged most methods: means over other ways are not of the same methods.
    judge = max((way["methods"] for way in summary["judged by"].values()), key=len)
    figure, axes = plt.subplots(figsize=(9, 5.5))
    axes.set_xscale("log")
    points = {}
    for name in judge:
        cost = summary["methods"][name]
        areas = [judge[name][area][0] for area in ("deletion", "insertion")]
        points[name] = (cost["cpu_s"], sum(areas) / len(areas))
        axes.scatter(*points[name], s=45, color=KINDS[cost["kind"]], zorder=3)
    for kind, color in KINDS.items():
        axes.scatter([], [], s=45, color=color, label=kind)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.margins(x=0.12, y=0.1)
    axes.grid(alpha=0.25, which="major")
    axes.set_xticks([0.5, 1, 2, 5, 10, 20], ["0.5", "1", "2", "5", "10", "20"])
    axes.minorticks_off()
    axes.set_xlabel("CPU seconds per prompt")
    axes.set_ylabel("faithfulness: nats over random order")
    axes.legend(frameon=False, loc="upper right")
    axes.spines[["top", "right"]].set_visible(False)
    _name_points(axes, points)
    _save((figure, axes), "which_method")


def _name_points(axes: Any, points: dict[str, tuple[float, float]]) -> None:
    """A name beside each point, at the first place that no other name or point has."""
    figure = axes.figure
    figure.canvas.draw()
    at = {name: axes.transData.transform(point) for name, point in points.items()}
    taken = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in at.values()]
    taken.append(axes.get_legend().get_window_extent())
    for name in sorted(points, key=lambda name: -points[name][1]):
        for x, y in PLACES:
            align = "left" if x > 0 else "right" if x < 0 else "center"
            text = axes.annotate(
                name, points[name], (x, y), textcoords="offset points", ha=align, va="center"
            )
            text.set_fontsize(9)
            box = text.get_window_extent()
            inside = axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1
            if inside and not any(box.overlaps(other) for other in taken):
                break
            text.remove()
        else:
            raise ValueError(f"no place is left for the name {name!r}: make the figure larger")
        if abs(y) > 14:
            axes.annotate(
                "", points[name], (x, y), textcoords="offset points", arrowprops=LEADER, zorder=1
            )
        taken.append(box)


def html(model: Any, tokenizer: Any) -> None:
    """The page of a result, with the output token "golf" clicked on."""
    from playwright.sync_api import sync_playwright

    prompt = "Dave lives in Palm Coast, FL and is a lawyer. His personal interests include"
    target = " playing golf, hiking, and spending time with his family and friends."
    whole = explain(model, tokenizer, prompt, target, "ablation").to_html(merge="word")
    browsers = map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=next(filter(None, browsers), None))
        page = browser.new_page(viewport={"width": 720, "height": 300}, device_scale_factor=1.5)
        page.set_content(whole)
        page.locator(".outputs > span").nth(2).click()  # after "whole output"
        page.locator("body").screenshot(path=str(IMAGES / "html.png"))
        browser.close()


def _save(drawn: Any, name: str) -> None:
    figure, _ = drawn
    metadata = {"Software": None}  # the same bytes from every version of matplotlib's writer
    figure.savefig(IMAGES / f"{name}.png", bbox_inches="tight", dpi=80, metadata=metadata)


FIGURES: dict[str, Callable[[Any, Any], None]] = {
    figure.__name__: figure
    for figure in (bakery, capital, layers, path, words, staircase, which_method, html)
}


def main(names: list[str]) -> None:
    unknown = set(names) - set(FIGURES)
    if unknown:
        raise SystemExit(f"expected names of figures: {', '.join(FIGURES)}; got {unknown}")
    matplotlib.use("Agg")
    torch.set_num_threads(1)
    model, tokenizer = load_demo_model()
    for name in names or FIGURES:
        FIGURES[name](model, tokenizer)


if __name__ == "__main__":
    main(sys.argv[1:])
