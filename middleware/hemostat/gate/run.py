"""Asks prompt after prompt, until there is a verdict, no prompt or no time left."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hemostat.gate.asked import Asked, Prompt
from hemostat.gate.endpoint import Endpoint
from hemostat.gate.state import Evidence
from hemostat.gate.unit import Measuring, Unit
from hemostat.reference.identity import Identity
from hemostat.reference.protocol import FailureReason, ReferenceFailure
from hemostat_calibration.gate.verdict import Gate, Outcome, Verdict

MAX_FAILURES = 10
"""The number of prompts in a row without a measurement, after which the gate gives up: neither model is to blame, so
that going on would decide nothing."""

MAX_STABLE_FAILURES = 3
"""The same for prompts that the stable model fails in a row: a server that is down would let any candidate pass.
Such prompts count when the stable model has answered a later one, so that reruns do not add them up."""

MAX_SILENT = 3
"""The number of requests in a row without an answer in time, at the beginning, after which the candidate has failed."""

Progress = Callable[[int, int, str], None]
"""A function that is called after each unit with how many have counted, how many there are, and what is known."""


@dataclass(frozen=True, slots=True)
class Result:
    """The verdict, and what led to it. why: why it ended without a pass or a fail on evidence, or what failed it
    outside of the tests; "" otherwise. notes: how often each error was met. unmeasured: prompts that are not counted,
    since the reference or both models failed. log_ratio: the mean estimate of KL(stable‖candidate), nats."""

    outcome: Outcome
    verdict: Verdict | None
    why: str = ""
    units: int = 0
    notes: tuple[tuple[str, int], ...] = ()
    unmeasured: int = 0
    log_ratio: float | None = None


async def identity_of_candidate(candidate: Endpoint) -> tuple[Identity | None, str]:
    """Returns the candidate's identity; or None, and why it fails: it takes requests, and answers none in time, while
    the stable model does. Raises ReferenceFailure for any other failure, which does not speak against it."""
    for _ in range(MAX_SILENT):
        try:
            return await candidate.identity(), ""
        except ReferenceFailure as failure:
            if failure.reason is not FailureReason.TIMEOUT:
                raise
            why = f"the candidate did not answer {MAX_SILENT} requests in a row: {failure}"
    return None, why


async def same_prompt_ids(
    prompts: Sequence[Prompt], stable: Endpoint, candidate: Endpoint, progress: Callable[[int, int], None]
) -> tuple[list[Asked], str]:
    """Returns the prompts with their ids, and "" or why the candidate fails: it sees other ids for the same prompt.
    Raises ReferenceFailure."""
    asked: list[Asked] = []
    for number, prompt in enumerate(prompts, 1):
        ids, other = await stable.prompt_ids(prompt), await candidate.prompt_ids(prompt)
        if ids != other:
            text = f"prompt {number} has {len(other)} token ids for the candidate and {len(ids)} for the stable model"
            if len(ids) == len(other):
                text = f"prompt {number} has other token ids for the candidate than for the stable model"
            cause = "chat template or tokenizer" if prompt.messages else "tokenizer"
            return asked, f"{text}: it has another {cause}"
        asked.append(Asked(prompt, ids))
        progress(number, len(prompts))
    return asked, ""


class Run:
    """Asks `at_once` prompts at a time, and counts them in their order: which prompt counts next does not depend on
    what an answer shows."""

    def __init__(
        self, gate: Gate, measuring: Measuring, evidence: Evidence, at_once: int, progress: Progress, seed: int
    ) -> None:
        self._gate = gate
        self._measuring = measuring
        self._evidence = evidence
        self._at_once = at_once
        self._progress = progress
        self._seed = seed
        self._notes: Counter[str] = Counter()
        self._unmeasured = 0
        self._log_ratios: list[float] = []

    async def until_verdict(self, prompts: Sequence[Asked], seconds: float) -> Result:
        """Returns the result. prompts: those without evidence, in the order in which they count. seconds: the longest
        time for it."""
        deadline = time.monotonic() + seconds
        planned = len(self._evidence.units) + len(prompts)
        for kind, unit in tuple(self._evidence.units.values()):
            self._count(kind, unit, planned)
        waiting = deque(prompts if self._gate.verdict().outcome is Outcome.UNDECIDED else ())
        running: deque[tuple[Asked, asyncio.Task[Unit]]] = deque()
        held: list[tuple[Asked, Unit]] = []
        failures, why = 0, ""
        try:
            while waiting or running:
                while waiting and len(running) < self._at_once:
                    asked = waiting.popleft()
                    running.append(
                        (asked, asyncio.create_task(self._measuring.measure(asked, self._seed + len(waiting))))
                    )
                asked, task = running.popleft()
                try:
                    async with asyncio.timeout(max(deadline - time.monotonic(), 0.0)):
                        unit = await task
                except TimeoutError:
                    why = "the time is over"
                    break
                except ReferenceFailure as failure:
                    self._unmeasured += 1
                    failures += 1
                    if failures >= MAX_FAILURES:
                        why = f"{failures} prompts in a row could not be measured: {failure}"
                        break
                    continue
                failures = 0
                held.append((asked, unit))
                if unit.stable_failed:
                    if len(held) >= MAX_STABLE_FAILURES:
                        why = f"{len(held)} prompts in a row failed at the stable model ({unit.note})"
                        break
                    continue
                for each, known in held:
                    self._evidence.update(each.prompt.digest, each.prompt.kind, known)
                    outcome = self._count(each.prompt.kind, known, planned)
                held.clear()
                if outcome is not Outcome.UNDECIDED:
                    break
            else:
                why = "all prompts were asked"
        finally:
            for _, task in running:
                task.cancel()
            await asyncio.gather(*(task for _, task in running), return_exceptions=True)
        verdict = self._gate.verdict()
        return Result(
            verdict.outcome,
            verdict,
            why if verdict.outcome is Outcome.UNDECIDED else "",
            self._gate.units,
            tuple(self._notes.most_common(3)),
            self._unmeasured,
            sum(self._log_ratios) / len(self._log_ratios) if self._log_ratios else None,
        )

    def _count(self, kind: str, unit: Unit, planned: int) -> Outcome:
        self._gate.update(kind, unit.excess)
        if unit.note:
            self._notes[unit.note] += 1
        if unit.log_ratio is not None:
            self._log_ratios.append(unit.log_ratio)
        verdict = self._gate.verdict()
        self._progress(self._gate.units, planned, _known(verdict))
        return verdict.outcome


def _known(verdict: Verdict) -> str:
    overall = [finding for finding in verdict.findings if not finding.kind]
    means = ", ".join(f"{finding.question.name} {finding.mean:+.3f}" for finding in overall)
    return means if verdict.more is None else f"{means}; about {verdict.more} more prompts"
