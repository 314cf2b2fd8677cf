"""Inputs of the perturbation tests, Captum called as the oracle, and log p written out directly."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import combinations
from math import factorial
from types import SimpleNamespace
from typing import Any

import captum.attr
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from captum_llm_ext import LLMAttribution
from tests.models.families import VOCAB_SIZE, CausalToy, _randomise, tiny_tokenizer

ORACLE = {"forward_in_tokens": False, "use_cached_outputs": False}
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "feature_ablation": (captum.attr.FeatureAblation, {}),
    "shapley_sampling": (captum.attr.ShapleyValueSampling, {"n_samples": 3}),
    "shapley": (captum.attr.ShapleyValues, {}),
    "lime": (captum.attr.Lime, {"n_samples": 10}),
    "kernel_shap": (captum.attr.KernelShap, {"n_samples": 10}),
}
SEQUENCE_ALONE = ("lime", "kernel_shap")  # Captum gives no token rows for these

VALUES = ["Dave", "Palm Coast", "plays", "golf"]
KEYS = ["name", "place", "verb", "sport"]
OTHERS = ["He", "Tokyo in Japan", "is", "hiking"]
TEMPLATE = "{} lives in {} and {} {}"
KEYED_TEMPLATE = "{name} lives in {place} and {verb} {sport}"
SAMPLES = [OTHERS, ["Paris", "", "includes", "cooking with friends"]]


def keyed(values: Sequence[Any]) -> dict[str, Any]:
    return dict(zip(KEYS, values, strict=True))


def called(name: str, place: str, verb: str, sport: str) -> str:
    return f"{sport}: {name} {verb}, {{{place}}}"


def token_input(text: str, **settings: Any) -> Any:
    return captum.attr.TextTokenInput(text, tiny_tokenizer(), **settings)


def template_input(*arguments: Any, **settings: Any) -> Any:
    return captum.attr.TextTemplateInput(*arguments, **settings)


def image_input() -> Any:
    """Each column of the picture is a token, so that a text model can read it."""
    pixels = np.array([[40, 80, 120, 160, 200]] * 2, dtype=np.uint8)
    picture = Image.fromarray(np.stack([pixels] * 3, axis=-1))

    def processor(image: Image.Image) -> dict[str, Tensor]:
        columns = torch.tensor(np.array(image)[0, :, 0].astype(int))
        return {"input_ids": columns[None]}

    mask = torch.tensor([[0, 0, 1, 2, 2]] * 2, dtype=torch.int32)
    return captum.attr.ImageMaskInput(picture, mask, baseline=(9, 9, 9), processor_fn=processor)


INPUTS: dict[str, Callable[[], Any]] = {
    "token": lambda: token_input("Dave lives"),
    "token_skip": lambda: token_input("Dave lives in Palm", skip_tokens=["<s>", "Ġin"]),
    "token_baseline": lambda: token_input("Dave lives", baselines=17),
    "template_list": lambda: template_input(TEMPLATE, list(VALUES)),
    "template_dict": lambda: template_input(KEYED_TEMPLATE, keyed(VALUES)),
    "mask_list": lambda: template_input(TEMPLATE, list(VALUES), mask=[7, 3, 7, 1]),
    "mask_dict": lambda: template_input(
        KEYED_TEMPLATE, keyed(VALUES), baselines=keyed(OTHERS), mask=keyed([0, 1, 1, 2])
    ),
    "callable_template": lambda: template_input(called, keyed(VALUES)),
    "template_baselines": lambda: template_input(TEMPLATE, list(VALUES), list(OTHERS)),
    "callable_baselines": lambda: template_input(TEMPLATE, list(VALUES), lambda: list(OTHERS)),
    "product_baselines": lambda: template_input(
        KEYED_TEMPLATE,
        keyed(VALUES),
        captum.attr.ProductBaselines(
            {("name", "place"): [("He", "Tokyo in Japan")], "verb": ["is"], "sport": ["hiking"]}
        ),
    ),
    "image": image_input,
}


# --- both libraries ------------------------------------------------------------------------------


def seed_everything(seed: int = 0) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def captums(method: str, model: nn.Module, inp: Any, **kwargs: Any) -> Any:
    """Captum's numbers on the road that is right: one row, one pass, no cache."""
    return _attribute(captum.attr.LLMAttribution, method, model, inp, {**ORACLE, **kwargs})


def ours(method: str, model: nn.Module, inp: Any, **kwargs: Any) -> Any:
    return _attribute(LLMAttribution, method, model, inp, kwargs)


def _attribute(wrapper: Any, method: str, model: nn.Module, inp: Any, given: dict[str, Any]) -> Any:
    kind, arguments = METHODS[method]
    kwargs = {**arguments, **given}
    tokenizer = kwargs.pop("tokenizer", None) or tiny_tokenizer()
    attr_target = kwargs.pop("attr_target", "log_prob")
    seed_everything(kwargs.pop("seed", 0))
    return wrapper(kind(model), tokenizer, attr_target=attr_target).attribute(inp, **kwargs)


# --- log p of the model, without either library --------------------------------------------------


@torch.no_grad()
def scores(
    model: nn.Module,
    prompt: Sequence[int],
    target: Tensor,
    kind: str = "log_prob",
    contrast: Tensor | None = None,
) -> Tensor:
    """(1 + n_output,) sequence score and token scores, one plain forward for each token."""
    rows = [model(torch.tensor([[*prompt, *target[:t]]])).logits[0, -1] for t in range(len(target))]
    found = _scores_of(torch.stack(rows), target, kind)
    return found if contrast is None else found - _scores_of(torch.stack(rows), contrast, kind)


def _scores_of(logits: Tensor, ids: Tensor, kind: str) -> Tensor:
    place = torch.arange(len(ids))
    log_p = logits.double().log_softmax(-1)[place, ids]
    tokens = {"log_prob": log_p, "prob": log_p.exp(), "logit": logits.double()[place, ids]}[kind]
    sequence = log_p.sum().exp() if kind == "prob" else tokens.sum()
    return torch.cat([sequence[None], tokens])


Coalition = frozenset[int]
Game = Callable[[Coalition], Tensor]  # features that are there → scores (1 + n_output,)


def game(
    model: nn.Module, prompt_of: Callable[[Coalition], Sequence[int]], target: Tensor, **more: Any
) -> Game:
    """Scores by coalition, each computed once."""
    seen: dict[Coalition, Tensor] = {}

    def value(present: Coalition) -> Tensor:
        if present not in seen:
            seen[present] = scores(model, prompt_of(present), target, **more)
        return seen[present]

    return value


def nearest_by_hand(model: nn.Module, ids: list[int], rank: int) -> list[int]:
    matrix = model.get_input_embeddings().weight.detach().double().numpy()
    found = []
    for token in ids:
        cosine = matrix @ matrix[token]
        cosine = cosine / np.linalg.norm(matrix, axis=1) / np.linalg.norm(matrix[token])
        order = [i for i in np.argsort(-cosine).tolist() if i != token]
        found.append(order[rank - 1])
    return found


def replaced_tokens(
    ids: Sequence[int], absent: Sequence[int] | int
) -> Callable[[Coalition], list[int]]:
    """Prompt ids where each absent token has become its baseline."""
    others = [absent] * len(ids) if isinstance(absent, int) else absent
    return lambda present: [
        token if i in present else other
        for i, (token, other) in enumerate(zip(ids, others, strict=True))
    ]


def filled_template(
    template: str, values: Sequence[str], absent: Sequence[str], tokenizer: Any = None
) -> Callable[[Coalition], list[int]]:
    """Prompt ids of the template filled with values where present, with baselines elsewhere."""

    def prompt_of(present: Coalition) -> list[int]:
        chosen = [values[i] if i in present else absent[i] for i in range(len(values))]
        return list((tokenizer or tiny_tokenizer()).encode(template.format(*chosen)))

    return prompt_of


def ablation(value: Game, n_features: int) -> Tensor:
    """(1 + n_output, n_features): what the score loses without each feature."""
    everything = frozenset(range(n_features))
    columns = [value(everything) - value(everything - {i}) for i in range(n_features)]
    return torch.stack(columns, dim=1).float()


def shapley(value: Game, n_features: int) -> Tensor:
    """(1 + n_output, n_features): the definition of Shapley 1953, over all coalitions."""
    columns = []
    for feature in range(n_features):
        rest = [i for i in range(n_features) if i != feature]
        gains = [
            (value(frozenset({*some, feature})) - value(frozenset(some)))
            * (factorial(size) * factorial(n_features - size - 1) / factorial(n_features))
            for size in range(n_features)
            for some in combinations(rest, size)
        ]
        columns.append(torch.stack(gains).sum(0))
    return torch.stack(columns, dim=1).float()


def rows(result: Any) -> Tensor:
    """Sequence row and token rows, (1 + n_output, n_features), or (1, n_features) where alone."""
    sequence = result.seq_attr[None]
    return sequence if result.token_attr is None else torch.cat([sequence, result.token_attr])


SHORT = "Dave lives in"
ENTRIES = {
    "token": (lambda: token_input(SHORT, baselines=5), 5),
    "template": (lambda: template_input(TEMPLATE, list(VALUES), list(OTHERS)), 4),
    "emptied template": (lambda: template_input(TEMPLATE, list(VALUES)), 4),
}


def truth(entry: str, model: nn.Module, target: Tensor, **more: Any) -> Game:
    if entry == "token":
        return game(model, replaced_tokens(tiny_tokenizer().encode(SHORT), 5), target, **more)
    absent = OTHERS if entry == "template" else [""] * 4
    return game(model, filled_template(TEMPLATE, VALUES, absent), target, **more)


# --- models that ask for care --------------------------------------------------------------------


class WithoutCache(nn.Module):
    """A transformers model whose forward knows of ids and mask alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        output = self.model(input_ids, attention_mask=attention_mask, use_cache=False)
        return SimpleNamespace(logits=output.logits)


class IgnoresMask(CausalToy):
    """Takes an attention mask and never reads it: padding on the left would count as text."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        return super().forward(input_ids)


class OneRowOnly(CausalToy):
    """Refuses a batch, as exported and compiled models with fixed shapes do."""

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        if len(input_ids) != 1:
            raise ValueError(f"this model takes one row, got {len(input_ids)}")
        return super().forward(input_ids)


class SeesPicture(CausalToy):
    """Adds what it sees to every position: inputs other than ids must reach their own row."""

    def __init__(self) -> None:
        super().__init__()
        self.eye = nn.Linear(5, VOCAB_SIZE)
        _randomise(self)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
    ) -> SimpleNamespace:
        logits = super().forward(input_ids).logits
        if pixel_values is None:
            raise ValueError("no picture came")
        return SimpleNamespace(logits=logits + torch.sin(self.eye(pixel_values))[:, None])


class CountingToy(CausalToy):
    """Remembers the rows and calls that come to it."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, ...]] = []
        self.calls = 0

    def forward(self, ids: Tensor) -> SimpleNamespace:
        self.calls += 1
        self.rows += [tuple(row) for row in ids.tolist()]
        return super().forward(ids)
