"""The error of this package."""

from __future__ import annotations

from hemostat_calibration.errors import HemostatError


class AdaptError(HemostatError):
    """The adapter cannot be made; the text is one line that names the path or field, and the correction."""
