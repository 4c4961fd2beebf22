"""Begins and ends gates on live traffic, takes scored records, and says what the verdict is.

    record ──► update ──► queue ──► run: is the candidate there? ──► budget ──► measure ──► count ──► store

One record is measured at a time. A record whose turn does not come is left out, and nothing waits for it. The units of
a gate are the same as in the tests of profiles: requests of a template count once, and turns of a conversation do, too.

Where the candidate fails a request that the model that serves has answered, that counts 1 against it. Two failures do
not count at once. If the candidate cannot be reached, the gate pauses: the record that was under way counts when the
candidate is back as the same one, since it may have ended it. If the server refuses whoever asks (another model's name,
a wrong key, too many requests), that says nothing of the model, and the gate pauses, too.

A verdict is shown once the store has it.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol

import msgspec

from hemostat.config.fields import candidate_url
from hemostat.config.schema import Settings
from hemostat.gate.live import report
from hemostat.gate.live.candidate import Candidate, changes
from hemostat.gate.live.measuring import (
    KIND_MARGIN,
    MARGINS,
    CandidateFailed,
    Measured,
    Measuring,
    Work,
    failed,
    questions,
)
from hemostat.gate.live.stable import StableSide
from hemostat.gate.live.stored import (
    BLOB_KEY,
    FAIL,
    MAX_UNITS,
    NONE,
    PASS,
    RUNNING,
    SCHEMA,
    STATES,
    UNDECIDED,
    Stored,
    StoredGate,
    Subject,
    digest_of,
)
from hemostat.ipc.messages import REST_KIND
from hemostat.metrics import names
from hemostat.metrics.samples import Sample
from hemostat.reference.identity import Identity
from hemostat.reference.match import PROBE_SECONDS
from hemostat.reference.protocol import FailureReason, ReferenceFailure
from hemostat.reference.server import VllmServer
from hemostat.scored_record import ScoredRecord, Use
from hemostat.scoring.capture_arrays import prompt_ids
from hemostat.scoring.limits import TokenBudget
from hemostat.store.protocol import BlobKey, StoreWrites
from hemostat_calibration import state_codec
from hemostat_calibration.backoff import Backoff
from hemostat_calibration.elapsed import TimeBreak
from hemostat_calibration.errors import HemostatError, InvalidArgumentError
from hemostat_calibration.gate.live import LiveGate, LiveRules, LiveState, LiveVerdict, Noted
from hemostat_calibration.gate.verdict import ALL, Outcome

log = logging.getLogger("hemostat.gate")

ALPHA = 0.05
MAX_QUEUED = 8
"""The largest number of records that wait to be measured; more are left out."""
ANSWER_SECONDS = 120.0
"""The longest time of one answer of the candidate."""
RETRY_SECONDS = (1.0, 5.0, 15.0, 60.0)
"""The pauses after which a candidate that does not answer is asked again; the last one repeats."""
WATCH_SECONDS = 60.0
"""The time between two looks at a candidate after the verdict."""
BURST_HOURS = 0.1
"""The candidate's token budget may be saved up for this long."""
SPAN = 2.0
"""The units that are remembered last for so many times the time that a verdict waits for: records are taken evenly over
it."""
MAX_IN_A_ROW = 20
"""The number of failures in a row after which the candidate has failed, whatever the tests say: a candidate as good as
the one that serves does not do that."""
MAX_DAYS = 14
"""The longest time that a gate runs: one that has not decided by then ends undecided."""
MAX_NOTES = 8
"""The largest number of different failures that are told in words."""
NOT_OF_THE_MODEL = frozenset(
    {FailureReason.DOWN, FailureReason.UNAUTHORIZED, FailureReason.BUSY, FailureReason.NO_MODEL}
)
"""The failures that say that nobody was asked: see the module's text."""


class Owner(Protocol):
    """The ownership of the store, as far as a gate needs it."""

    @property
    def active(self) -> bool:
        """True if this process owns the store, and so decides."""

    @property
    def writer(self) -> StoreWrites: ...


class ShadowGate:
    """Lives in the control process's event loop, and touches no client's request. Implements `RecordConsumer`.

    stable: the model that serves, and the reference. owner: says if this process decides, and writes what is decided.
    noted: v̂ of the traffic, as the tests of profiles know it. record_event: is told what happens, in one line. draw:
    uniform numbers in [0, 1). clock: monotonic seconds. wall: Unix time.
    """

    def __init__(
        self,
        settings: Settings,
        stable: StableSide,
        owner: Owner,
        *,
        noted: Noted,
        record_event: Callable[[str], None],
        draw: Callable[[], float],
        clock: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._stable = stable
        self._owner = owner
        self._noted = noted
        self._record_event = record_event
        self._draw = draw
        self._clock = clock
        self._wall = wall
        self._configured = ""
        self._gate: _Gate | None = None
        self._queue: asyncio.Queue[tuple[_Gate, Work]] = asyncio.Queue(MAX_QUEUED)
        self._closing: set[asyncio.Task[None]] = set()
        self.tokens = 0
        """The number of tokens that candidates have read and written for this process."""
        self.failures: dict[str, int] = {}
        """The numbers of failures by reason, in this process."""

    # --- what operators and the store say ----------------------------------------------------------------------------

    def restore(self, blobs: Mapping[BlobKey, bytes]) -> None:
        """Takes what an earlier process has stored, and begins the gate that the settings name, if it is new."""
        data = blobs.get(BLOB_KEY)
        try:
            stored = state_codec.decode(Stored, data, SCHEMA) if data else Stored()
        except InvalidArgumentError as error:
            log.error("the stored gate cannot be read; its evidence is lost: %s", error)
            stored = Stored()
        self._drop()
        self._configured = stored.configured
        if stored.gate is not None:
            self._gate = self._made(stored.gate)
        wanted, expect = self._settings.gate.candidate, self._settings.gate.expect
        configured = "" if wanted is None else f"{expect} {wanted}"
        if configured == self._configured:
            return
        before, self._configured = self._configured, configured
        if wanted is not None and self._settings.reference.backend != "none":
            self._begin(wanted, expect, MARGINS[expect], KIND_MARGIN, waived=False)
        elif self._gate is not None and _named(self._gate.stored.subject) == before:
            self._end(NONE, "the settings name no candidate any more")
        self.save()

    def begin(
        self, candidate: str, expect: str, margin: float | None, kind_margin: float | None, *, waive_cycles: bool
    ) -> None:
        """Begins a gate. The gate of the same candidate goes on, or keeps its verdict. Raises HemostatError."""
        try:
            candidate = candidate_url(candidate)
        except ValueError as error:
            raise HemostatError(f"candidate: {error}") from None
        if self._settings.reference.backend == "none":
            raise HemostatError("reference.backend is none: nothing is scored, and a gate compares scored requests")
        margins = margin or MARGINS[expect], kind_margin or KIND_MARGIN
        before = self._gate
        if before is not None and before.stored.state != NONE:
            rules = before.stored.evidence.rules
            asked = questions(expect, *margins), waive_cycles
            if _named(before.stored.subject) == f"{expect} {candidate}":
                if (rules.questions, rules.waived) == asked:
                    return
                raise HemostatError(
                    "the gate of this candidate has other margins, or does not waive the same; end it first, by DELETE "
                    "/api/v1/gate"
                )
            if before.stored.state == RUNNING:
                raise HemostatError(
                    f"a gate of {before.stored.subject.candidate} is running; end it first, by DELETE /api/v1/gate"
                )
        self._begin(candidate, expect, *margins, waived=waive_cycles)

    def end(self) -> None:
        """Ends the gate, and forgets its evidence. Raises HemostatError if there is none."""
        if self._gate is None or self._gate.stored.state == NONE:
            raise HemostatError("there is no gate; begin one by POST /api/v1/gate, or gate.candidate")
        self._end(NONE, "ended by the operator")

    def forget(self, why: str) -> None:
        """Ends a gate, and takes its verdict back, since the models that are served or compared are others now. why: in
        words."""
        if self._gate is not None and self._gate.stored.state in (RUNNING, PASS, FAIL):
            self._end(UNDECIDED, f"{why}: the candidate was compared with others")

    def after_break(self, time_break: TimeBreak) -> None:
        """Notes that the clock was set."""
        gate = self._gate
        if gate is not None:
            gate.tests.after_break(time_break)
            gate.stored.subject = replace(gate.stored.subject, began=time_break.seen(gate.stored.subject.began))
            self.save()

    def save(self) -> None:
        """Stores all."""
        gate = self._gate
        self._owner.writer.put_blob(
            BLOB_KEY, state_codec.encode(Stored(None if gate is None else gate.stored, self._configured), SCHEMA)
        )
        if gate is not None and gate.stored.state != RUNNING and gate.decision is None:
            gate.decision = self._owner.writer.queued()

    def _begin(self, candidate: str, expect: str, margin: float, kind_margin: float, *, waived: bool) -> None:
        evidence = self._settings.evidence
        # Besides the kinds that are followed there are two for the rest of them.
        rules = LiveRules(
            questions(expect, margin, kind_margin), ALPHA, evidence.cycle_seconds, evidence.kinds + 2, waived
        )
        self._drop()
        subject = Subject(candidate, expect, self._wall())
        self._gate = self._made(StoredGate(subject, LiveState(rules)))
        self._record_event(f"The gate of {candidate} begins: is it {_ASKED[expect]}?")
        self.save()

    def _made(self, stored: StoredGate) -> _Gate:
        subject, upstream = stored.subject, self._settings.upstream
        url, _, name = subject.candidate.partition("#")
        # Whoever has the admin token may name a candidate, and is not to get the key by that.
        key = upstream.api_key if subject.candidate == self._settings.gate.candidate else None
        server = VllmServer(url, key, timeout=ANSWER_SECONDS, ca=upstream.ca)
        candidate = Candidate(server, name or None)
        longest = self._settings.shadow.max_tokens
        measuring = Measuring(subject.expect, candidate, self._stable.of_engine, self._stable.of_reference, longest)
        rate = self._settings.gate.tokens_per_hour / 3600.0
        gate = _Gate(stored, candidate, measuring, TokenBudget(rate, max(rate * 3600.0 * BURST_HOURS, 1.0)))
        if stored.state != RUNNING:
            gate.decision = 0  # it comes from the store
        return gate

    def _end(self, state: str, why: str) -> None:
        gate = self._gate
        assert gate is not None
        gate.stored.state, gate.stored.why, gate.stored.decided = state, why, self._wall()
        gate.decision = None
        gate.held.clear()
        self._record_event(f"The gate of {gate.stored.subject.candidate}: {report.sentence(gate.stored)}")
        self.save()

    def _drop(self) -> None:
        """Closes the connection to the candidate of the last gate."""
        if self._gate is not None:
            try:
                task = asyncio.get_running_loop().create_task(self._gate.candidate.close())
            except RuntimeError:
                return  # no loop runs: it has not connected
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
        self._gate = None

    # --- records -----------------------------------------------------------------------------------------------------

    def update(self, scored: ScoredRecord) -> None:
        """Takes a scored record. What is compared is both models without profiles and adapters: of traffic in which
        these serve, it is the control arm."""
        gate = self._gate
        if gate is None or gate.stored.state != RUNNING or not scored.fresh:
            return
        if not scored.uses & (Use.FIGURES | Use.CONDITIONAL_FIGURES):
            return
        if self._wall() - gate.stored.subject.began > MAX_DAYS * 86_400.0:
            self._end(
                UNDECIDED, f"{MAX_DAYS} days did not decide it; {report.waits_for(self.verdict_of(gate), gate.stored)}"
            )
            return
        record, kind = scored.record, _kind(scored)
        gate.tests.update_met(kind)
        if Use.FIGURES not in scored.uses or record.applied is not None or record.adapter is not None:
            return
        digest, now = digest_of(kind, record.unit), self._clock()
        if digest in gate.stored.counted or digest in gate.taken or self._queue.full() or now < gate.next_at:
            return
        gate.next_at = now + gate.pause
        own = self._draw() < self._settings.gate.own_answers
        asks = own and bool(scored.capture.decoding) and scored.capture.choice == 0
        gate.taken.add(digest)
        self._queue.put_nowait((gate, Work(scored, digest, asks)))

    async def run(self) -> None:
        """Measures until it is cancelled."""
        while True:
            await self.step()

    async def watch(self) -> None:
        """Looks at the candidate of a verdict until it is cancelled."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            await self.look()

    async def look(self) -> None:
        """Takes a verdict back if another candidate answers behind the address by now. A candidate that does not answer
        changes nothing: it may have been rolled out, and ended."""
        gate = self._gate
        if gate is None or gate.stored.state not in (PASS, FAIL) or not gate.stored.identity or not self._owner.active:
            return
        try:
            identity = await gate.candidate.identity()
        except ReferenceFailure:
            return
        changed = changes(gate.stored.identity, identity)
        if changed and gate is self._gate and gate.stored.state in (PASS, FAIL):
            self._end(UNDECIDED, f"another candidate answers behind the same address: {'; '.join(changed)}")

    async def step(self) -> None:
        """Waits for the next record, and measures it. What goes wrong costs this record only."""
        gate, work = await self._queue.get()
        try:
            if gate is self._gate and gate.stored.state == RUNNING and self._owner.active:
                await self._measure(gate, work)
        except Exception as error:
            self._count_failure(gate, "internal_error")
            log.exception("the gate could not use the record of %s: %s", work.scored.capture.request_id, error)
        finally:
            gate.taken.discard(work.digest)

    @property
    def waiting(self) -> int:
        """The number of records that wait to be measured."""
        return self._queue.qsize()

    async def close(self) -> None:
        """Closes the connections."""
        if self._gate is not None:
            await self._gate.candidate.close()
        await self._stable.close()

    async def _measure(self, gate: _Gate, work: Work) -> None:
        """Measures one record, and counts it."""
        if not await self._is_there(gate, work):
            return
        await gate.budget.take(work.tokens * (2 if work.own else 1), self._clock)
        try:
            measured = await gate.measuring.measure(work)
        except CandidateFailed as failure:
            self._count_failure(gate, failure.reason)
            gate.checked = -math.inf
            if failure.reason is FailureReason.DOWN:
                gate.held.append(work)
            if failure.reason in NOT_OF_THE_MODEL:
                self._pause(gate, failure)
            else:
                self._failed(gate, [work], str(failure))
            return
        except ReferenceFailure as failure:
            self._count_failure(gate, f"other_{failure.reason}")
            log.info("a record of the gate could not be measured: %s", failure)
            return
        spent = work.tokens + (len(prompt_ids(work.scored.capture)) + measured.generated if work.own else 0)
        gate.budget.spend(spent - work.tokens * (2 if work.own else 1), self._clock())
        self.tokens += spent
        gate.stored.tokens += spent
        gate.stored.in_a_row = 0
        await self._count(gate, work, measured)

    async def _count(self, gate: _Gate, work: Work, measured: Measured) -> None:
        if gate is not self._gate or gate.stored.state != RUNNING:
            return
        total, units = gate.stored.log_ratio
        gate.stored.log_ratio = total + measured.log_ratio, units + 1
        self._update(gate, work, measured.excess)
        await self._decide(gate)

    def _update(self, gate: _Gate, work: Work, excess: Mapping[str, float]) -> None:
        gate.tests.update(_kind(work.scored), excess, self._wall())
        gate.stored.counted[work.digest] = None
        gate.verdict = None

    def _failed(self, gate: _Gate, works: list[Work], why: str) -> None:
        """Counts records that the candidate failed. why: in words."""
        stored = gate.stored
        for work in works:
            self._update(gate, work, failed(work.own))
        stored.in_a_row += len(works)
        note = f"the candidate failed: {why}"
        if note in stored.notes or len(stored.notes) < MAX_NOTES:
            stored.notes[note] = stored.notes.get(note, 0) + len(works)
        if stored.in_a_row >= MAX_IN_A_ROW:
            self._end(FAIL, f"the candidate failed {stored.in_a_row} requests in a row: {why}")
            return
        self._conclude(gate)

    async def _decide(self, gate: _Gate) -> None:
        """Ends the gate if there is a verdict. A pass needs that the candidate is still the one that was measured."""
        if self.verdict_of(gate).outcome is Outcome.PASS and self._clock() - gate.checked > 1.0:
            gate.checked = -math.inf
            if not await self._is_there(gate, None):
                self.save()
                return
        self._conclude(gate)

    def _conclude(self, gate: _Gate) -> None:
        if gate is not self._gate or gate.stored.state != RUNNING:
            return
        verdict = self.verdict_of(gate)
        if verdict.outcome is not Outcome.UNDECIDED:
            self._end(verdict.outcome.value, report.of_verdict(verdict, gate.stored))
        elif len(gate.stored.counted) >= MAX_UNITS:
            self._end(UNDECIDED, f"{MAX_UNITS} requests did not decide it; {report.waits_for(verdict, gate.stored)}")
        else:
            self.save()

    def verdict_of(self, gate: _Gate) -> LiveVerdict:
        """Returns the verdict so far."""
        if gate.verdict is None:
            gate.verdict = gate.tests.verdict(self._noted)
        return gate.verdict

    # --- the candidate -----------------------------------------------------------------------------------------------

    async def _is_there(self, gate: _Gate, work: Work | None) -> bool:
        """Returns True if the candidate answers, and is the one that it was. Every `PROBE_SECONDS`, and after each
        failure, it is asked for its identity. work: the record that is next, whose engine is asked for its tokens of
        fixed texts."""
        now = self._clock()
        if now - gate.checked < PROBE_SECONDS:
            return True
        if not gate.backoff.may_try(now):
            return False
        try:
            identity = await gate.candidate.identity()
            other = "" if work is None else await self._other_tokens(gate, work)
        except ReferenceFailure as failure:
            self._pause(gate, failure)
            self._count_failure(gate, failure.reason)
            if failure.reason not in NOT_OF_THE_MODEL:
                gate.stored.in_a_row += 1
                if gate.stored.in_a_row >= MAX_IN_A_ROW:
                    self._end(FAIL, f"the candidate failed {gate.stored.in_a_row} requests in a row: {failure}")
            return False
        return self._accept(gate, identity, other)

    def _accept(self, gate: _Gate, identity: Identity, other: str) -> bool:
        """Notes that the candidate has answered. Returns True if it is the one that it was. other: how its tokens
        differ from the ones that the model that serves has."""
        stored = gate.stored
        if gate is not self._gate or stored.state != RUNNING:
            return False
        if stored.identity and (changed := changes(stored.identity, identity)):
            self._end(UNDECIDED, f"another candidate answers behind the same address: {'; '.join(changed)}")
            return False
        if other:
            self._end(FAIL, other)
            return False
        if not stored.identity:
            stored.identity = msgspec.json.encode(identity).decode()
            self.save()
        if gate.silent:
            self._record_event(f"The candidate of the gate answers again: {stored.subject.candidate}")
            gate.silent = ""
        gate.checked = self._clock()
        gate.backoff.reset()
        held, gate.held = gate.held, []
        if held:
            self._failed(gate, held, "it could not be reached any more while it had the request")
        return stored.state == RUNNING

    async def _other_tokens(self, gate: _Gate, work: Work) -> str:
        """Returns how the candidate's tokens differ; "" if they do not, or if the engine does not say."""
        capture = work.scored.capture
        try:
            stable = await self._stable.server(capture.engine)
            await stable.models()
        except ReferenceFailure:
            return ""
        return await gate.candidate.other_tokens(stable, capture.model)

    def _pause(self, gate: _Gate, failure: ReferenceFailure | CandidateFailed) -> None:
        """Asks nothing of the candidate for a while."""
        gate.backoff.failed(self._clock())
        if not gate.silent and gate is self._gate:
            self._record_event(f"The candidate of the gate does not answer, and nothing is compared: {failure}")
        gate.silent = str(failure)

    def _count_failure(self, gate: _Gate, reason: str) -> None:
        reason = str(reason)
        self.failures[reason] = self.failures.get(reason, 0) + 1
        gate.stored.failures[reason] = gate.stored.failures.get(reason, 0) + 1

    # --- what is shown -----------------------------------------------------------------------------------------------

    @property
    def state(self) -> str:
        """The state, one of `STATES`. A verdict is shown once it is stored."""
        gate = self._gate
        if gate is None:
            return NONE
        return gate.stored.state if gate.is_stored(self._owner.writer) else RUNNING

    def report(self) -> dict[str, Any]:
        """Returns the gate, JSON-ready."""
        gate, state = self._gate, self.state
        if gate is None or state == NONE:
            why = "" if gate is None else gate.stored.why
            return report.as_json(NONE, why, None, None, self._settings.gate)
        why = gate.stored.why
        if state == RUNNING:
            waits = report.waits_for(self.verdict_of(gate), gate.stored)
            why = f"the candidate does not answer: {gate.silent}" if gate.silent else waits
            if gate.stored.state != RUNNING:
                why = "the verdict is there, and waits for the store"
        return report.as_json(state, why, gate.stored, self.verdict_of(gate), self._settings.gate)

    def problem(self) -> tuple[str, float] | None:
        """Returns what an operator should know, in one line, and since when (Unix time); None if there is nothing."""
        gate = self._gate
        if gate is None or self.state in (NONE, PASS):
            return None
        if self.state == RUNNING:
            return (f"The candidate does not answer: {gate.silent}", self._wall()) if gate.silent else None
        return report.sentence(gate.stored), gate.stored.decided

    def samples(self) -> Iterator[Sample]:
        gate, state = self._gate, self.state
        for name in STATES:
            yield Sample(names.GATE_STATE, (name,), float(name == state))
        yield Sample(names.GATE_CANDIDATE_TOKENS, (), self.tokens)
        for reason, count in self.failures.items():
            yield Sample(names.GATE_FAILURES, (reason,), count)
        if gate is not None and state != NONE:
            yield Sample(names.GATE_UNITS, (), gate.tests.state.units)
            for finding in self.verdict_of(gate).findings:
                if not finding.kind:
                    yield Sample(names.GATE_EXCESS_RATIO, (finding.question.name,), finding.mean)


class _Gate:
    """A gate as this process runs it. taken: the digests of records that wait or are measured. held: records that the
    candidate had when it could not be reached any more. checked: when its identity was asked. next_at, pause: when the
    next record is taken at the earliest, and the seconds between two. decision: the number of the write that has the
    verdict; None while there is none."""

    def __init__(self, stored: StoredGate, candidate: Candidate, measuring: Measuring, budget: TokenBudget) -> None:
        self.stored = stored
        self.tests = LiveGate(stored.evidence)
        self.candidate = candidate
        self.measuring = measuring
        self.budget = budget
        self.backoff = Backoff(RETRY_SECONDS)
        self.taken: set[bytes] = set()
        self.held: list[Work] = []
        self.checked = -math.inf
        self.next_at = -math.inf
        self.pause = SPAN * stored.evidence.rules.needed_seconds(ALL) / MAX_UNITS
        self.silent = ""
        self.decision: int | None = None
        self.verdict: LiveVerdict | None = None

    def is_stored(self, writes: StoreWrites) -> bool:
        """Returns True if the state is in the store, or if the gate is running."""
        return self.stored.state == RUNNING or (self.decision is not None and writes.has_written(self.decision))


_ASKED = {"same": "the same model", "other": "at least as near to the reference"}


def _kind(scored: ScoredRecord) -> str:
    return scored.record.kind or REST_KIND


def _named(subject: Subject) -> str:
    return f"{subject.expect} {subject.candidate}"
