"""Templates in pieces, so that a test knows where each value is without asking the package."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import product
from typing import Any

import captum.attr
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from captum_llm_ext import TextTemplateInput
from tests.models.families import CORPUS, CausalToy, layer_names, tiny_model, tiny_tokenizer
from tests.oracles.cases import STEPS, our_attribution, target_ids
from tests.oracles.gradients import Problem, gradient_x_activation

VALUE = None  # stands for the next value among the pieces of a frame
Frame = tuple[str | None, ...]

# Values and texts are whole words with the space before them: the tiny tokenizer never merges them.
FRAME: Frame = (VALUE, " lives in", VALUE, " and", VALUE)
VALUES = ["Dave", " Palm Coast", " plays golf"]
SAME_LENGTH = ["The", " Tokyo", " cooking with"]  # 1, 2 and 3 tokens, like the values
OTHER_LENGTH = ["His", " the capital of Japan", " is"]
KEYS = ["name", "place", "sport"]


def keyed(items: Sequence[Any]) -> dict[str, Any]:
    return dict(zip(KEYS, items, strict=True))


def filled(frame: Frame, values: Sequence[str]) -> str:
    return "".join(text for text, _ in pieces(frame, values))


def pieces(frame: Frame, values: Sequence[str]) -> list[tuple[str, int]]:
    """The text of each piece and the number of its value, -1 for the template's own text."""
    parts, number = [], 0
    for piece in frame:
        parts.append((values[number], number) if piece is VALUE else (piece, -1))
        number += piece is VALUE
    return parts


def template_of(frame: Frame, keys: Sequence[str] | None = None) -> str:
    """The frame as a string for `str.format`."""
    names = iter(keys or [""] * len(frame))
    return "".join(
        "{" + next(names) + "}" if piece is VALUE else piece.replace("{", "{{").replace("}", "}}")
        for piece in frame
    )


def template_input(baselines: Any = None, form: str = "list", **settings: Any) -> Any:
    """FRAME with VALUES, as a string with a list, with a dict, or as a function of either."""
    if form == "list":
        return TextTemplateInput(template_of(FRAME), list(VALUES), baselines, **settings)
    if form == "callable":

        def joined(*values: str) -> str:
            return filled(FRAME, values)

        return TextTemplateInput(joined, list(VALUES), baselines, **settings)
    settings = {k: keyed(v) if isinstance(v, list) else v for k, v in settings.items()}
    baselines = keyed(baselines) if isinstance(baselines, list) else baselines
    if form == "dict":
        return TextTemplateInput(template_of(FRAME, KEYS), keyed(VALUES), baselines, **settings)

    def called(name: str, place: str, sport: str) -> str:
        return filled(FRAME, [name, place, sport])

    return TextTemplateInput(called, keyed(VALUES), baselines, **settings)


FORMS = ("list", "dict", "callable", "callable_dict")


# --- where the tokens of each value are ----------------------------------------------------------


def unmerged(values: Sequence[str], frame: Frame = FRAME) -> tuple[Tensor, Tensor]:
    """Prompt ids (n,) and the value of each (n,); each piece is tokenised by itself."""
    tokenizer = tiny_tokenizer()
    ids, value_of = [tokenizer.bos_token_id], [-1]
    for text, number in pieces(frame, values):
        tokens = tokenizer.encode(text, add_special_tokens=False)
        ids += tokens
        value_of += [number] * len(tokens)
    assert ids == tokenizer.encode(filled(frame, values)), "the tokenizer merges these pieces"
    return torch.tensor(ids), torch.tensor(value_of)


def by_majority(parts: Sequence[tuple[str, int]], tokenizer: Any) -> tuple[Tensor, list[Tensor]]:
    """Prompt ids (n,) and the value that holds most characters of each (n,), by its offsets.

    A token may lie half in one value and half in another. Either is right then, and every choice
    is listed. A value comes before the template. A value that would have no token takes the
    template's token with most of its characters, and has none where there is no such token.
    """
    value_at = [number for text, number in parts for _ in text]
    encoded = tokenizer("".join(text for text, _ in parts), return_offsets_mapping=True)
    candidates = [_most_frequent(value_at[a:b]) for a, b in encoded["offset_mapping"]]
    choices = [torch.tensor(choice) for choice in product(*candidates)]
    for choice in choices:
        for missing in sorted(set(value_at) - {-1} - set(choice.tolist())):
            shares = [value_at[a:b].count(missing) for a, b in encoded["offset_mapping"]]
            best = shares.index(max(shares))
            if choice[best] == -1:
                choice[best] = missing
    return torch.tensor(encoded["input_ids"]), choices


def _most_frequent(values: Sequence[int]) -> list[int]:
    counts = Counter(values)
    most = [value for value, count in counts.items() if count == max(counts.values())]
    return [value for value in most if value >= 0] or [-1]


def columns(positions: Tensor, value_of: Tensor, n_values: int) -> Tensor:
    """(T, width) → (T, n_values): the sum over the positions of each value."""
    picked = torch.stack([value_of == i for i in range(n_values)], dim=1)
    return positions[:, : len(value_of)] @ picked.to(positions)


@cache
def merging_tokenizer(vocab_size: int = 700) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose tokens run across spaces and words, and which adds no token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([f" {text}" for text in CORPUS] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")


@cache
def wide_toy() -> CausalToy:
    """A toy for the vocabulary of either tokenizer."""
    return CausalToy(vocab_size=700)


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def chat_pieces(
    messages: Sequence[Mapping[str, str]], roles: Sequence[str], beginning: str = "<s>"
) -> list[tuple[str, int]]:
    """The chat as CHAT_TEMPLATE renders it, with the whole messages of the roles as values."""
    parts, number = [(beginning, -1)], 0
    for message in messages:
        is_value = message["role"] in roles
        parts += [
            (f"<|{message['role']}|>\n", -1),
            (message["content"], number if is_value else -1),
            ("</s>\n", -1),
        ]
        number += is_value
    return [*parts, ("<|assistant|>\n", -1)]


@cache
def chat_tokenizer(adds_beginning: bool = True, writes_beginning: bool = True) -> Any:
    """The tiny tokenizer for chats, where the tokenizer, the template, both or none add "<s>"."""
    tokenizer = copy.deepcopy(tiny_tokenizer())
    if not adds_beginning:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    start = 0 if writes_beginning else len("{{ bos_token }}")
    tokenizer.chat_template = CHAT_TEMPLATE[start:]
    return tokenizer


# --- oracles -------------------------------------------------------------------------------------


def template_problem(
    family: str, layer_kind: str, count: int, **more: Any
) -> tuple[Problem, Tensor]:
    """The prompt with the values, its baseline with SAME_LENGTH, and the value of each position."""
    model = tiny_model(family)
    layer = model.get_submodule(layer_names(family)[layer_kind])
    prompt, value_of = unmerged(VALUES)
    absent, _ = unmerged(SAME_LENGTH)
    return Problem(model, [layer], prompt, target_ids(count), baseline=absent, **more), value_of


def captum_columns(
    model: nn.Module,
    layer: nn.Module,
    target: Tensor,
    start: Sequence[str] = SAME_LENGTH,
    n_steps: int = STEPS,
) -> Tensor:
    """(T, n_values): Captum's LayerIntegratedGradients from one tensor of ids to the other."""
    (prompt, value_of), (absent, absent_of) = unmerged(VALUES), unmerged(start)
    assert torch.equal(value_of, absent_of), "the baselines have other numbers of tokens"
    rows = []
    for t, token in enumerate(target):
        method = captum.attr.LayerIntegratedGradients(_scorer(model, int(token)), layer)
        ids, base = (torch.cat([part, target[:t]])[None] for part in (prompt, absent))
        rows.append(method.attribute(ids, base, n_steps=n_steps)[0, : len(prompt)].sum(-1))
    return columns(torch.stack(rows), value_of, len(VALUES))


def _scorer(model: nn.Module, token: int) -> Any:
    return lambda ids: model(ids).logits[:, -1].log_softmax(-1)[:, token]


def embedding_of(family: str) -> nn.Module:
    return tiny_model(family).get_submodule(layer_names(family)["embedding"])


def start_embeddings(
    family: str, baselines: Sequence[str], neutral: Tensor, values: Sequence[str] = VALUES
) -> Tensor:
    """(n, hidden): where a path starts by the rule of the design, one value after another."""
    embedding = embedding_of(family)
    ids, value_of = unmerged(values)
    with torch.no_grad():
        rows = embedding(ids[None])[0].clone()
        for i, text in enumerate(baselines):
            tokens = tiny_tokenizer().encode(text, add_special_tokens=False)
            count = int((value_of == i).sum())
            if not tokens:
                rows[value_of == i] = neutral
                continue
            absent = embedding(torch.tensor([tokens]))[0]
            rows[value_of == i] = absent if len(tokens) == count else absent.mean(0)
    return rows


def mean_embedding(family: str) -> Tensor:
    embedding = embedding_of(family)
    with torch.no_grad():
        return embedding(torch.arange(len(embedding.weight))[None])[0].mean(0)


def expected_by_gradient(
    model: CausalToy, prompt: Tensor, value_of: Tensor, target: Tensor, n_values: int
) -> Tensor:
    """(T, n_values): gradient times embedding, summed over the positions of each value."""
    positions = gradient_x_activation(Problem(model, [model.embedding], prompt, target))[0].sum(-1)
    return columns(positions, value_of, n_values)


def by_gradient(inp: Any, tokenizer: Any, target: Tensor, **kwargs: Any) -> Any:
    """The same by the package."""
    model = wide_toy()
    kind = captum.attr.LayerGradientXActivation
    return our_attribution(
        kind, model, model.embedding, inp, tokenizer=tokenizer, target=target, **kwargs
    )
