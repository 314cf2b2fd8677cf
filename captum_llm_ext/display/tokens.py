"""Tokens and layer names as people read them."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from functools import lru_cache

SPACE_MARK = "\u2423"  # the open box that stands for a space
SAME_CHARACTER = "\u22ef"  # stands for a token that continues the character of the one before
_SENTENCEPIECE_SPACE = "\u2581"
_SENTENCEPIECE_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@lru_cache(maxsize=1)
def _byte_of_character() -> dict[str, int]:
    """Alphabet of byte-level BPE: printable bytes stand for themselves, others for U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + place): byte for place, byte in enumerate(others)}


def token_text(token: str) -> str:
    """Text that a vocabulary entry stands for; what is no vocabulary entry comes back as it is.

    Undoes the markers of byte-level BPE ("ĠFrance", "Ã©"; Radford et al. 2019) and of
    SentencePiece ("▁France", "<0x0A>"; Kudo and Richardson 2018). A byte-level token that holds a
    part of a character only keeps its other characters.

    >>> token_text("ĠcafÃ©"), token_text("▁France"), token_text("Ċ")
    (' café', ' France', '\\n')
    """
    if _SENTENCEPIECE_SPACE in token:
        return token.replace(_SENTENCEPIECE_SPACE, " ")
    encoded = _token_bytes(token)
    if encoded is None or (_SENTENCEPIECE_BYTE.fullmatch(token) and encoded[0] > 0x7F):
        return token
    try:
        return encoded.decode("utf-8")
    except UnicodeDecodeError:  # a part of a character, or not a byte-level token at all
        return token.replace("Ġ", " ").replace("Ċ", "\n").replace("ĉ", "\t")


def _token_bytes(token: str) -> bytes | None:
    """The bytes that a token of bytes stands for, or None for a token of characters."""
    byte = _SENTENCEPIECE_BYTE.fullmatch(token)
    if byte:
        return bytes.fromhex(byte.group(1))
    alphabet = _byte_of_character()
    known = all(character in alphabet for character in token)
    return bytes(alphabet[character] for character in token) if known else None


def token_texts(tokens: Sequence[object]) -> list[str]:
    """Text of every token; of tokens that share characters the first has it all, the others "".

    >>> token_texts(["ĠðŁ", "ĺ", "Ģ", "<0xC3>", "<0xA9>", "Ã"])
    [' 😀', '', '', 'é', '', 'Ã']
    """
    texts: list[str] = []
    while len(texts) < len(tokens):
        rest = [str(token) for token in tokens[len(texts) : len(texts) + _MOST_SHARING]]
        shared = _shared_text(rest)
        texts += [token_text(rest[0])] if shared is None else shared
    return texts


_MOST_SHARING = 16  # tokens that share characters; four have one, and each may begin another


def _shared_text(tokens: Sequence[str]) -> list[str] | None:
    """Text of the first tokens, which are parts of characters; None if the first one is whole."""
    decoder, text = codecs.getincrementaldecoder("utf-8")(), ""
    for number, token in enumerate(tokens, start=1):
        encoded = _token_bytes(token)
        if encoded is None:
            return None
        try:
            text += decoder.decode(encoded)
        except UnicodeDecodeError:
            return None
        if not decoder.getstate()[0]:
            return [text] + [""] * (number - 1) if number > 1 else None
    return None


def readable_token(token: object, limit: int | None = None) -> str:
    """One printable line for a token: markers undone, control characters as escapes.

    A token of spaces alone shows as open boxes, since nothing else would be seen of it.

    Args:
        token: a vocabulary entry ("ĠFrance"), or any text.
        limit: most characters to return, the last of them "…" where some were left out; None
            (default) for all.

    >>> readable_token("ĠFrance"), readable_token("a\\nb"), readable_token("Ġ")
    (' France', 'a\\\\nb', '␣')
    """
    return readable_text(token_text(str(token)), limit)


def readable_tokens(tokens: Sequence[object], limit: int | None = None) -> list[str]:
    """`readable_token` of each; a character over several tokens is shown with the first of them.

    >>> readable_tokens(["ĠHi", "ðŁ", "ĺ", "Ģ"])
    [' Hi', '😀', '⋯', '⋯']
    """
    return [
        readable_text(text, limit) if text or not token else SAME_CHARACTER
        for text, token in zip(token_texts(tokens), tokens, strict=True)
    ]


def readable_text(text: str, limit: int | None = None) -> str:
    """One printable line for a text; see `readable_token`."""
    if text and not text.strip(" "):
        text = SPACE_MARK * len(text)
    text = "".join(map(_printable, text if limit is None else text[: limit + 1]))
    return text if limit is None or len(text) <= limit else text[: limit - 1] + "…"


def _printable(character: str) -> str:
    if character.isprintable():
        return character
    return character.encode("unicode_escape").decode("ascii")


def distinct_names(names: Sequence[str]) -> list[str]:
    """Names made distinct: the first of equal names stays, later ones get " (2)", " (3)" and so on.

    >>> distinct_names(["the", "cat", "the"])
    ['the', 'cat', 'the (2)']
    """
    taken, seen, distinct = set(names), set(), []
    for name in names:
        unique, number = name, 2
        while unique in seen or (unique != name and unique in taken):
            unique, number = f"{name} ({number})", number + 1
        seen.add(unique)
        distinct.append(unique)
    return distinct


def short_layer_names(names: Sequence[str]) -> list[str]:
    """Layer names short enough for a plot, still distinct.

    The number of the block and the last part of the name stay, and as many parts before it as it
    takes to tell the layers apart.

    >>> short_layer_names(["model.embed_tokens", "model.layers.15.self_attn.q_proj"])
    ['embed_tokens', '15 q_proj']
    """
    shorts = [_short_layer_name(name, 1) for name in names]
    for parts in range(2, 1 + max((name.count(".") + 1 for name in names), default=1)):
        shorts = [
            _short_layer_name(name, parts) if shorts.count(short) > 1 else short
            for name, short in zip(names, shorts, strict=True)
        ]
    return shorts if len(set(shorts)) == len(set(names)) else list(names)


def _short_layer_name(name: str, parts: int) -> str:
    pieces = name.split(".")
    place = next((i for i, piece in enumerate(pieces) if piece.isdecimal()), None)
    if place is None:
        return ".".join(pieces[-parts:])
    inside = pieces[place + 1 :]
    if inside:
        return f"{pieces[place]} {'.'.join(inside[-parts:])}"
    return f"block {pieces[place]}" if parts == 1 else name
