"""Which tokens form a word."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from captum_llm_ext.inputs.token_text import in_word, token_texts

_WORD = re.compile(" ?w+(?:'w+)*")  # the space can be a token by itself


def word_texts(tokens: Sequence[str]) -> list[str]:
    """Text of each token in the prompt; WordPiece tokens without "##" begin with a space.

    >>> word_texts(["un", "##believ", "##able"]), word_texts(["##", "Ġun"])
    ([' un', 'believ', 'able'], ['##', ' un'])
    """
    texts = token_texts(tokens)
    continues = [token.startswith("##") and token[2:].isalnum() for token in tokens]
    if not any(continues) or any(text.startswith(" ") for text in texts):
        return texts
    return [
        text[2:] if inside else " " + text for text, inside in zip(texts, continues, strict=True)
    ]


def word_spans(texts: Sequence[str], gaps: Collection[int] = ()) -> list[tuple[int, int]]:
    """Span (start, stop) of tokens for each word, in order; the spans cover all tokens.

    A word is a run of letters and digits, with the apostrophes inside it. A token of anything
    else, such as punctuation or a script without spaces, has a span to itself.

    Args:
        texts: text of each token.
        gaps: tokens before which the prompt has other tokens, so that a word begins there.

    >>> word_spans([" un", "believ", "able", ",", " don", "'t"])
    [(0, 3), (3, 4), (4, 6)]
    """
    kinds = "".join(map(_kind, "".join(texts)))
    inside = {i for word in _WORD.finditer(kinds) for i in range(word.start() + 1, word.end())}
    starts, offset = [], 0
    for token, text in enumerate(texts):
        continues = offset in inside or not text
        if token == 0 or token in gaps or not continues:
            starts.append(token)
        offset += len(text)
    return list(zip(starts, [*starts[1:], len(texts)], strict=True))


def _kind(character: str) -> str:
    """ "w" for a character of words, "'" for an apostrophe, " " for a space, "." for others."""
    if character in "'’ ":
        return character.replace("’", "'")
    return "w" if in_word(character) or character in "_\u200c\u200d" else "."
