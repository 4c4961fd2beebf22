"""The one error tree of the core.

HemostatError
├── InvalidRecordError      a record breaks an invariant (the data's fault)
├── InvalidProfileError     bytes that are not a profile, or a profile for another vocabulary (the file's fault)
└── InvalidArgumentError    a caller passed the wrong shape, dtype or range (the caller's fault)
"""


class HemostatError(Exception):
    """Base of every error that Hemostat raises on purpose; its message says what is wrong and what to do."""


class InvalidRecordError(HemostatError):
    """A token record breaks an invariant. `reason` is a short, bounded word for counting."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = str(reason)


class InvalidProfileError(HemostatError):
    """A calibration profile is malformed, altered, or made for another vocabulary."""


class InvalidArgumentError(HemostatError, ValueError):
    """An argument has the wrong shape, dtype or range; the message names it."""
