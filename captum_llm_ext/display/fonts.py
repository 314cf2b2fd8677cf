"""Fonts that have the characters of a text, chosen among those that are installed."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache

from captum_llm_ext.warning import warn

_FIRST = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Emoji", "Symbola")
_BOXES = "Last Resort"  # a font that has a box for every character
_IGNORED = {"\u200b", "\u200c", "\u200d", "\u200e", "\u200f", "\u2060", "\ufe0e", "\ufe0f"}
_SUGGESTED = {
    "CJK": "Noto Sans CJK",
    "HIRAGANA": "Noto Sans CJK",
    "KATAKANA": "Noto Sans CJK",
    "HANGUL": "Noto Sans CJK",
}
_SHOWN = 5  # characters in a warning


def fonts_for(texts: Iterable[str], families: Sequence[str]) -> list[str]:
    """The families, and installed fonts for the characters that these lack."""
    return list(_chosen(frozenset("".join(texts)), tuple(families))[0])


def drawable(texts: Sequence[str], families: Sequence[str]) -> list[str]:
    """Texts whose every character has an installed font.

    A character without one becomes its number ("\\u65e5"), and a warning says once which font to
    install. Marks that are not seen, such as joiners, are left out.
    """
    _, missing = _chosen(frozenset("".join(texts)), tuple(families))
    if seen := "".join(sorted(missing - _IGNORED)):
        for font, characters in _suggestions(seen).items():
            _say_once(font, characters)
    numbers: dict[str, str | int | None] = {
        character: "" if character in _IGNORED else character.encode("unicode_escape").decode()
        for character in missing
    }
    return [text.translate(str.maketrans(numbers)) for text in texts] if numbers else list(texts)


@lru_cache(maxsize=256)
def _chosen(
    characters: frozenset[str], families: tuple[str, ...]
) -> tuple[tuple[str, ...], frozenset[str]]:
    """The families with fonts for further characters, and the characters that no font has."""
    from matplotlib.font_manager import FontProperties, findfont

    chosen, missing = list(families), set(characters)
    for family in families:
        missing -= _characters(findfont(FontProperties(family=[family])))
    for name, path in _installed() if missing else ():
        if found := missing & _characters(path):
            chosen.append(name)
            missing -= found
    return tuple(chosen), frozenset(missing)


@lru_cache(maxsize=1)
def _installed() -> tuple[tuple[str, str], ...]:
    """Name and file of each upright font, those that suit best first."""
    from matplotlib.font_manager import fontManager

    fonts = {f.name: f.fname for f in fontManager.ttflist if f.style == "normal"}
    usable = {name: path for name, path in fonts.items() if not name.startswith(_BOXES)}
    first = [name for name in _FIRST if name in usable]
    return tuple((name, usable[name]) for name in dict.fromkeys([*first, *sorted(usable)]))


@lru_cache(maxsize=512)
def _characters(path: str) -> frozenset[str]:
    """The characters that a font can draw: none of a font of pictures, as colour emoji are."""
    from matplotlib.ft2font import FT2Font

    try:
        font = FT2Font(path)
    except (OSError, RuntimeError):  # a format that matplotlib cannot draw
        return frozenset()
    return frozenset(map(chr, font.get_charmap())) if font.scalable else frozenset()


def _suggestions(characters: str) -> dict[str, str]:
    """Font to install → the characters that it would show."""
    fonts: dict[str, str] = {}
    for character in characters:
        script = unicodedata.name(character, "UNKNOWN").split()[0]
        is_emoji = unicodedata.category(character) == "So"
        font = "Noto Emoji" if is_emoji else _SUGGESTED.get(script, f"Noto Sans {script.title()}")
        fonts[font] = fonts.get(font, "") + character
    return fonts


@lru_cache(maxsize=64)
def _said(font: str) -> list[str]:
    return []


def _say_once(font: str, characters: str) -> None:
    if said := _said(font):
        return
    said.append(characters)
    more = " …" if len(characters) > _SHOWN else ""
    warn(
        f"no installed font has {' '.join(characters[:_SHOWN])}{more}: plots show their numbers; "
        f"install a font such as {font}"
    )
