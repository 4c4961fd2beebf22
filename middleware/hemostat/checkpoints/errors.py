"""The error of this package, and the text of errors of other ones."""

from __future__ import annotations

from hemostat_calibration.errors import HemostatError


class AdaptError(HemostatError):
    """The adapter cannot be made; the text is one line that names the path or field, and the correction."""


def one_line(error: BaseException) -> str:
    """Its text, at most 300 characters; where it has none, its type."""
    return " ".join(str(error).split())[:300] or type(error).__name__
