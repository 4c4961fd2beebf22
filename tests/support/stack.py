"""`hemostat serve` as a user runs it, in front of an engine; and an engine that can be killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml
from prometheus_client.parser import text_string_to_metric_families
from tests.support.minutes import starting
from tests.support.served import RELAY, is_spare
from tests.support.waiting import HANG_SECONDS

from hemostat_lab.demo.vllm_server import free_port, with_parent

FAKE_VLLM = Path(__file__).with_name("fake_vllm")
ADMIN_TOKEN = "a-token-for-tests"


def wait_for(what: str, done: Callable[[], object], within: float = HANG_SECONDS, every: float = 0.1) -> None:
    """Block until `done()` is true; an AssertionError that says `what` did not happen otherwise."""
    ends = time.monotonic() + within
    while not done():
        assert time.monotonic() < ends, f"not within {within:g} s: {what}"
        time.sleep(every)


def children(parent: int) -> dict[str, int]:
    """The processes that `parent` started, without the spare relay: pid by the module that each runs."""
    result: dict[str, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            spare = RELAY in command and is_spare(int(folder.name))
            state, ppid = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue  # it ended meanwhile
        if int(ppid) == parent and state != "Z" and "-m" in command and not spare:
            result[command[command.index("-m") + 1]] = int(folder.name)
    return result


class Stack:
    """A running `hemostat serve`: `url` is the data port, `admin` a client of the admin port.

    environment: variables of Hemostat; the admin token is among them if there are any.
    """

    def __init__(self, settings: Mapping[str, Any], folder: Path, environment: Mapping[str, str] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.config = config = folder / "hemostat.yaml"
        token = {"token": ADMIN_TOKEN} if environment is None else {}
        own = {"listen": {"host": "127.0.0.1", "port": 0}, "admin": {"port": 0} | token}
        config.write_text(
            yaml.safe_dump(own | {"shutdown_seconds": 5.0, "evidence": {"cycle_hours": 0.0}} | dict(settings))
        )
        self.log = folder / "hemostat.log"
        with starting("hemostat serve"):
            self.url, admin = self._start(environment or {})
        self.admin = httpx.Client(base_url=admin, timeout=10)

    def _start(self, environment: Mapping[str, str]) -> tuple[str, str]:
        """Returns the addresses of both ports."""
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                with_parent([str(Path(sys.executable).parent / "hemostat"), "serve", "--config", str(self.config)]),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env={k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"} | dict(environment),
                start_new_session=True,
                text=True,
            )
        try:
            return self._announced()
        except BaseException:
            self.stop()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def _announced(self) -> tuple[str, str]:
        """The addresses that it prints once it serves."""
        assert self._process.stdout is not None
        watchdog = threading.Timer(HANG_SECONDS, self._process.kill)
        watchdog.start()
        try:
            lines: list[str] = []
            urls: list[str] = []
            while len(urls) < 2 and (line := self._process.stdout.readline()):
                lines.append(line)
                urls += re.findall(r"http://\S+", line)[:1]  # some lines name none
        finally:
            watchdog.cancel()
        assert len(urls) == 2, f"{lines}: {self.log.read_text()}"
        return urls[0], urls[1]

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self._process.terminate()
        try:
            return self._process.wait(HANG_SECONDS)
        finally:
            self._process.kill()
            self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()

    def status(self) -> dict[str, Any]:
        answer: dict[str, Any] = self.admin.get("/api/v1/status").raise_for_status().json()
        return answer

    def requests(self) -> dict[str, Any]:
        """What became of the sampled requests so far."""
        result: dict[str, Any] = self.status()["requests"]
        return result

    def metric(self, name: str, **labels: str) -> float:
        """A sample's value; 0 where there is none yet."""
        text = self.admin.get("/metrics").raise_for_status().text
        samples = [s for family in text_string_to_metric_families(text) for s in family.samples if s.name == name]
        return sum(s.value for s in samples if labels.items() <= s.labels.items())

    def process(self, module: str) -> int:
        """The pid of one of its processes, by module."""
        control = children(self.pid)
        return (control | children(control["hemostat.control.process"]))[module]

    def wait_scoring(self, within: float = HANG_SECONDS) -> None:
        """Until the reference is ready and a request has really been sampled and scored.

        The relay hears of it a moment after the status says so.
        """
        with starting("reference of hemostat serve"):
            wait_for(f"scoring ({self.status()['reference']})", self._ready, within)
        before = self.requests()["scored"]

        def scored() -> bool:
            body = {"prompt": "Hi", "max_tokens": 2, "temperature": 0}
            httpx.post(f"{self.url}/v1/completions", json=body, timeout=60).raise_for_status()
            return bool(self.requests()["scored"] > before)

        wait_for("a scored request", scored, within, 0.3)
        self.wait_settled()

    def _ready(self) -> bool:
        return bool(self.status()["reference"]["state"] == "ready")

    def wait_settled(self, shadowed: int | None = None, within: float = HANG_SECONDS) -> dict[str, Any]:
        """Until all that was captured (at least `shadowed`) has an ending; then `requests`."""
        last: dict[str, Any] = {}
        still = 0

        def settled() -> bool:
            nonlocal last, still
            now = self.requests()
            still, last = (still + 1 if now == last else 0), now
            # Relays report once a second.
            return still >= 8 and now["pending"] == 0 and now["shadowed"] >= (shadowed or 0)

        wait_for(f"every capture's ending: {last}", settled, within, 0.2)
        return last


@contextmanager
def hemostat(
    settings: Mapping[str, Any], folder: Path, environment: Mapping[str, str] | None = None
) -> Iterator[Stack]:
    """Serve with these settings, and ask for an orderly stop at the end."""
    stack = Stack(settings, folder, environment)
    try:
        yield stack
    except BaseException:
        print(stack.log.read_text())
        stack.stop()
        raise
    finally:
        stack.admin.close()
    assert stack.stop() == 0, stack.log.read_text()


def sampling_settings(upstream: str, reference: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Every request is sampled, and no profile is learned."""
    return {
        "upstream": {"url": upstream},
        "reference": dict(reference),
        "shadow": {"rate": 1.0, "top_k": 20},
        "calibration": {"mode": "off"},
    } | more


class FakeEngine:
    """The fake vLLM in a process of its own, always on the same port: to be killed and started again."""

    def __init__(self, *flags: str) -> None:
        self._port = free_port()
        self._flags = flags
        self.url = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, str(FAKE_VLLM), "--port", str(self._port), *self._flags]
        self._process = subprocess.Popen(
            with_parent(command), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            with starting("fake vLLM"):
                wait_for("the fake engine's start", self._healthy, HANG_SECONDS)
        except BaseException:
            self.kill()
            raise

    def _healthy(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, f"the fake engine ended with code {self._process.returncode}"
        try:
            return httpx.get(f"{self.url}/health", timeout=2).status_code == 200
        except httpx.TransportError:
            return False

    def kill(self) -> None:
        """SIGKILL; safe to call twice."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()


@contextmanager
def fake_engine(*flags: str) -> Iterator[FakeEngine]:
    engine = FakeEngine(*flags)
    engine.start()
    try:
        yield engine
    finally:
        engine.kill()


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The JSON of a stream's events, without the end mark."""
    for line in lines:
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))
