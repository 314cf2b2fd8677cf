"""The referee's records as a summary of means and paired intervals, and the summary as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas
import torch

from tests.benchmarks.attributed import (
    ABLATION,
    BY_REMOVAL,
    BY_WORDS,
    FLOW,
    FROM_TEXT,
    SALIENCY,
    kinds,
)
from tests.benchmarks.pages import markdown

AREAS = ("deletion", "insertion")
DROPS = ("drop@1", "drop@3", "drop@5")
# What a method is compared with. Ablation is the one that takes tokens out as the judge does.
ABLATION_OF = {
    "pad": ABLATION,
    "removal": BY_REMOVAL,
    "common words": BY_WORDS,
}
SHORT = {"common words": "words"}
AIM = 0.9  # of ablation's deletion and insertion
Records = Sequence[Mapping[str, Any]]


def summary(attributed: Records, judged: Records, planted: Records) -> dict[str, Any]:
    """Means and intervals of the methods that have been judged on all prompts known so far."""
    frame, costs = pandas.DataFrame(judged), pandas.DataFrame(attributed)
    found: dict[str, Any] = {"methods": {}, "judged by": {}}
    for way, rows in frame.groupby("removed by", sort=False):
        counts = rows.groupby("method")["prompt"].nunique()
        whole = counts[counts == counts.max()].index
        rows = rows[rows["method"].isin(whole)]
        n_prompts = int(rows["prompt"].nunique())
        values = {m: _by_method(rows, f"{m} over random") for m in AREAS}
        plain = {m: _by_method(rows, m) for m in (*DROPS, "lds")}
        of_way = {}
        for label in whole:
            entry: dict[str, Any] = {m: interval(values[m][label]) for m in AREAS}
            entry |= {m: _mean(plain[m][label]) for m in plain}
            entry["less"] = {
                name: {m: interval(values[m][label] - values[m][other]) for m in AREAS}
                for name, other in references(str(way)).items()
                if other in whole and other != label
            }
            of_way[label] = entry
        found["judged by"][way] = {"n_prompts": n_prompts, "methods": of_way}
    hits = pandas.DataFrame(planted)
    for label, rows in costs.groupby("method"):
        cost = rows[["cpu_s", "rows", "backward_rows"]].mean().round(3).to_dict()
        ranks = hits[hits["method"] == label]["rank"].tolist() if len(hits) else []
        hit = [sum(rank == 1 for rank in ranks), len(ranks)] if ranks else None
        found["methods"][label] = {"kind": kinds().get(label), **cost, "hits": hit}
    return found


def references(way: str) -> dict[str, str]:
    return {"saliency": SALIENCY, "from a text": FROM_TEXT, "ablation": ABLATION_OF[way]}


def _by_method(rows: pandas.DataFrame, column: str) -> pandas.DataFrame:
    return rows.pivot(index="prompt", columns="method", values=column)


def _mean(values: pandas.Series) -> float | None:
    """Over the prompts that have a value; LDS has none where all features are one."""
    return round(float(values.mean()), 4) if values.notna().any() else None


def interval(values: pandas.Series) -> list[float]:
    """Mean, the ends of its 95 % bootstrap interval, and on how many prompts it is above 0 and
    below."""
    tensor = torch.tensor(values.to_numpy()).double()
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(tensor), (10_000, len(tensor)), generator=generator)
    ends = tensor[drawn].mean(1).quantile(torch.tensor([0.025, 0.975]).double())
    signs = [int((tensor > 1e-6).sum()), int((tensor < -1e-6).sum())]
    return [*(round(float(x), 3) for x in (tensor.mean(), *ends)), *signs]


# --- tables --------------------------------------------------------------------------------------


def page_text(found: Mapping[str, Any]) -> str:
    """The tables, and what the aims of the default missed, as the page has them."""
    parts = [_main_table(found), *filter(None, [_more_measures(found)])]
    for way, judged in found["judged by"].items():
        counts = f"Tokens taken out by {way}, {judged['n_prompts']} prompts"
        parts += [f"{counts}, differences on the same prompts:", _paired_table(way, judged)]
    return "\n\n".join([*parts, *aims(found), _facts(found["machine"])])


def _main_table(found: Mapping[str, Any]) -> str:
    columns = [f"{m}, {SHORT.get(way, way)}" for way in found["judged by"] for m in AREAS]
    lines = []
    for label in _in_order(found):
        cost = found["methods"][label]
        areas = [_cell(entry and entry[m][0]) for entry in _by_way(found, label) for m in AREAS]
        hits = f"{cost['hits'][0]}/{cost['hits'][1]}" if cost["hits"] else ""
        rows = f"{cost['rows']:.1f} ({round(cost['backward_rows'], 1):g})"
        lines.append([label, *areas, hits, rows, f"{cost['cpu_s']:.1f}"])
    return markdown(["method", *columns, "facts found", "rows", "CPU s"], lines)


def _more_measures(found: Mapping[str, Any]) -> str:
    """The measures that some method has."""
    columns = {
        f"{m.replace('lds', 'LDS')}, {SHORT.get(way, way)}": {
            label: _cell(entry[m]) for label, entry in judged["methods"].items()
        }
        for way, judged in found["judged by"].items()
        for m in (*DROPS, "lds")
    }
    columns = {name: cells for name, cells in columns.items() if any(cells.values())}
    if not columns:
        return ""
    lines = [[x, *(cells.get(x, "") for cells in columns.values())] for x in _in_order(found)]
    said = "Without the first features, and by random halves of them:"
    return f"{said}\n\n{markdown(['method', *columns], lines)}"


def _in_order(found: Mapping[str, Any]) -> list[str]:
    """All that were judged in some way, the largest sums of the means of areas first."""

    def mean(label: str) -> float:
        areas = [entry[m][0] for entry in _by_way(found, label) if entry for m in AREAS]
        return sum(areas) / len(areas)

    judged = {label for way in found["judged by"].values() for label in way["methods"]}
    return sorted(judged, key=mean, reverse=True)


def _by_way(found: Mapping[str, Any], label: str) -> list[Mapping[str, Any] | None]:
    return [judged["methods"].get(label) for judged in found["judged by"].values()]


def _paired_table(way: str, judged: Mapping[str, Any]) -> str:
    methods = judged["methods"]
    order = sorted(methods, key=lambda label: -sum(methods[label][m][0] for m in AREAS))
    columns = [f"{m}, less {name}'s" for name in references(way) for m in AREAS]
    lines = [
        [
            label,
            *(
                difference(methods[label]["less"].get(name, {}).get(m))
                for name in references(way)
                for m in AREAS
            ),
        ]
        for label in order
    ]
    columns = [column.replace("from a text's", "that of a text") for column in columns]
    return markdown(["method", *columns], lines)


def aims(found: Mapping[str, Any], label: str = FLOW) -> list[str]:
    """Sentences on each aim of the default method: what it has, and what it misses."""
    lines = []
    for way, judged in found["judged by"].items():
        methods = judged["methods"]
        ablation = methods.get(ABLATION_OF[way])
        if label not in methods or ablation is None:
            continue
        shares = {m: methods[label][m][0] / ablation[m][0] for m in AREAS}
        said = ", ".join(
            f"{m} {share:.0%} ({'met' if share >= AIM else f'misses {AIM - share:.0%}'})"
            for m, share in shares.items()
        )
        lines.append(f"- {label}, {way}: of {ABLATION_OF[way]} {said}.")
        for name in ("saliency", "from a text"):
            less = methods[label]["less"].get(name, {})
            said = ", ".join(f"{m} {difference(less[m])}" for m in less)
            if said:
                sure = all(less[m][1] > 0 for m in less)
                lines.append(
                    f"- {label}, {way}: ahead of {name} by {said}: {'met' if sure else 'missed'}."
                )
    own, other = (found["methods"].get(x, {}).get("hits") for x in (label, SALIENCY))
    if own and other and own[1] == other[1]:  # asked for the same facts
        met = "met" if own[0] >= other[0] else "missed"
        lines.append(
            f"- {label}, planted facts: {own[0]} of {own[1]} named first, by saliency "
            f"{other[0]} of {other[1]}: {met}."
        )
    return (
        ["What is aimed at for the default, and what it has:\n\n" + "\n".join(lines)]
        if lines
        else []
    )


def _facts(machine: Mapping[str, Any]) -> str:
    packages = ", ".join(f"{name} {machine[name]}" for name in ("captum", "torch", "transformers"))
    return (
        f"Float32, {machine['threads']} thread, {machine['processor']}, {machine['cores']} cores; "
        f"{packages}, Python {machine['python']}."
    )


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def difference(values: Sequence[float] | None) -> str:
    if not values:
        return ""
    mean, low, high, better, worse = values
    return f"{mean:+.2f} [{low:.2f},\N{NO-BREAK SPACE}{high:.2f}] ({better:.0f}:{worse:.0f})"
