"""The probes that have passed since the server's last start, and the next one that is due."""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hemostat.adapters.serving.probing import CopyUnavailable, ModelCopy, Prober
from hemostat.adapters.serving.verdicts import Verdict
from hemostat.metrics import names
from hemostat.metrics.samples import Sample
from hemostat.reference.protocol import ReferenceFailure
from hemostat_calibration.backoff import Backoff

log = logging.getLogger("hemostat.adapters")

ISOLATION, AGREEMENT = "isolation", "agreement"
PASSED, FAILED, ERROR, WAITING = "passed", "failed", "error", "waiting"
RESULTS = (PASSED, FAILED, ERROR, WAITING)
BACKOFF = (2.0, 5.0, 15.0, 60.0)
"""Seconds before a probe that the server or the copy did not answer is tried again, by how often in a row."""
MAX_FAILURES = 2
"""Isolation probes in a row that have to fail: one may meet a burst of other requests."""
MAX_ERRORS = 3
"""Agreement probes of a version in a row that the engine does not answer, after which the version is rejected."""

ROUNDED_INPUTS = "where activations are quantized, their rounding alone may differ as much"


class Probes:
    """Owns the verdicts. copy: None where there is no copy of the model: then only isolation is probed. clock:
    monotonic seconds."""

    def __init__(self, copy: ModelCopy | None, clock: Callable[[], float]) -> None:
        self._copy = copy
        self._clock = clock
        self._counts: Counter[tuple[str, str]] = Counter()
        self._details: dict[str, str] = {}
        self.last = ""
        """The last verdict, or why there was none."""
        self.begin_anew()

    def begin_anew(self) -> None:
        """The server was started again: nothing is known."""
        self.isolated_with: frozenset[str] | None = None
        """All adapters at the server when rows without an adapter were found to be left alone by rows with one; None:
        not known."""
        self._failures = 0
        self._agreed: set[str] = set()
        self._errors: Counter[str] = Counter()
        self._backoff = Backoff(BACKOFF, random.random)
        self.problem = ""
        """The reason why no adapter may be asked for until the server is restarted; "" if nothing is wrong."""

    def forget(self, version: str) -> None:
        """It is unloaded."""
        self._agreed.discard(version)
        self._errors.pop(version, None)

    def passed(self, versions: Sequence[str], loaded: frozenset[str]) -> list[str]:
        """Returns the versions that passed both probes. loaded: all adapters at the server, including the clients'
        own."""
        return [v for v in versions if v in self._agreed] if self.isolated_with == loaded and not self.problem else []

    def due(self, versions: Sequence[str], loaded: frozenset[str]) -> bool:
        """A probe is missing, and may be tried now."""
        return bool(self._missing(versions, loaded)) and self._backoff.may_try(self._clock())

    def _missing(self, versions: Sequence[str], loaded: frozenset[str]) -> str:
        """`ISOLATION`, or the version whose agreement is to be probed; "" where nothing is."""
        if self.problem or not versions:
            return ""
        if self.isolated_with != loaded:
            return ISOLATION
        return next((version for version in versions if version not in self._agreed), "")

    async def run(
        self, prober: Prober, base: str, versions: Sequence[str], loaded: frozenset[str], engines: int
    ) -> dict[str, str]:
        """Do the next probe. Returns the versions that are rejected for it, with the reason in one line.

        versions: that are loaded.
        """
        what = self._missing(versions, loaded)
        try:
            if what == ISOLATION:
                self._isolation(await prober.isolation(base, versions, engines), loaded)
                return {}
            if not what:
                return {}
            return await self._agreement(prober, base, what)
        except ReferenceFailure as failure:
            probe = ISOLATION if what == ISOLATION else AGREEMENT
            self._note(probe, ERROR, str(failure))
            self._wait()
            if probe == ISOLATION:
                return {}
            self._errors[what] += 1
            if self._errors[what] < MAX_ERRORS:
                return {}
            return {what: f"the engine does not answer requests for it: {failure}"}

    def _isolation(self, verdict: Verdict, loaded: frozenset[str]) -> None:
        self._note(ISOLATION, PASSED if verdict.passed else FAILED, verdict.detail)
        if verdict.passed:
            self.isolated_with, self._failures = loaded, 0
            self._backoff.reset()
            return
        self._failures += 1
        if self._failures >= MAX_FAILURES:
            self.problem = (
                f"{verdict.detail}: restart vLLM with --max-loras {len(loaded) + 1} (adapters + 1), or with Hemostat's "
                "plugin for adapters"
            )

    async def _agreement(self, prober: Prober, base: str, version: str) -> dict[str, str]:
        if self._copy is None:
            self._agreed.add(version)
            self._details[AGREEMENT] = "not probed: there is no copy of the model here"
            return {}
        try:
            verdict = await prober.agreement(base, version, self._copy)
        except CopyUnavailable as why:
            self._note(AGREEMENT, WAITING, str(why))
            self._wait()
            return {}
        self._note(AGREEMENT, PASSED if verdict.passed else FAILED, f"{version}: {verdict.detail}")
        self._backoff.reset()
        if verdict.passed:
            self._agreed.add(version)
            return {}
        if verdict.base_differs:
            self.problem = (
                f"without an adapter, the engine is not the model of adapter.compressed: {verdict.detail}; set the "
                f"folder that vLLM serves ({ROUNDED_INPUTS})"
            )
            return {}
        return {version: f"the engine does not apply it as our copy does: {verdict.detail} ({ROUNDED_INPUTS})"}

    def _wait(self) -> None:
        self._backoff.failed(self._clock())

    def _note(self, probe: str, result: str, detail: str) -> None:
        self._counts[probe, result] += 1
        level = logging.ERROR if result == FAILED else logging.INFO if result == PASSED else logging.WARNING
        if result != WAITING or self._details.get(probe) != detail:
            log.log(level, "adapters: %s probe %s: %s", probe, result, detail)
        self._details[probe] = self.last = detail

    def report(self) -> dict[str, Any]:
        """JSON-ready: the last verdict of each probe, and how many there were of each result."""
        return {
            probe: {
                "detail": self._details.get(probe, ""),
                **{result: self._counts[probe, result] for result in RESULTS},
            }
            for probe in (ISOLATION, AGREEMENT)
        }

    def samples(self) -> Iterator[Sample]:
        for probe in (ISOLATION, AGREEMENT):
            for result in RESULTS:
                yield Sample(names.ADAPTER_PROBES, (probe, result), self._counts[probe, result])
