"""Reference integrals for the convergence benchmark: the cases, and two rules that must agree.

`python -m tests.benchmarks.integrals` makes those that `references/` lacks (about a minute each):
by adaptive quadrature with a fifth of the tolerance, and by a Gauss-Legendre rule of two points on
the halves of its intervals, written here with plain autograd. The two must agree within 3 %.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_llm_ext import (
    LayerIntegratedGradients,
    LLMGradientAttribution,
    TextTokenInput,
    chat_input,
    load_demo_model,
)

CASES = {
    "capital": ("The capital of France is", " Paris"),
    "nurse": ("My sister is a nurse, and every morning she goes to the", " hospital"),
    "lawyer": (
        "Dave lives in Palm Coast, FL and is a lawyer. His personal interests include",
        " playing golf",
    ),
    "german": ("Der Himmel ist blau und das Gras ist", " grün"),
    "code": ("def add(a, b):\n    return a +", " b"),
    "chat": ([{"role": "user", "content": "Name a fruit that is yellow."}], "A yellow fruit is"),
    "water": ("Water boils at a temperature of 100 degrees", " Celsius"),
    "farm": ("Old MacDonald had a farm, and on that farm he had a", " cow"),
}
BASELINES = {"id 0": 0, "pad": "pad", "mean": "mean"}
SENTENCE = (
    "It was one of those days on which one thing came after another and nothing much was said about"
    " any of it by anyone"
)
TOLERANCE, BUDGET = 0.05, 1000  # the defaults of method="adaptive"
FOLDER = Path(__file__).parent / "references"
ROWS = 24


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model, tokenizer = load_demo_model()
    for name, baseline in pairs():
        make_reference(model, tokenizer, name, baseline)


def pairs() -> Iterator[tuple[str, str]]:
    return ((name, baseline) for baseline in ("mean", "pad", "id 0") for name in CASES)


def reference_file(name: str, baseline: str) -> Path:
    return FOLDER / f"{name}-{baseline.replace(' ', '')}.json"


def reference(name: str, baseline: str) -> Tensor:
    """The sequence attribution (n_input,), as the mean of both rules."""
    kept = json.loads(reference_file(name, baseline).read_text())
    return (torch.tensor(kept["adaptive"]) + torch.tensor(kept["mesh"])) / 2


def attribute(model: Any, tokenizer: Any, name: str, baseline: Any, **options: Any) -> Any:
    """The case's input, and its integrated gradients at the embeddings."""
    prompt, target = CASES[name]
    as_input = TextTokenInput if isinstance(prompt, str) else chat_input
    inp = as_input(prompt, tokenizer)
    method = LayerIntegratedGradients(model, model.get_input_embeddings())
    return inp, LLMGradientAttribution(method, tokenizer).attribute(
        inp, target=target, baselines=BASELINES.get(baseline, baseline), **options
    )


def make_reference(model: Any, tokenizer: Any, name: str, baseline: str) -> None:
    file = reference_file(name, baseline)
    if file.exists():
        return
    options = {"tol": TOLERANCE / 5, "max_rows": 4 * BUDGET, "include_per_token_attr": False}
    inp, result = attribute(model, tokenizer, name, baseline, method="adaptive", **options)
    path = EmbeddingPath(model, tokenizer, inp, name, baseline)
    edges = halved_mesh(result.score_path[0])
    for nodes in (2, 4):
        tokens = path.integral(edges, nodes)
        other = tokens.sum(0)
        difference = float((result.seq_attr - other).norm() / result.seq_attr.norm())
        if difference <= 0.03:
            break
    kept = {
        "adaptive": result.seq_attr.tolist(),
        "adaptive_rows": result.n_evaluations,
        "adaptive_delta": float(result.convergence_delta),
        "mesh": other.tolist(),
        "mesh_tokens": tokens.tolist(),
        "mesh_rows": nodes * (len(edges) - 1),
        "relative_difference": round(difference, 5),
        "score_difference": path.ends[1] - path.ends[0],
    }
    FOLDER.mkdir(exist_ok=True)
    file.write_text(json.dumps(kept, indent=1) + "\n")
    print(file.stem, {k: v for k, v in kept.items() if not isinstance(v, list)}, flush=True)


class EmbeddingPath:
    """The straight path of the embeddings, with plain autograd and a hook."""

    def __init__(self, model: Any, tokenizer: Any, inp: Any, name: str, baseline: str) -> None:
        self.model = model
        target = tokenizer(CASES[name][1], add_special_tokens=False, return_tensors="pt").input_ids
        prompt = inp.inp_tensor
        self.target, self.ids = target[0], torch.cat([prompt, target[:, :-1]], 1)
        moved = torch.zeros(self.ids.size(1), dtype=torch.bool)
        moved[: prompt.size(1)] = True if inp.itp_mask is None else inp.itp_mask[0]
        embed = model.get_input_embeddings()
        with torch.no_grad():
            self.end = embed(self.ids)
            mean = embed.weight.mean(0)
            ids = {"id 0": 0, "pad": tokenizer.pad_token_id}
            absent = mean if baseline == "mean" else embed.weight[ids[baseline]]
            self.start = torch.where(moved[:, None], absent, self.end)
        self.columns = moved.nonzero().flatten()
        self.ends = self.scores(torch.tensor([0.0, 1.0])).tolist()

    def _score(self, embeddings: Tensor) -> Tensor:
        embed = self.model.get_input_embeddings()
        hook = embed.register_forward_hook(lambda *_: embeddings)
        try:
            ids = self.ids.expand(len(embeddings), -1)
            logits = self.model(ids, use_cache=False, logits_to_keep=len(self.target)).logits
        finally:
            hook.remove()
        places = torch.arange(len(self.target))
        return logits.log_softmax(-1)[:, places, self.target]

    def _points(self, alphas: Tensor) -> Tensor:
        return self.start + alphas[:, None, None].float() * (self.end - self.start)

    @torch.no_grad()
    def scores(self, alphas: Tensor) -> Tensor:
        return self._score(self._points(alphas)).sum(1)

    def integral(self, edges: np.ndarray, count: int) -> Tensor:
        """(n_output, n_input): the attributions of each target token."""
        nodes, weights = np.polynomial.legendre.leggauss(count)
        half = np.diff(edges)[:, None] / 2
        points = (edges[:-1, None] + half * (1 + nodes)).ravel()
        shares = (half * weights).ravel()
        total = torch.zeros(len(self.target), *self.end[0].shape, dtype=torch.float64)
        for alphas, share in zip(_chunks(points), _chunks(shares), strict=True):
            leaf = self._points(alphas).requires_grad_()
            for row, score in zip(total, self._score(leaf).sum(0), strict=True):
                (gradient,) = torch.autograd.grad(score, leaf, retain_graph=True)
                row += (gradient.double() * share[:, None, None]).sum(0)
        found = (total * (self.end - self.start)[0]).sum(-1)
        return found[:, self.columns].float()


def halved_mesh(points: Tensor) -> np.ndarray:
    """The halves of the intervals that adaptive quadrature ended with.

    It halves from eighths on, so its edges and middles are the multiples of a power of two.
    """
    exact = points.double().numpy() * 2**20
    return exact[exact == np.round(exact)] / 2**20


def _chunks(values: np.ndarray) -> list[Tensor]:
    return list(torch.from_numpy(values).split(ROWS))


if __name__ == "__main__":
    main()
