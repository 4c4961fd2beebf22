"""What kind of token it is, from its text alone."""

from __future__ import annotations

from collections.abc import Collection

CLASSES = ("word start", "word continuation", "digits", "punctuation", "whitespace", "special", "part of a character")
"""In the order in which they are shown."""


def classify(text: str, is_special: bool) -> str:
    """One of `CLASSES`. `text`: what the token adds to a text, its leading space included.

    A token with a letter is a word's start when white space comes before the letter, else a continuation (also the
    first word of a text, where tokenizers put no space); numbers without letters are digits; the rest that shows is
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
    return {token: classify(text, token in special) for token, text in texts.items()}
