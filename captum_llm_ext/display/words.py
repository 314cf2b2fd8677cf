"""Which tokens make a word."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Sequence

from captum_llm_ext.display.tokens import token_texts

# Scripts written without spaces: their tokens stay apart.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u30ff\u3400-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff]"
)
_WORD = re.compile(" ?w+(?:'w+)*")  # some vocabularies have the space before it apart


def word_texts(tokens: Sequence[str]) -> list[str]:
    """Text of each token as it stands in the prompt; WordPiece's "##" means: no space before.

    >>> word_texts(["un", "##believ", "##able"]), word_texts(["##", "Ġun"])
    ([' un', 'believ', 'able'], ['##', ' un'])
    """
    texts = token_texts(tokens)
    pieces = [token.startswith("##") and token[2:].isalnum() for token in tokens]
    if not any(pieces) or any(text.startswith(" ") for text in texts):
        return texts
    return [text[2:] if piece else " " + text for text, piece in zip(texts, pieces, strict=True)]


def word_spans(texts: Sequence[str], gaps: Collection[int] = ()) -> list[tuple[int, int]]:
    """First and last-plus-one place of each word, one after the other over all texts.

    A word is a run of letters and digits, apostrophes inside it included. Whatever else there is,
    punctuation for one, stays as it is, and so do tokens of scripts that have no spaces.

    Args:
        texts: of the tokens.
        gaps: places before which something is missing, so that a word begins there.

    >>> word_spans([" un", "believ", "able", ",", " don", "'t"])
    [(0, 3), (3, 4), (4, 6)]
    """
    kinds = "".join(map(_kind, "".join(texts)))
    inside = {
        place for word in _WORD.finditer(kinds) for place in range(word.start() + 1, word.end())
    }
    starts, offset = [], 0
    for place, text in enumerate(texts):
        continues = offset in inside or not text
        if place == 0 or place in gaps or not continues:
            starts.append(place)
        offset += len(text)
    return list(zip(starts, [*starts[1:], len(texts)], strict=True))


def _kind(character: str) -> str:
    """ "w" for what words are made of, "'" for an apostrophe, " " for a space, "." for all else."""
    if character in "'’ ":
        return character.replace("’", "'")
    joins = unicodedata.category(character)[0] in "LMN" or character in "_\u200c\u200d"
    return "w" if joins and not _UNSPACED.match(character) else "."
