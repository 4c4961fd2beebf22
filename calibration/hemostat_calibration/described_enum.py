"""Enumerations of label values, each with what it means."""

from __future__ import annotations

from enum import StrEnum
from typing import Self


class DescribedEnum(StrEnum):
    """Members are `NAME = value, meaning`. meaning: for the reference and the deploy files.

    >>> class Size(DescribedEnum):
    ...     SMALL = "small", "at most one"
    >>> Size("small").meaning
    'at most one'
    """

    meaning: str

    def __new__(cls, value: str, meaning: str = "") -> Self:
        made = str.__new__(cls, value)
        made._value_ = value
        made.meaning = meaning
        return made
