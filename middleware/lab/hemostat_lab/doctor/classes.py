"""The class of a token, from its text."""

from __future__ import annotations

from collections.abc import Collection

CLASSES = ("word start", "word continuation", "digits", "punctuation", "whitespace", "special", "part of a character")
"""In the order in which the report shows them."""


def classify(text: str, is_special: bool) -> str:
    """One of `CLASSES`. `text`: what the token adds to a text, its leading space included.

    A token with a letter is a word start if it begins with white space, else a word continuation (as is the first word
    of a text, which has no leading space). A token with numerals and no letter is digits. Other visible characters are
    punctuation.
    """
    if is_special:
        return "special"
    if "\N{REPLACEMENT CHARACTER}" in text:
        return "part of a character"
    core = text.strip()
    if not core:
        return "whitespace" if text else "special"
    if any(character.isalpha() for character in core):
        return "word start" if text[0].isspace() else "word continuation"
    return "digits" if any(character.isnumeric() for character in core) else "punctuation"


def classify_all(texts: dict[int, str], special: Collection[int]) -> dict[int, str]:
    """Token id -> class. texts: token id -> text."""
    return {token: classify(text, token in special) for token, text in texts.items()}
