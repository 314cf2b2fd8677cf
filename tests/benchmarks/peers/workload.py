"""The work that every library is given and how it is measured: torch and transformers alone.

A library's script has a table of works, each a function from a `Question` to a `Run`. `main` runs
each in a process of its own: CPU seconds, peak memory, and the forward and backward pass of the
same process to measure them by.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import json
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.benchmarks.measure import cpu_seconds, peak_above_now

BASELINE_ID = 0  # what Captum's TextTokenInput starts from by default
LAWYER = (
    "Dave lives in Palm Coast, FL and is a lawyer. His personal interests include",
    " playing golf, hiking, and spending time with his family and friends.",
)
CAPITAL = ("The capital of France is", " Paris")
# Prompt, target and steps of each work.
QUESTIONS: dict[str, tuple[tuple[str, str], int]] = {
    "error": (CAPITAL, 50),
    "tokens": (LAWYER, 10),
    "sequence": (LAWYER, 10),
    "layers": (LAWYER, 1),
    "ablation": (LAWYER, 1),
}
PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp")
# One layer at a time takes minutes: the middle block stands for all, as cost is linear in depth.
SAMPLED_BLOCKS = (14,)
LONG_S = 5.0  # works that take longer are run once, others three times


@dataclass(frozen=True)
class Question:
    """A model and what is asked of it."""

    model: Any
    tokenizer: Any
    prompt: str
    target: str
    n_steps: int

    @property
    def prompt_ids(self) -> Tensor:
        """(n_input,)"""
        return torch.tensor(self.tokenizer.encode(self.prompt))

    @property
    def target_ids(self) -> Tensor:
        """(n_output,)"""
        return torch.tensor(self.tokenizer.encode(self.target, add_special_tokens=False))

    @property
    def fed_ids(self) -> Tensor:
        """(1, n_input + n_output − 1): all that the scores depend on."""
        return torch.cat([self.prompt_ids, self.target_ids[:-1]])[None]

    @property
    def embedding(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def scores(self, logits: Tensor) -> Tensor:
        """Logits (rows, length, vocabulary) → log p of the target tokens (rows, n_output)."""
        logits = logits[:, -len(self.target_ids) :].log_softmax(-1)
        return logits.gather(-1, self.target_ids.expand(len(logits), -1)[..., None])[..., 0]

    def layer_names(self, blocks: tuple[int, ...] | None = None) -> list[str]:
        """q, k, v and mlp of these blocks, or of all blocks with the embeddings before them."""
        if blocks is not None:
            return [f"model.layers.{block}.{part}" for block in blocks for part in PARTS]
        every = tuple(range(self.model.config.num_hidden_layers))
        return ["model.embed_tokens", *self.layer_names(every)]

    def layers(self, blocks: tuple[int, ...] | None = None) -> list[nn.Module]:
        return [self.model.get_submodule(name) for name in self.layer_names(blocks)]


@dataclass(frozen=True)
class Run:
    """A call, and the attributions (n_output or 1, n_input) in what it returns.

    settings: in words, for the table. scale: times the call's cost makes the cost of the work.
    stated: the error of the sum of attributions that the library itself states, where it does.
    """

    settings: str
    call: Callable[[], Any]
    attributions: Callable[[Any], Tensor]
    scale: float = 1.0
    stated: Callable[[Any], float] | None = None


Works = dict[str, Callable[[Question], Run]]


def load(folder: str) -> tuple[Any, Any]:
    """Weights that need no gradients: the best setting for every library here."""
    with contextlib.redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    return model.eval().requires_grad_(False), tokenizer


def forward_backward_seconds(question: Question, repeats: int = 3) -> float:
    """CPU seconds of one forward and one backward pass to the embeddings, without a library."""

    def once() -> None:
        embeds = question.embedding(question.fed_ids).detach().requires_grad_()
        scores = question.scores(question.model(inputs_embeds=embeds).logits)
        torch.autograd.grad(scores.sum(), embeds)

    once()
    return statistics.median(cpu_seconds(once) for _ in range(repeats))


def give_back_memory() -> None:
    """What was freed but kept for reuse would hide the memory that the next call takes (glibc)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def measure(question: Question, run: Run) -> dict[str, Any]:
    """Cost, attributions and settings of one work, or the error that the library gives."""
    before = forward_backward_seconds(question)
    seconds: list[float] = []
    kept: list[Any] = []

    def timed() -> None:
        kept.clear()
        seconds.append(cpu_seconds(lambda: kept.append(run.call())))

    give_back_memory()
    try:
        memory = peak_above_now(timed)
        while seconds[0] < LONG_S and len(seconds) < 3:
            timed()
    except Exception as error:
        line = (str(error).strip() or "(no message)").splitlines()[0]
        return {"settings": run.settings, "error": f"{type(error).__name__}: {line}"}
    unit = (before + forward_backward_seconds(question)) / 2
    cpu = statistics.median(seconds) * run.scale
    return {
        "settings": run.settings,
        "cpu_s": cpu,
        "unit_s": unit,
        "units": cpu / unit,
        "runs": len(seconds),
        "scale": run.scale,
        "peak_mb": memory,
        "stated": None if run.stated is None else run.stated(kept[0]),
        "attributions": run.attributions(kept[0]).detach().tolist(),
    }


def main(works: Works, packages: tuple[str, ...] = ()) -> None:
    """`python -m … FOLDER OUT` runs every work, `… FOLDER OUT WORK` one; OUT is a JSON file."""
    folder, out, *chosen = sys.argv[1:]
    if chosen:
        found: Any = one(works, folder, chosen[0])
    else:
        rows = {name: in_own_process(folder, name) for name in works}
        names = ("torch", "transformers", *packages)
        found = {"versions": {name: version(name) for name in names}, "rows": rows}
    Path(out).write_text(json.dumps(found))


def one(works: Works, folder: str, name: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    (prompt, target), n_steps = QUESTIONS[name.partition("/")[0]]
    question = Question(*load(folder), prompt, target, n_steps)
    return measure(question, works[name](question))


def in_own_process(folder: str, name: str) -> Any:
    with tempfile.TemporaryDirectory() as work:
        out = Path(work) / "row.json"
        module = sys.modules["__main__"].__spec__.name
        subprocess.run([sys.executable, "-m", module, folder, str(out), name], check=True)
        return json.loads(out.read_text())
