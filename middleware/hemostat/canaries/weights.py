"""Checksums of the engines' weights, tensor by tensor: once a day in a moment without requests, and once a replay has
stated a change.

They are compared with the first ones of their group: of the same model, with equal parallelism, kernels and versions
(`hemostat_calibration.canary_weights`). So an engine is compared with itself, after its restart too, and with others.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hemostat.canaries.engine import EngineCanaries
from hemostat.engines.identification import new_nonce
from hemostat.engines.reports import PluginReports
from hemostat.reference.protocol import ReferenceFailure
from hemostat.store.protocol import BlobKey, StoreWrites, alarm_event
from hemostat_calibration import state_codec
from hemostat_calibration.canary_weights import BUSY, WeightChecksums
from hemostat_calibration.engine_keys import CHECKSUMS_KEY

log = logging.getLogger("hemostat.canaries")

BLOB_KEY = BlobKey("canary_weights")
DAY_SECONDS = 86_400.0
RETRY_SECONDS = 300.0
"""The time from an attempt that an engine was too busy for until the next one."""
MAX_SECONDS = 600.0
"""The longest time of one measurement."""
TICK_SECONDS = 0.25
MAX_GROUPS = 16
"""The largest number of groups; beyond it the one that was measured first is forgotten."""
MAX_ENGINES = 256
"""The largest number of engines of which anything is kept, the ones that have left included."""
SCHEMA = 1


@dataclass(frozen=True, slots=True)
class First:
    """The first checksums of a group. at: Unix time."""

    engine: str
    at: float
    checksums: WeightChecksums


@dataclass(frozen=True, slots=True)
class Stated:
    """A statement. since: Unix time. model: the served name. text: without the names."""

    since: float
    model: str
    text: str


@dataclass(frozen=True, slots=True)
class _Stored:
    first: Mapping[str, First] = field(default_factory=dict)
    stated: Mapping[str, Stated] = field(default_factory=dict)


class Weights:
    """Owns the first checksums of each group, and what is stated of each engine.

    enabled: `canaries.weights`. clock: monotonic seconds. wall: Unix time.
    """

    def __init__(
        self,
        reports: PluginReports,
        writes: StoreWrites,
        sign: Callable[[dict[str, Any]], dict[str, Any]],
        *,
        enabled: bool,
        clock: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        self._reports = reports
        self._writes = writes
        self._sign = sign
        self._enabled = enabled
        self._clock, self._wall = clock, wall
        self._first: dict[str, First] = {}
        self.stated: dict[str, Stated] = {}
        """The statements by engine."""
        self.details: dict[str, str] = {}
        """The result of the last measurement of each engine, in one line."""
        self._due: dict[str, float] = {}
        self._asked_since: dict[str, float] = {}
        """The time of the last statement of a replay that an engine's weights were looked at for."""

    def restore(self, stored: bytes) -> None:
        """Takes what an earlier run stored. Raises InvalidArgumentError."""
        read = state_codec.decode(_Stored, stored, SCHEMA)
        self._first, self.stated = dict(read.first), dict(read.stated)

    def forget(self) -> None:
        """Forgets the checksums: what engines compute now is accepted."""
        self._first, self.stated, self.details, self._due = {}, {}, {}, {}
        self._save()

    async def read(self, canaries: EngineCanaries) -> None:
        """Has the engine compute its checksums, if that is due and no client's request is in progress there. Raises
        ReferenceFailure if it cannot be asked."""
        name, now = canaries.name, self._clock()
        reading = canaries.base
        changed_at = max(reading.since.values(), default=0.0) if reading is not None else 0.0
        new_statement = changed_at > self._asked_since.get(name, 0.0)
        if not self._enabled or canaries.load or (now < self._due.get(name, -np.inf) and not new_statement):
            return
        self._due[name], self._asked_since[name] = now + RETRY_SECONDS, changed_at
        nonce = new_nonce(self._reports)
        body = {"model": canaries.now.model, "prompt": "x", "max_tokens": 1}
        body |= {"vllm_xargs": self._sign({CHECKSUMS_KEY: nonce})}
        request = asyncio.create_task(canaries.post_long(body, MAX_SECONDS), name=f"checksums of {name}")
        try:
            message = await self._message(nonce, request)
        finally:
            request.cancel()
            with suppress(asyncio.CancelledError, ReferenceFailure):
                await request
        if message is None or not message.digests:
            detail = "the engine's plugin has sent no checksums" if message is None else message.detail
            if detail != BUSY:
                self._due[name] = self._clock() + DAY_SECONDS
            self.details[name] = f"no checksums: {detail}"
            return
        self._due[name] = self._clock() + DAY_SECONDS
        self._judge(name, WeightChecksums(canaries.now.model, message.digests, message.facts), message.seconds)

    async def _message(self, nonce: str, request: asyncio.Task[None]) -> Any:
        """Returns the plugin's message; None if it does not come in time after the request has ended."""
        left = int(MAX_SECONDS / TICK_SECONDS)
        while left:
            if (message := self._reports.checksums.pop(nonce, None)) is not None:
                return message
            if request.done():
                request.result()
                left = min(left, int(20.0 / TICK_SECONDS))
            left -= 1
            await asyncio.sleep(TICK_SECONDS)
        return None

    def _judge(self, name: str, found: WeightChecksums, seconds: float) -> None:
        first = self._first.setdefault(found.group, First(name, self._wall(), found))
        while len(self._first) > MAX_GROUPS:
            del self._first[min(self._first, key=lambda group: self._first[group].at)]
        differing, tensors = found.differing(first.checksums), len(found.digests)
        at = time.strftime("%Y-%m-%d %H:%M", time.localtime(first.at))
        whose = f"those of {first.engine} at {at}"
        while len(self.stated) >= MAX_ENGINES or len(self.details) >= MAX_ENGINES:
            for kept in (self.stated, self.details):
                kept.pop(next(iter(kept), ""), None)
        self.details[name] = f"{tensors - len(differing)} of {tensors} tensors are equal to {whose}; {seconds:.1f} s"
        if differing and name not in self.stated:
            text = f"{len(differing)} of {tensors} tensors differ from {whose}, the first one is {differing[0]}"
            self.stated[name] = Stated(self._wall(), found.model, text)
            self._event(self.statement(name), found)
        elif not differing and self.stated.pop(name, None) is not None:
            self._event(f"Canaries: {name} ({found.model}) has the weights of then", found)
        self._save()

    def statement(self, name: str) -> str:
        """Returns what is wrong with an engine's weights, in one line; "" if nothing is."""
        stated = self.stated.get(name)
        if stated is None:
            return ""
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(stated.since))
        return f"Canaries: {name} ({stated.model}) has other weights in its memory, since {since}: {stated.text}"

    def _event(self, text: str, found: WeightChecksums) -> None:
        log.warning("%s", text)
        self._writes.append_event(alarm_event(self._wall(), text, {"facts": dict(found.facts)}))

    def _save(self) -> None:
        self._writes.put_blob(BLOB_KEY, state_codec.encode(_Stored(self._first, self.stated), SCHEMA))
