"""The text of tokens, exact or ready to print."""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

SPACE_MARK = "\u2423"  # an open box, printed for a space
SAME_CHARACTER = "\u22ef"  # printed for a token that continues the character of the token before it
_SENTENCEPIECE_SPACE = "\u2581"
# Scripts written without spaces.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u30ff\u3400-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff]"
)
_SENTENCEPIECE_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_MOST_SHARING = 16  # longest run of tokens that share characters; a character has at most four


def token_text(token: str) -> str:
    """Text of a vocabulary entry; any other text is returned unchanged.

    Decodes the markers of byte-level BPE ("ĠFrance", "Ã©"; Radford et al. 2019) and of
    SentencePiece ("▁France", "<0x0A>"; Kudo and Richardson 2018). In a byte-level token with an
    incomplete character only the space, newline and tab markers are decoded.

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
    except UnicodeDecodeError:  # an incomplete character, or not a byte-level token at all
        return token.replace("Ġ", " ").replace("Ċ", "\n").replace("ĉ", "\t")


def token_texts(tokens: Sequence[object]) -> list[str]:
    """Text of each token; where tokens share a character, the first has it and the others "".

    >>> token_texts(["ĠðŁ", "ĺ", "Ģ", "<0xC3>", "<0xA9>", "Ã"])
    [' 😀', '', '', 'é', '', 'Ã']
    """
    texts: list[str] = []
    while len(texts) < len(tokens):
        following = [str(token) for token in tokens[len(texts) : len(texts) + _MOST_SHARING]]
        texts += _shared_text(following) or [token_text(following[0])]
    return texts


def in_word(character: str) -> bool:
    """Whether a character is a letter or digit of a script that parts words by spaces.

    >>> in_word("é"), in_word("4"), in_word("."), in_word("京")
    (True, True, False, False)
    """
    return unicodedata.category(character)[0] in "LMN" and not _UNSPACED.match(character)


def are_cut_off(tokens: Sequence[str]) -> list[bool]:
    """Whether each token holds a part of a character whose other bytes are missing.

    >>> are_cut_off(["ĠðŁ", "ĺ", "Ģ", "Ġa", "ãģ"])
    [False, False, False, False, True]
    """
    return [
        bool(text) and text == token_text(token) and not _is_whole(token)
        for text, token in zip(token_texts(tokens), tokens, strict=True)
    ]


def readable_token(token: object, limit: int | None = None) -> str:
    """Text of a token as one printable line, with control characters as escapes.

    A token of nothing but spaces is printed as open boxes, which can be seen.

    Args:
        token: a vocabulary entry ("ĠFrance"), or any text.
        limit: longest result in characters; a longer text is cut and ends in "…". None (default)
            for no limit.

    >>> readable_token("ĠFrance"), readable_token("a\\nb"), readable_token("Ġ")
    (' France', 'a\\\\nb', '␣')
    """
    return readable_text(token_text(str(token)), limit)


def readable_tokens(tokens: Sequence[object], limit: int | None = None) -> list[str]:
    """`readable_token` of each token; the first token of a shared character shows it.

    >>> readable_tokens(["ĠHi", "ðŁ", "ĺ", "Ģ"])
    [' Hi', '😀', '⋯', '⋯']
    """
    return [
        readable_text(text, limit) if text or not token else SAME_CHARACTER
        for text, token in zip(token_texts(tokens), tokens, strict=True)
    ]


def readable_text(text: str, limit: int | None = None) -> str:
    """A text as one printable line; see `readable_token`."""
    if text and not text.strip(" "):
        text = SPACE_MARK * len(text)
    text = "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in (text if limit is None else text[: limit + 1])
    )
    return text if limit is None or len(text) <= limit else text[: limit - 1] + "…"


@lru_cache(maxsize=1)
def _byte_of_character() -> dict[str, int]:
    """Alphabet of byte-level BPE: a printable byte is that character, others start at U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + number): byte for number, byte in enumerate(others)}


def _token_bytes(token: str) -> bytes | None:
    """The bytes of a byte-level or SentencePiece byte token, None for any other token."""
    byte = _SENTENCEPIECE_BYTE.fullmatch(token)
    if byte:
        return bytes.fromhex(byte.group(1))
    alphabet = _byte_of_character()
    if all(character in alphabet for character in token):
        return bytes(alphabet[character] for character in token)
    return None


def _is_whole(token: str) -> bool:
    try:
        (_token_bytes(token) or b"").decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _shared_text(tokens: Sequence[str]) -> list[str] | None:
    """Texts of the first tokens where these share a character, None where the first is whole."""
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
