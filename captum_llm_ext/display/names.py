"""Names made distinct or short."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from captum_llm_ext.inputs.token_text import SPACE_MARK, readable_tokens


def distinct_names(names: Sequence[str]) -> list[str]:
    """Names made distinct: the first of equal names stays, later ones get " (2)", " (3)" and so on.

    >>> distinct_names(["the", "cat", "the"])
    ['the', 'cat', 'the (2)']
    """
    originals, seen, distinct = set(names), set(), []
    for name in names:
        unique, number = name, 2
        while unique in seen or (unique != name and unique in originals):
            unique, number = f"{name} ({number})", number + 1
        seen.add(unique)
        distinct.append(unique)
    return distinct


def mark_spaces(texts: Sequence[str]) -> list[str]:
    """Texts whose outer spaces are printed as "␣" where another text differs by these alone.

    >>> mark_spaces(["is", " is", " the"])
    ['is', '␣is', ' the']
    """
    return _told_apart(texts, str.strip, _with_marks, texts)


def clean_labels(tokens: Sequence[object]) -> list[str]:
    """Readable texts of tokens, without outer spaces but where two tokens differ by these alone.

    >>> clean_labels(["ĠFrance", "Ġis", "▁is", "is"])
    ['France', ' is', ' is', 'is']
    """
    texts = readable_tokens(tokens)
    return _told_apart(texts, str.strip, str, [text.strip() for text in texts])


def shortened(texts: Sequence[str], limit: int) -> list[str]:
    """Texts cut to `limit` characters: at the end, or inside where two would be alike.

    >>> shortened(["The first text", "The first line", "The"], 8)
    ['The…text', 'The…line', 'The']
    """

    def cut(text: str) -> str:
        return text if len(text) <= limit else text[: limit - 1] + "…"

    def cut_inside(text: str) -> str:
        end = limit // 2
        return text if len(text) <= limit else f"{text[: limit - end - 1]}…{text[-end:]}"

    return _told_apart(texts, cut, cut_inside, [cut(text) for text in texts])


def _told_apart(
    texts: Sequence[str],
    looks: Callable[[str], str],
    otherwise: Callable[[str], str],
    names: Sequence[str],
) -> list[str]:
    """The names, but `otherwise` of texts that look like another text."""
    alike: dict[str, set[str]] = {}
    for text in texts:
        alike.setdefault(looks(text), set()).add(text)
    return [
        otherwise(text) if len(alike[looks(text)]) > 1 else name
        for text, name in zip(texts, names, strict=True)
    ]


def _with_marks(text: str) -> str:
    return re.sub("^ +| +$", lambda spaces: SPACE_MARK * len(spaces.group()), text)


def short_layer_names(names: Sequence[str]) -> list[str]:
    """Layer names short enough for a plot, still distinct.

    A short name has the number of the block and the last part of the name. Where two layers would
    share it, it has more of the parts before the last.

    >>> short_layer_names(["model.embed_tokens", "model.layers.15.self_attn.q_proj"])
    ['embed_tokens', '15 q_proj']
    """
    shorts = [_short_layer_name(name, 1) for name in names]
    for n_parts in range(2, 1 + max((name.count(".") + 1 for name in names), default=1)):
        shorts = [
            _short_layer_name(name, n_parts) if shorts.count(short) > 1 else short
            for name, short in zip(names, shorts, strict=True)
        ]
    return shorts if len(set(shorts)) == len(set(names)) else list(names)


def _short_layer_name(name: str, n_parts: int) -> str:
    """The number of the block and the last `n_parts` parts of the name."""
    parts = name.split(".")
    block = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if block is None:
        return ".".join(parts[-n_parts:])
    inside = parts[block + 1 :]
    if inside:
        return f"{parts[block]} {'.'.join(inside[-n_parts:])}"
    return f"block {parts[block]}" if n_parts == 1 else name
