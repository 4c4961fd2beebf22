"""A deployment of three replicas whose processes, and whose store, are killed at random; what is left at the end."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import secrets
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

from tests.support import replica_child, valkey
from tests.support.profile_bench import harmful, helpful
from tests.support.replica_child import Child, read
from tests.support.replicas import store_url
from tests.support.valkey import Valkey

from hemostat.control.evidence import checkpoint, outbox
from hemostat.ipc.messages import REST_KIND
from hemostat.store.protocol import StoredProfile
from hemostat.store.valkey import ValkeyStore
from hemostat_calibration import alarm

REPLICAS = 3
VICTIMS = ("leader", "follower", "store")
TOGETHER = "leader and store"
"""A victim that is not drawn: both at the same time."""
WAIT_SECONDS = 60.0
MAX_LOST = {"leader": checkpoint.MAX_UNSAVED + outbox.MAX_UNITS, "follower": outbox.MAX_UNITS, "store": 0}
MAX_LOST[TOGETHER] = MAX_LOST["leader"]
"""Scored requests that may be lost by a kill, as docs/replicas.md says."""


@dataclass(slots=True)
class Outcome:
    """What one run has shown. killed: in this order. scored, counted: requests. lost: of them, by kills."""

    killed: list[str] = field(default_factory=list)
    scored: int = 0
    counted: int = 0
    harmful_promotions: int = 0
    not_serving: int = 0
    """Looks at a living replica that did not serve what serves."""
    failures: list[str] = field(default_factory=list)

    @property
    def lost(self) -> int:
        return self.scored - self.counted

    @property
    def may_lose(self) -> int:
        return sum(MAX_LOST[victim] for victim in self.killed)

    @property
    def holds(self) -> bool:
        no_harm = not self.harmful_promotions and not self.not_serving and not self.failures
        return no_harm and 0 <= self.lost <= self.may_lose


class Deployment:
    """server: running. folder: of this run. victims: of which one is drawn each time."""

    def __init__(
        self, context: ForkServerContext, server: Valkey, folder: Path, seed: int, victims: Sequence[str]
    ) -> None:
        self._victims = victims
        self._context, self._server, self._folder = context, server, folder
        self._prefix = f"{folder}:"
        self._random = random.Random(seed)
        self._processes: list[ForkServerProcess] = []
        self._served = ""
        self.outcome = Outcome()

    def start(self) -> None:
        for n in range(REPLICAS):
            self._processes.append(self._started(n))

    def _started(self, n: int) -> ForkServerProcess:
        child = Child(self._server.url, self._prefix, self._folder / str(n), n)
        process = self._context.Process(target=replica_child.run, args=(child,), daemon=True)
        process.start()
        return process

    def statuses(self) -> list[dict[str, Any]]:
        """Of the living replicas, as their own processes wrote them."""
        found = [read(self._folder / str(n) / "status") for n in range(REPLICAS)]
        return [said for said, process in zip(found, self._processes, strict=True) if said.get("pid") == process.pid]

    def until(self, condition: Callable[[list[dict[str, Any]]], bool], what: str) -> None:
        assert self.wait(condition, WAIT_SECONDS), f"not within {WAIT_SECONDS:.0f} s: {what}: {self.statuses()}"

    def wait(self, condition: Callable[[list[dict[str, Any]]], bool], seconds: float) -> bool:
        """Whether it came to be true within this time."""
        end = time.monotonic() + seconds
        while not condition(self.statuses()):
            if time.monotonic() > end:
                return False
            time.sleep(0.02)
        return True

    def all_lead_or_follow(self) -> None:
        self.until(lambda ones: len(ones) == REPLICAS and sum(one["leads"] for one in ones) == 1, "one of all leads")

    def serve(self) -> None:
        """A profile that helps serves by an operator's decision, and one that harms is a candidate."""
        self._served = helpful().version
        store = ValkeyStore(store_url(self._server.url, self._prefix))
        for profile in (helpful(), harmful()):
            store.put_profile(StoredProfile(profile.version, profile.to_bytes(), time.time()))
        end = time.monotonic() + WAIT_SECONDS
        while not self._all_serve(self.statuses()):
            # A leader that loses the lease on a busy machine takes a command with it: an operator would try again.
            for action in (["import", harmful().version, ""], ["import", self._served, ""]):
                store.send_command(secrets.token_hex(8), json.dumps(action))
            store.send_command(secrets.token_hex(8), json.dumps(["promote", self._served, None]))
            self.wait(self._all_serve, 5.0)
            assert time.monotonic() < end, f"the profile does not serve everywhere: {self.statuses()}"
        store.close()

    def _all_serve(self, ones: list[dict[str, Any]]) -> bool:
        return len(ones) == REPLICAS and all(map(self._serves, ones))

    def _serves(self, said: dict[str, Any]) -> bool:
        return set(said["serving"].values()) == {self._served} and REST_KIND in said["serving"]

    def kill(self) -> None:
        """One of the three, and what was killed is started again."""
        victim = self._random.choice(self._victims)
        time.sleep(self._random.uniform(0.0, 0.6))
        self.outcome.killed.append(victim)
        if victim == "store":
            self._server.kill()
            self._look(self._random.uniform(0.0, 0.8))
            self._server.start()
        else:
            leads = {said["pid"] for said in self.statuses() if said["leads"]}
            chosen = [n for n, p in enumerate(self._processes) if (p.pid in leads) == (victim != "follower")]
            n = self._random.choice(chosen or range(REPLICAS))
            pid = self._processes[n].pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            if victim == TOGETHER:
                self._server.kill()
            self._processes[n].join()
            self._look(self._random.uniform(0.0, 0.8))
            if victim == TOGETHER:
                self._server.start()
            self._processes[n] = self._started(n)
        self.all_lead_or_follow()
        self.until(self._all_serve, "all serve the profile again")

    def _look(self, seconds: float) -> None:
        """Whether those that live go on serving."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            alive = [
                said for said in self.statuses() if said["pid"] in {p.pid for p in self._processes if p.is_alive()}
            ]
            self.outcome.not_serving += sum(not self._serves(said) for said in alive)
            time.sleep(0.05)

    def end(self) -> Outcome:
        """Nothing more is scored; all that was sent is counted; then the replicas end in order."""
        (self._folder / "quiet").touch()
        store = ValkeyStore(store_url(self._server.url, self._prefix))
        streams = [store.stream(name) for name in ("evidence", "learning")]
        self.until(lambda ones: all(one["evidence"]["evidence"]["waiting"] == 0 for one in ones), "all is sent")
        self.until(lambda _: streams[0].length() == 0, "all is counted")
        (self._folder / "stop").touch()
        for process in self._processes:
            process.join(WAIT_SECONDS)
        found = self.outcome
        for n in range(REPLICAS):
            found.scored += len((self._folder / str(n) / "scored").read_text().splitlines())
            ended = [file.read_text() for file in (self._folder / str(n)).glob("ended-*")]
            found.failures += [text for text in ended if text != "[]"] + ["" if ended else "it did not end in order"]
        found.failures = [text for text in found.failures if text]
        found.counted = counted_requests(store.get_state("alarm") or "")
        promoted = [event["version"] for event in store.events(1000) if event["decision"] == "promote"]
        found.harmful_promotions = promoted.count(harmful().version)
        store.close()
        return found

    def abandon(self) -> None:
        for process in self._processes:
            process.kill()


def counted_requests(alarm_state: str, baseline: int = replica_child.BASELINE_REQUESTS) -> int:
    """Of all kinds: by the mix of kinds, which counts every request of its baseline."""
    state = alarm.load(alarm_state.encode(), alarm.Settings(baseline_requests=baseline))
    return sum(state.workload.baseline.values())


def context() -> ForkServerContext:
    """Children begin with all modules loaded."""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["tests.support.replica_child"])
    return found


def run(made: ForkServerContext, folder: Path, seed: int, kills: int, victims: Sequence[str] = VICTIMS) -> Outcome:
    """One run: so many kills of a deployment of its own."""
    folder.mkdir(parents=True)
    with valkey.running(folder / "valkey") as server:
        one = Deployment(made, server, folder, seed, victims)
        try:
            one.start()
            one.all_lead_or_follow()
            one.serve()
            for _ in range(kills):
                one.kill()
            return one.end()
        finally:
            one.abandon()
