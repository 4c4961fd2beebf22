"""The captures that tests of candidates wait for, which are scored before others.

A held-out conversation of a kind in which a candidate is tested brings the decision nearer; another one does not, and
may have to wait behind it. The rule knows what was scored before, and nothing of what this capture's score will be, so
that a test may count it as any other unit. All captures are scored all the same: figures and dependence are of the same
sample as without the rule, in a slightly other order (`ShadowQueue.take` bounds it).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from hemostat.ipc.messages import Capture
from hemostat.scoring.capture_arrays import prompt_ids
from hemostat_calibration.arrays import Ids
from hemostat_calibration.statistics.split import prompt_key


class CandidateTests(Protocol):
    """The part of `hemostat.profiles.manager.ProfileManager` that knows what tests can count."""

    @property
    def is_testing(self) -> bool:
        """It is True if a candidate is tested."""

    def awaits(self, model: str, kind: str, unit: bytes) -> bool:
        """Returns True if a test can count a request of this served model, kind and unit."""


class AwaitedEvidence:
    """Says which captures come first. template_of: (prompt, conversation) -> `TokenRecord.template`; another call for
    the same prompt gives the same."""

    def __init__(self, tests: CandidateTests, template_of: Callable[[Ids, bytes], bytes]) -> None:
        self._tests = tests
        self._template_of = template_of

    def is_awaited(self, capture: Capture) -> bool:
        """Returns True if a test waits for the capture's score."""
        if not self._tests.is_testing:
            return False
        prompt = prompt_ids(capture)
        unit = self._template_of(prompt, capture.conversation) or capture.conversation or prompt_key(prompt)
        return self._tests.awaits(capture.model, capture.kind, unit)
