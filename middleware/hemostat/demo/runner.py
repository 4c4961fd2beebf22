"""Starts vLLM and Hemostat, sends prompts, shows what comes of it, and stops everything that it started."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import yaml
from rich.console import Console
from rich.live import Live

from hemostat.demo import prompts, view
from hemostat.demo.traffic import drive
from hemostat.demo.varied import varied
from hemostat.models.compress import Checkpoints, cached_checkpoints, copy_checkpoint
from hemostat.models.vllm_server import (
    LOGITS_PROCESSOR,
    STOPS_WITHIN,
    VllmFailure,
    VllmServer,
    dtype,
    free_port,
    on_cpu,
    runnable,
    tied,
)
from hemostat_calibration.errors import HemostatError
from hemostat_calibration.profiles.profile import CalibrationProfile

SERVED_NAME = "smollm2-135m-instruct"
DATA_PORT, ADMIN_PORT = 8080, 8081
"""Taken when they are free, otherwise any."""
TOP_K = 64
CALIBRATION = {
    "mode": "auto",
    "min_tokens": 3000,
    "held_out_fraction": 0.5,
    "control_fraction": 0.5,
    "clamp_nats": 0.5,
    "anchors": 1024,
}
"""A demo has minutes: propose early, judge by half of the prompts, and change little, as what a profile needs to prove
itself grows with the range of what it may do. Arms of equal size tell soonest what it does. More anchors than the model
has columns (576) show its hidden state whole."""
QUEUE_SOFT_LIMIT = 32
"""The demo's clients wait while more captures than this wait for the reference."""
REFRESH = 0.5
PLAIN_EVERY = 5.0
REFERENCE_WITHIN = 180.0
REFERENCE_QUIET = 5.0
"""Hemostat asks vLLM every few seconds: what it says sooner is old."""
PROFILE_WITHIN = 60.0
DRAINED_AFTER = 3.0
"""Seconds without news from an empty queue: relays report their counters now and then."""
STUCK_AFTER = 90.0
"""Seconds without news from a queue that is not empty: given up."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """The flags of `hemostat demo`."""

    requests: int | None = None
    """None: until Ctrl-C."""
    prompts: Path | None = None
    report: Path | None = None
    keep: Path | None = None
    """Folder that gets `reference`, `compressed`, `records.jsonl` and the logs."""
    seed: int = 0
    compression: str = "w4a16"
    console: bool = True
    """False: plain lines in place of the live picture."""
    force_profile: Path | None = None
    overrides: tuple[str, ...] = ()
    """`KEY=VALUE`, for `hemostat serve --set`."""


class DemoFailure(HemostatError):
    """The demo cannot go on; the text says why."""


class _StoppedError(Exception):
    """Ctrl-C or SIGTERM."""


def run(options: DemoOptions) -> int:
    """Run the demo; the exit code: 0 done or stopped while unbounded, 1 something failed, 130 stopped before the end.

    Raises HemostatError for what the user has to put right before anything is started.
    """
    loaded = prompts.load(options.prompts)
    if options.prompts is None:
        loaded += varied()
    forced = _forced_version(options.force_profile)
    _check_destinations(options)
    return asyncio.run(_Demo(options, loaded, forced).run())


def _forced_version(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return CalibrationProfile.from_bytes(path.read_bytes()).version
    except OSError as error:
        raise DemoFailure(f"--force-profile {path}: cannot be read ({error.strerror})") from None
    except HemostatError as error:
        raise DemoFailure(f"--force-profile {path}: {error}") from None


def _check_destinations(options: DemoOptions) -> None:
    """What would fail only at the end fails now."""
    try:
        if options.keep is not None:
            options.keep.mkdir(parents=True, exist_ok=True)
        if options.report is not None:
            options.report.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoFailure(f"cannot write to {error.filename} ({error.strerror}); name another place") from None
    for flag, place in (("--keep", options.keep), ("--report", options.report and options.report.parent)):
        if place is not None and not os.access(place, os.W_OK):
            raise DemoFailure(f"{flag}: cannot write to {place}; name another place")
    if options.report is not None and options.report.is_dir():
        raise DemoFailure(f"--report {options.report}: is a folder; name a file")


class _Demo:
    def __init__(self, options: DemoOptions, loaded: list[prompts.Prompt], forced: str | None) -> None:
        self._options = options
        self._prompts = loaded
        self._forced = forced
        self._stop = asyncio.Event()
        self._console = Console(markup=False, highlight=False, soft_wrap=False)
        self._began = time.monotonic()

    def _say(self, text: str) -> None:
        self._console.print(f"{time.monotonic() - self._began:5.0f} s  {text}", soft_wrap=True)

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for sig in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(sig, self._stop.set)
        scratch = Path(tempfile.mkdtemp(prefix="hemostat-demo-"))  # readable by this user only: it holds a token
        failed = False
        try:
            await self._main(scratch)
        except _StoppedError:
            self._say("stopped")
            return 0 if self._options.requests is None else 130
        except HemostatError as failure:
            failed = True
            self._say(str(failure))
            return 1
        finally:
            if not failed or self._options.keep is not None:
                shutil.rmtree(scratch, ignore_errors=True)
        return 0

    async def _main(self, scratch: Path) -> None:
        options = self._options
        logs = scratch
        if options.keep is not None:
            logs = options.keep / "logs"
            logs.mkdir(exist_ok=True)
            (options.keep / "records.jsonl").unlink(missing_ok=True)
        self._say("checkpoints")
        checkpoints = await self._first([], asyncio.to_thread(self._checkpoints))
        served = await self._first([], asyncio.to_thread(runnable, checkpoints.compressed, self._say))
        data_port, admin_port = _port(DATA_PORT), _port(ADMIN_PORT)
        scene = view.Scene(
            SERVED_NAME, f"http://127.0.0.1:{data_port}", f"http://127.0.0.1:{admin_port}", str(logs.absolute())
        )
        token = secrets.token_urlsafe(24)
        vllm = VllmServer(
            served,
            SERVED_NAME,
            logs / "vllm.log",
            vllm_arguments(),
            {"HEMOSTAT_ADMIN_URL": scene.admin_url, "HEMOSTAT_ADMIN_TOKEN": token},
        )
        config = scratch / "hemostat.yaml"
        settings = serve_settings(options, checkpoints, vllm.url, data_port, admin_port, token)
        config.write_text(yaml.safe_dump(settings, sort_keys=False))
        self._say(f"starting vLLM on the {options.compression} model, and Hemostat with the reference in process")
        with _stopping(vllm):
            vllm.start()
            with _serving(serve_command(config, options.overrides), logs / "hemostat.log") as serve:
                await self._measure(scene, vllm, serve, logs)

    def _checkpoints(self) -> Checkpoints:
        cached = cached_checkpoints(self._options.compression, self._say)
        keep = self._options.keep
        if keep is None:
            return cached
        kept = Checkpoints(keep / "reference", keep / "compressed")
        copy_checkpoint(cached.reference, kept.reference, self._say)
        copy_checkpoint(cached.compressed, kept.compressed, self._say)
        return kept

    async def _measure(self, scene: view.Scene, vllm: VllmServer, serve: subprocess.Popen[bytes], logs: Path) -> None:
        """Everything between the start of the two programs and their end."""
        options = self._options
        async with (
            httpx.AsyncClient(base_url=scene.admin_url, timeout=10.0, trust_env=False) as admin,
            self._background(self._poll(admin, scene), _children(vllm, serve, logs)) as watched,
        ):
            await self._first(watched, self._until_ready(scene, vllm))
            self._say(f"ready. Console {scene.admin_url}/   data port {scene.data_url}/v1")
            requests = prompts.plan(self._prompts, SERVED_NAME, options.seed)
            driving = drive(
                scene.data_url, requests, options.requests, scene.traffic, lambda: _queued(scene) < QUEUE_SOFT_LIMIT
            )
            try:
                async with self._shown(scene):
                    await self._first(watched, driving)
                    scene.note = "all sent; waiting for the reference to score the rest"
                    await self._first(watched, self._drained(scene))
                    scene.note = ""
            finally:
                with contextlib.suppress(httpx.HTTPError, ValueError):
                    await _refresh(admin, scene)
                self._finish(scene)
            if not scene.traffic.ok:
                raise DemoFailure("not one request succeeded")

    def _finish(self, scene: view.Scene) -> None:
        """The last figures, and the report, also when the end came early."""
        if not scene.status:
            return
        self._say(view.line(scene))
        if scene.traffic.last_failure:
            self._say(f"last failure: {scene.traffic.last_failure}")
        if self._options.report is not None:
            text = json.dumps(view.report(scene), indent=2)
            self._options.report.write_text(text + "\n", encoding="utf-8")
            self._say(f"report: {self._options.report}")

    # --- waiting ---------------------------------------------------------------------------------------------------

    async def _until_ready(self, scene: view.Scene, vllm: VllmServer) -> None:
        """Both models answer, the vocabularies were compared, and a forced profile is where it will be applied."""
        await asyncio.to_thread(vllm.wait_ready, progress=self._say, cancelled=self._stop.is_set)
        self._say("vLLM answers; its first request takes a little longer")
        await _warm_up(vllm)
        said = ""
        began = time.monotonic()
        while (reference := scene.status.get("reference", {})).get("state") != "ready":
            state, detail = reference.get("state", "starting"), reference.get("detail", "")
            if state == "mismatch":
                raise DemoFailure(f"the two models do not fit together: {detail}")
            if time.monotonic() - began > REFERENCE_WITHIN:
                raise DemoFailure(f"the reference is not ready ({state}): {detail}\n{_tail(Path(scene.logs))}")
            late = time.monotonic() - began > REFERENCE_QUIET
            if late and (news := f"reference {state}: {detail}") != said:
                self._say(news)
                said = news
            await asyncio.sleep(REFRESH)
        while scene.status["learner"]["state"] == "starting":  # noqa: ASYNC110  polled, like all that the scene shows
            await asyncio.sleep(REFRESH)
        began = time.monotonic()
        while self._forced is not None and self._forced not in scene.status["engines"]["acknowledged"]:
            if time.monotonic() - began > PROFILE_WITHIN:
                raise DemoFailure(
                    f"the engine did not take the forced profile {self._forced}; {_tail(Path(scene.logs))}"
                )
            await asyncio.sleep(REFRESH)

    async def _drained(self, scene: view.Scene) -> None:
        """Return when nothing waits for the reference any more, or nothing moves."""
        last: Any = None
        since = time.monotonic()
        while True:
            requests = scene.status["requests"]
            news = (requests["shadowed"], requests["scored"], requests["skipped"], requests["dropped"])
            if news != last:
                last, since = news, time.monotonic()
            waiting = _queued(scene) + requests.get("pending", 0)
            still = time.monotonic() - since
            accounted = requests["scored"] + sum(requests["skipped"].values()) + sum(requests["dropped"].values())
            if not waiting and (accounted >= scene.traffic.ok or still > DRAINED_AFTER):
                return
            if still > STUCK_AFTER:
                self._say(f"{waiting} captures were not scored within {STUCK_AFTER:.0f} s; going on without")
                return
            await asyncio.sleep(REFRESH)

    async def _poll(self, admin: httpx.AsyncClient, scene: view.Scene) -> None:
        """Keep the scene's status fresh; an admin port that does not answer leaves the last one."""
        while True:
            with contextlib.suppress(httpx.HTTPError, ValueError):
                await _refresh(admin, scene)
            scene.elapsed = time.monotonic() - self._began
            await asyncio.sleep(REFRESH)

    @asynccontextmanager
    async def _shown(self, scene: view.Scene) -> AsyncIterator[None]:
        """The live picture, or a plain line now and then."""
        if self._options.console and self._console.is_terminal:
            with Live(console=self._console, get_renderable=lambda: view.picture(scene), refresh_per_second=4):
                yield
            return

        async def lines() -> None:
            said = 0.0
            while True:
                self._say(view.line(scene))
                for event in [e for e in reversed(scene.decisions) if e["at"] > said]:
                    self._say(view.decided(event))
                    said = event["at"]
                await asyncio.sleep(PLAIN_EVERY)

        async with self._background(lines()):
            yield

    @asynccontextmanager
    async def _background(self, *loops: Awaitable[None]) -> AsyncIterator[Sequence[asyncio.Future[None]]]:
        tasks = [asyncio.ensure_future(loop) for loop in loops]
        try:
            yield tasks
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _first(self, watched: Sequence[asyncio.Future[None]], work: Awaitable[_T]) -> _T:
        """Do `work` unless it is to stop, or one of the `watched` fails first: then raise that."""
        task = asyncio.ensure_future(work)
        stopping = asyncio.ensure_future(self._stop.wait())
        try:
            await asyncio.wait({task, stopping, *watched}, return_when=asyncio.FIRST_COMPLETED)
            for other in watched:
                if other.done():
                    other.result()
            if self._stop.is_set() and not task.done():
                raise _StoppedError
            return await task
        finally:
            stopping.cancel()
            task.cancel()
            await asyncio.gather(task, stopping, return_exceptions=True)


# --- the programs ----------------------------------------------------------------------------------------------------


def vllm_arguments() -> list[str]:
    """Beside what VllmServer says itself. A GPU build keeps its defaults (graphs, compilation)."""
    arguments = ["--dtype", dtype(), "--max-model-len", "4096", "--max-logprobs", str(TOP_K)]
    if on_cpu():
        arguments.append("--enforce-eager")
    return [*arguments, "--logits-processors", LOGITS_PROCESSOR]


def serve_settings(
    options: DemoOptions, checkpoints: Checkpoints, upstream: str, data_port: int, admin_port: int, token: str
) -> dict[str, Any]:
    """The configuration of the demo's `hemostat serve`."""
    settings: dict[str, Any] = {
        "listen": {"host": "127.0.0.1", "port": data_port},
        "admin": {"host": "127.0.0.1", "port": admin_port, "token": token},
        "upstream": {"url": upstream, "openai_sampling_defaults": True},
        "reference": {"backend": "transformers", "model": str(checkpoints.reference.absolute()), "dtype": dtype()},
        "shadow": {"rate": 1.0, "seed": options.seed % 2**63, "top_k": TOP_K},
        "calibration": dict(CALIBRATION),
        "shutdown_seconds": 5.0,
    }
    if options.force_profile is not None:
        settings["calibration"]["force"] = str(options.force_profile.absolute())
    if options.keep is not None:
        settings["records"] = {"path": str((options.keep / "records.jsonl").absolute())}
    return settings


def serve_command(config: Path, overrides: Sequence[str] = ()) -> list[str]:
    flags = [flag for override in overrides for flag in ("--set", override)]
    return [str(Path(sys.executable).parent / "hemostat"), "serve", "--config", str(config), *flags]


@contextmanager
def _stopping(vllm: VllmServer) -> Iterator[None]:
    try:
        yield
    finally:
        vllm.stop()


@contextmanager
def _serving(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Hemostat itself, its output in `log`."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            tied(command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={name: value for name, value in os.environ.items() if not name.startswith("HEMOSTAT_")},
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOPS_WITHIN)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


async def _children(vllm: VllmServer, serve: subprocess.Popen[bytes], logs: Path) -> None:
    """Raises as soon as one of the two programs has ended."""
    while True:
        if (code := vllm.poll()) is not None:
            raise VllmFailure(f"vLLM ended with code {code}; {vllm.log_tail()}")
        if (code := serve.poll()) is not None:
            raise DemoFailure(f"hemostat serve ended with code {code}; {_tail(logs)}")
        await asyncio.sleep(REFRESH)


def _tail(logs: Path) -> str:
    log = logs / "hemostat.log"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-25:]
    return "\n".join([f"the end of {log}:", *lines])


async def _warm_up(vllm: VllmServer) -> None:
    body = {"model": vllm.model, "prompt": "Hello", "max_tokens": 2}
    async with httpx.AsyncClient(timeout=120.0, trust_env=False) as http:
        try:
            (await http.post(f"{vllm.url}/v1/completions", json=body)).raise_for_status()
        except httpx.HTTPError as error:
            raise DemoFailure(f"vLLM's first answer was none ({error!r}); {vllm.log_tail()}") from None


async def _refresh(admin: httpx.AsyncClient, scene: view.Scene) -> None:
    scene.status = await _asked(admin, "/api/v1/status")
    scene.decisions = (await _asked(admin, "/api/v1/profiles"))["events"]


async def _asked(admin: httpx.AsyncClient, path: str) -> dict[str, Any]:
    response = await admin.get(path)
    response.raise_for_status()
    found: dict[str, Any] = response.json()
    return found


def _queued(scene: view.Scene) -> int:
    return int(scene.status.get("queue", {}).get("depth", 0))


def _port(preferred: int) -> int:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", preferred))
        except OSError:
            return free_port()
    return preferred
