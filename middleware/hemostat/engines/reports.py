"""Keeps what the engines' plugins report: the engines by their boot ids, which profiles every rank holds, and
counters.

It is pure: the time is passed in (monotonic seconds). Invariants:
- A version is acknowledged only while every rank of every live engine has lately reported that it holds it.
- An engine is one boot id. A restarted engine has a new one, and the old one counts until it has been silent for long
  enough, so that a rolling restart never acknowledges too much.
- Engines, ranks, versions and counters are bounded.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import msgspec

from hemostat.engines.answer_buffer import AnswerBuffer
from hemostat.engines.messages import EVENTS, AnswerMessage, ChecksumMessage, InvalidEngineMessage, RankReport
from hemostat.engines.passive import PassivePlugins
from hemostat.engines.request_secrets import RequestSecrets
from hemostat.engines.taps import TapBuffer
from hemostat.metrics import names
from hemostat.metrics.samples import Sample
from hemostat_calibration.plugin_version import fits

SILENCE_SECONDS = 15.0
"""A rank that has not reported for this long, and with it its engine, is gone."""
MAX_ENGINES = 256
MAX_CHECKSUMS = 4
"""The largest number of messages of checksums that are kept until they are taken."""
MAX_HELD_VERSIONS = 8
"""The largest number of versions that an engine is asked to hold (the plugin holds as many)."""


@dataclass(slots=True)
class _Rank:
    report: RankReport
    reported_at: float


class PluginReports:
    """Owns the last report of every rank; `taps` owns the numbers of tapped requests, `answers` their answers.

    It implements `engine.LiveReports`: all that report are meant. It is not thread-safe: it lives in the control
    process's event loop.

    nonce_prefix: the beginning of the nonces of this middleware's requests: if several middlewares share an engine,
    each gets its own taps and answers. It is "" if there is no such beginning.
    """

    def __init__(self, nonce_prefix: str = "") -> None:
        self.nonce_prefix = nonce_prefix
        self._engines: OrderedDict[str, dict[int, _Rank]] = OrderedDict()
        self._wanted: tuple[str, ...] = ()
        self._former: Counter[str] = Counter()
        """The counters of engines that are gone."""
        self.secrets = RequestSecrets()
        self.taps = TapBuffer()
        self.answers = AnswerBuffer()
        self.passive = PassivePlugins()
        self.checksums: dict[str, ChecksumMessage] = {}
        """The last checksums of weights that engines have sent, by nonce; whoever has asked takes them."""
        self.newest = 0.0
        """The time when an engine last reported that had not been known before."""

    def set_wanted(self, versions: Iterable[str]) -> None:
        """Sets the versions that every engine should hold, most important first; at most MAX_HELD_VERSIONS."""
        self._wanted = tuple(dict.fromkeys(versions))[:MAX_HELD_VERSIONS]

    def update(self, report: RankReport, now: float) -> list[str]:
        """Takes a rank's report; returns the versions that it should hold. Raises InvalidEngineMessage if ranks
        disagree, or where an engine, which loads weights once, says that it has other ones than before."""
        self._expire(now)
        if report.boot_id not in self._engines:
            self.newest = now
        ranks = self._engines.setdefault(report.boot_id, {})
        if any(rank.report.world_size != report.world_size for rank in ranks.values()):
            raise InvalidEngineMessage(f"world_size is {report.world_size}: other ranks of this engine report another")
        loaded = next((rank.report.weights for rank in ranks.values() if rank.report.weights), "")
        if loaded and report.weights not in {"", loaded}:
            raise InvalidEngineMessage("weights: not those that this engine has reported before")
        ranks[report.rank] = _Rank(report, now)
        while len(self._engines) > MAX_ENGINES:
            self._forget(next(iter(self._engines)))
        return list(self._wanted)

    def update_answers(self, message: AnswerMessage, now: float) -> None:
        """Keeps the answers of this middleware's requests; an API server that does not know the prefixes yet sends each
        middleware all answers."""
        if self.nonce_prefix:
            own = [answer for answer in message.answers if answer.nonce.startswith(f"{self.nonce_prefix}-")]
            message = msgspec.structs.replace(message, answers=own)
        self.passive.update(message, now)
        if (sent := message.checksums) is not None and sent.nonce.startswith(self.nonce_prefix):
            self.checksums[sent.nonce] = sent
            while len(self.checksums) > MAX_CHECKSUMS:
                del self.checksums[next(iter(self.checksums))]
        relayed = [answer for answer in message.answers if answer.request is None]
        self.answers.update(msgspec.structs.replace(message, answers=relayed), now)

    def hands_out_answers(self, now: float) -> bool:
        """Returns True if every live engine hands out answers."""
        live = self.live(now)
        return bool(live) and all(report.answers for report in live)

    def tells_sets(self, now: float) -> bool:
        """Returns True if every live engine says which ids a grammar allows."""
        live = self.live(now)
        return bool(live) and all(report.sets for report in live)

    def acknowledged(self, now: float) -> frozenset[str]:
        """Returns the versions that every rank of every live engine holds; empty while any rank is missing or
        silent."""
        return self.held_by_all(self.boots(now), now)

    def held_by_all(self, boots: Iterable[str], now: float) -> frozenset[str]:
        """Returns the versions that every rank of each of these engines holds; none if one is not complete, or if there
        is none."""
        held = [self._held(self._engines[boot], now) if boot in self._engines else frozenset() for boot in boots]
        return frozenset.intersection(*held) if held else frozenset()

    def _held(self, ranks: Mapping[int, _Rank], now: float) -> frozenset[str]:
        size = next(iter(ranks.values())).report.world_size
        if len(ranks) < size or any(now - rank.reported_at > SILENCE_SECONDS for rank in ranks.values()):
            return frozenset()
        return frozenset.intersection(*(frozenset(rank.report.versions) for rank in ranks.values()))

    def boots(self, now: float) -> frozenset[str]:
        """Returns the engines that report."""
        self._expire(now)
        return frozenset(self._engines)

    def known(self, now: float) -> bool:
        """Returns True: all that report are meant."""
        return True

    def live(self, now: float) -> list[RankReport]:
        """Returns the last report of every live rank."""
        self._expire(now)
        return [rank.report for ranks in self._engines.values() for rank in ranks.values()]

    def weights(self, models: Collection[str], now: float) -> Counter[str]:
        """Returns the number of live engines that serve weights under one of these names, by the weights'
        fingerprint."""
        self._expire(now)
        result: Counter[str] = Counter()
        for ranks in self._engines.values():
            reports = [rank.report for rank in ranks.values()]
            result.update({report.weights for report in reports if report.weights and report.model in models})
        return result

    def counters(self, now: float) -> dict[str, int]:
        """Returns the sum of the engines' counters, with the counters of former engines, so that it never decreases.

        The ranks of one engine see the same requests: the highest value of any rank counts for each counter.
        """
        self._expire(now)
        total = Counter(self._former)
        for ranks in self._engines.values():
            total.update(_highest_counts(ranks))
        return dict(total)

    def plugins(self, now: float) -> Counter[str]:
        """Returns how many live engines run each version of the plugin; "" is a version that a plugin does not say.

        The ranks of one engine run one installation. While they disagree, the version of the first one counts.
        """
        self._expire(now)
        return Counter(next(iter(ranks.values())).report.plugin for ranks in self._engines.values())

    def live_engines(self, now: float) -> int:
        """Returns the number of engines that report."""
        return len(self.boots(now))

    def samples(self, now: float) -> Iterator[Sample]:
        yield from self.taps.samples()
        yield from self.answers.samples()
        for version, count in sorted(self.plugins(now).items()):
            yield Sample(names.ENGINE_PLUGINS, (version or "unknown", "yes" if fits(version) else "no"), count)
        # 0 before the first one, so that the alert sees it increase.
        for event, count in ({"profiles_failed": 0} | self.counters(now)).items():
            yield Sample(names.ENGINE_EVENTS, (event,), count)

    def _expire(self, now: float) -> None:
        for boot_id, ranks in list(self._engines.items()):
            # While only some ranks are silent, their engine stays and is incomplete, so that nothing is acknowledged.
            if all(now - rank.reported_at > SILENCE_SECONDS for rank in ranks.values()):
                self._forget(boot_id)
        self.taps.expire(now)
        self.answers.expire(now)

    def _forget(self, boot_id: str) -> None:
        self._former.update(_highest_counts(self._engines.pop(boot_id)))


def _highest_counts(ranks: Mapping[int, _Rank]) -> Counter[str]:
    """Returns the highest count of each known event. Names are a metric's labels, and are kept, so that unknown ones
    are left out.
    """
    highest: Counter[str] = Counter()
    for rank in ranks.values():
        highest |= Counter({name: count for name, count in rank.report.counters.items() if name in EVENTS})
    return highest


class ServedWeights:
    """Owns the fingerprint in force of one model's weights; "" while none is known.

    Engines with different weights under one name are a rolling update (or its end): the weights in force stay until no
    engine reports them any more. Engines that report none, or that are silent, change nothing.
    """

    def __init__(self, reports: PluginReports) -> None:
        self._reports = reports
        self._model = ""
        self._current = ""

    def of(self, model: str, names: Collection[str], now: float) -> str:
        """Returns the fingerprint of the weights that are compared now; "" if it is not known. model: the first of its
        served `names`. now: monotonic seconds.
        """
        if model != self._model:
            self._model, self._current = model, ""
        live = self._reports.weights(names, now)
        if len(live) == 1:
            self._current = next(iter(live))
        elif live and self._current and self._current not in live:
            self._current = max(sorted(live), key=live.__getitem__)
        return self._current
