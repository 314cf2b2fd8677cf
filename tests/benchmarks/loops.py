"""One call against the loop that anyone would write by hand, on the small real model.

`python -m tests.benchmarks.loops` prints a table and writes results/loops.json. One thread, CPU
seconds, both in the same process, alternating, medians. The loops stand here, so that a reader can
judge them. A first call is one on a model that no call has seen: the package asks such a model
whether it is causal, and remembers the answer.
"""

from __future__ import annotations

import copy
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import captum.attr
import torch
from captum.attr import FeatureAblation, LayerGradientXActivation, LayerIntegratedGradients
from torch import Tensor

import captum_llm_ext
from captum_llm_ext import LayerSaliency, TextTokenInput, load_demo_model
from captum_llm_ext.model.lock import only_one_call
from tests.benchmarks.gradients import PROMPT, STEPS, TARGET
from tests.benchmarks.measure import cpu_seconds, print_table, write_results

SHORT = "The capital of France is"
LONG = " ".join([PROMPT + " golf, hiking and his family. He has lived there for ten years."] * 11)
REPEATS = 5
HELD = 100  # times
Work = Callable[[], Any]


class Task:
    """A model with the ids of a prompt (1, n_prompt) and a target (n_output,)."""

    def __init__(self, model: Any, tokenizer: Any, prompt: str, target: str) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.inp = TextTokenInput(prompt, tokenizer)
        self.prompt = self.inp.inp_tensor
        self.target = torch.tensor(tokenizer.encode(target, add_special_tokens=False))

    @property
    def row(self) -> Tensor:
        """The ids that score the target: all but its last."""
        return torch.cat([self.prompt, self.target[None, :-1]], 1)

    @property
    def size(self) -> str:
        return f"{self.prompt.size(1)} + {len(self.target)} tokens"

    def scores(self, ids: Tensor) -> Tensor:
        """Log probability (rows,) of the target after rows of ids, in the fewest logits."""
        kept = {"logits_to_keep": len(self.target), "use_cache": False}
        logits = self.model(ids, **kept).logits
        target = self.target.expand(len(ids), -1)[..., None]
        return logits.log_softmax(-1).gather(-1, target)[..., 0].sum(-1)

    # --- by hand ---------------------------------------------------------------------------------

    def gradient_by_hand(self) -> tuple[Tensor, Tensor]:
        """Embeddings, one forward, one backward."""
        embeddings = self.model.get_input_embeddings()(self.row).detach().requires_grad_()
        kept = {"logits_to_keep": len(self.target), "use_cache": False}
        logits = self.model(inputs_embeds=embeddings, **kept).logits[0]
        score = logits.log_softmax(-1).gather(-1, self.target[:, None]).sum()
        (gradient,) = torch.autograd.grad(score, embeddings)
        return embeddings.detach(), gradient

    def saliency_by_hand(self) -> Tensor:
        _, gradient = self.gradient_by_hand()
        return gradient[0, : self.prompt.size(1)].abs().sum(-1)

    def gradient_x_activation_by_hand(self) -> Tensor:
        embeddings, gradient = self.gradient_by_hand()
        return (embeddings * gradient)[0, : self.prompt.size(1)].sum(-1)

    def integrated_gradients_by_hand(self) -> Tensor:
        """Captum's core class, with a function of the sequence score."""
        baseline = self.row.clone()
        baseline[:, : self.prompt.size(1)] = 0
        method = captum.attr.LayerIntegratedGradients(
            self.scores, self.model.get_input_embeddings()
        )
        attr = method.attribute(self.row, baseline, n_steps=STEPS)
        return attr[0, : self.prompt.size(1)].sum(-1)

    def ablation_by_hand(self) -> Tensor:
        """Captum's core class, all prompts in one batch."""
        n_prompt, fed = self.prompt.size(1), self.target[:-1]

        def of_prompts(prompts: Tensor) -> Tensor:
            return self.scores(torch.cat([prompts, fed.expand(len(prompts), -1)], 1))

        with torch.no_grad():
            method = captum.attr.FeatureAblation(of_prompts)
            return method.attribute(self.prompt, 0, perturbations_per_eval=n_prompt + 1)[0]

    # --- by this package -------------------------------------------------------------------------

    def gradients(self, kind: Any, wrapper: Any = None, **options: Any) -> Any:
        method = kind(self.model, self.model.get_input_embeddings())
        wrapper = wrapper or captum_llm_ext.LLMGradientAttribution
        return wrapper(method, self.tokenizer).attribute(self.inp, self.target, **options)

    def of_sequence(self, kind: Any, **options: Any) -> Tensor:
        return self.gradients(kind, include_per_token_attr=False, **options).seq_attr

    def ablation(self) -> Tensor:
        wrapper = captum_llm_ext.LLMAttribution(FeatureAblation(self.model), self.tokenizer)
        return wrapper.attribute(self.inp, self.target).seq_attr


def alternating(ours: Work, theirs: Work, before: Work = lambda: None) -> list[float]:
    """Median CPU seconds of both, called alternately, and the median of the ratios pair by pair.

    before: what is done before each call of ours, and not timed.
    """
    pairs = []
    for _ in range(REPEATS):
        before()
        pairs.append((cpu_seconds(ours), cpu_seconds(theirs)))
    ratios = (a / b for a, b in pairs)
    return [
        *(statistics.median(side) for side in zip(*pairs, strict=True)),
        statistics.median(ratios),
    ]


def row(what: str, bar: float, figures: list[float], faster: bool = False) -> dict[str, Any]:
    print(f"{what}: {figures}", flush=True)
    ours, theirs, ratio = figures
    ratio = 1 / ratio if faster else ratio
    return {
        "what": what,
        "ours": f"{ours:.3f} s",
        "captum": f"{theirs:.3f} s",
        "ratio": ratio,
        "bar": f"{'>=' if faster else '<='} {bar:g}",
        "met": ratio >= bar if faster else ratio <= bar,
    }


def first_and_second(task: Task, name: str, kind: Any, by_hand: Work) -> list[dict[str, Any]]:
    """Rows of one method: a call on a model that is new, and on one that was seen."""

    def ours() -> Tensor:
        return task.of_sequence(kind)

    def renewed() -> None:
        task.model = copy.copy(task.model)  # another model, which shares the weights

    agree(name, ours(), by_hand())
    return [
        row(f"{name}, {task.size}, second call", 1.15, alternating(ours, by_hand)),
        row(f"{name}, {task.size}, first call", 1.6, alternating(ours, by_hand, renewed)),
    ]


def hold_often(model: Any) -> None:
    """What the lock does in each call, so that other threads wait."""
    for _ in range(HELD):
        with only_one_call(model):
            pass


def agree(name: str, ours: Tensor, theirs: Tensor) -> None:
    difference = float((ours.flatten() - theirs.flatten()).abs().max() / theirs.abs().max())
    print(f"{name}: largest difference {difference:.0e} of the maximum", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model, tokenizer = load_demo_model()
    tasks = [
        Task(model, tokenizer, *x) for x in ((SHORT, " Paris"), (PROMPT, TARGET), (LONG, TARGET))
    ]
    rows: list[dict[str, Any]] = []
    for task in tasks:
        rows += first_and_second(task, "saliency", LayerSaliency, task.saliency_by_hand)
        kind, by_hand = LayerGradientXActivation, task.gradient_x_activation_by_hand
        rows += first_and_second(task, "gradient x activation", kind, by_hand)
    task = tasks[1]
    kind, steps = LayerIntegratedGradients, {"n_steps": STEPS}

    def integrated() -> Tensor:
        return task.of_sequence(kind, **steps)

    agree("integrated gradients", integrated(), task.integrated_gradients_by_hand())
    figures = alternating(integrated, task.integrated_gradients_by_hand)
    rows.append(row(f"integrated gradients, {STEPS} steps, sequence; core class", 1.05, figures))
    figures = alternating(
        lambda: task.gradients(kind, **steps),
        lambda: task.gradients(kind, captum.attr.LLMGradientAttribution, **steps),
    )
    rows.append(row(f"integrated gradients, {STEPS} steps, per token; wrapper", 2.2, figures, True))
    held = cpu_seconds(lambda: hold_often(model)) / HELD
    print(f"to hold the model for one thread costs a call {1000 * held:.2f} ms")
    agree("ablation", task.ablation(), task.ablation_by_hand())
    figures = alternating(task.ablation, task.ablation_by_hand)
    rows.append(row("ablation, per token; core class, one batch", 1.05, figures))
    print_table(rows, "by hand")
    print(f"written: {write_results('loops', rows)}")


if __name__ == "__main__":
    main()
