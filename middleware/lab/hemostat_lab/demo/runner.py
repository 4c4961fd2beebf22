"""`hemostat demo`: starts vLLM and Hemostat, sends prompts, shows the figures, stops everything that it started."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx
import yaml
from rich.console import Console
from rich.live import Live

from hemostat.commands.arguments import EXIT_INTERRUPTED
from hemostat.report.written_files import write_atomically
from hemostat_calibration.errors import HemostatError
from hemostat_calibration.messages import with_detail
from hemostat_lab.demo import prompts, view
from hemostat_lab.demo.checkpoints import Checkpoints, cached_checkpoints
from hemostat_lab.demo.options import RECORDS, DemoFailure, DemoOptions, check_destinations
from hemostat_lab.demo.programs import (
    POLL_SECONDS,
    log_tail,
    preferred_port,
    serve_command,
    serve_settings,
    serving,
    stopping,
    vllm_arguments,
    vllm_environment,
    warm_up,
    watch_programs,
)
from hemostat_lab.demo.prompts import generated_prompts
from hemostat_lab.demo.result import page
from hemostat_lab.demo.token_classes import losses_by_class
from hemostat_lab.demo.traffic import drive
from hemostat_lab.demo.vllm_server import VllmServer, runnable
from hemostat_lab.models.checkpoint_folders import FolderTakenError, copy_checkpoint

SERVED_NAME = "smollm2-135m-instruct"
DATA_PORT, ADMIN_PORT = 8080, 8081
"""Used if they are free, otherwise any free port."""
QUEUE_SOFT_LIMIT = 12
"""The demo's clients pause while more captures than this wait for the reference."""
LINE_SECONDS = 5.0
REFRESH_SECONDS = 2.0
"""The seconds between two looks at the status while requests are sent: its figures take the control process time."""
REFERENCE_TIMEOUT_SECONDS = 180.0
REFERENCE_DETAIL_SECONDS = 5.0
"""Hemostat polls vLLM every few seconds: before that its detail is out of date and not printed."""
IDLE_SECONDS = 3.0
"""The queue is empty and the counters have not changed for this long: done. Relays send counters periodically."""
STALLED_SECONDS = 90.0
"""The queue is not empty but the counters have not changed for this long: give up."""

_T = TypeVar("_T")


class _StoppedError(Exception):
    """Ctrl-C or SIGTERM."""


def run(options: DemoOptions) -> int:
    """Run the demo. Exit code: 0 finished, or stopped without `--requests`; 1 failed; 130 stopped before the end.

    Raises HemostatError for a user error, before anything is started.
    """
    loaded = prompts.load(options.prompts)
    if options.prompts is None:
        loaded += generated_prompts()
    check_destinations(options)
    return asyncio.run(_Demo(options, loaded).run())


class _Demo:
    def __init__(self, options: DemoOptions, loaded: list[prompts.Prompt]) -> None:
        self._options = options
        self._prompts = loaded
        self._stop = asyncio.Event()
        self._console = Console(markup=False, highlight=False, soft_wrap=False)
        self._began = time.monotonic()

    def _say(self, text: str) -> None:
        self._console.print(f"{time.monotonic() - self._began:5.0f} s  {text}", soft_wrap=True)

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for sig in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(sig, self._stop.set)
        scratch = Path(
            tempfile.mkdtemp(prefix="hemostat-demo-")
        )  # only this user can read it: the configuration has a token
        failed = False
        try:
            await self._main(scratch)
        except _StoppedError:
            self._say("stopped")
            return 0 if self._options.requests is None else EXIT_INTERRUPTED
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
        logs, records = scratch, (options.keep or scratch) / RECORDS
        if options.keep is not None:
            logs = options.keep / "logs"
            logs.mkdir(exist_ok=True)
            records.unlink(missing_ok=True)
        self._say("the checkpoints of both models: made at the first run, kept for the next ones")
        checkpoints = await self._first([], asyncio.to_thread(self._checkpoints))
        served = await self._first([], asyncio.to_thread(runnable, checkpoints.compressed, self._say))
        data_port, admin_port = preferred_port(DATA_PORT), preferred_port(ADMIN_PORT)
        scene = view.Scene(
            SERVED_NAME, f"http://127.0.0.1:{data_port}", f"http://127.0.0.1:{admin_port}", str(logs.absolute())
        )
        engine_token = secrets.token_urlsafe(24)
        vllm = VllmServer(
            served,
            SERVED_NAME,
            logs / "vllm.log",
            vllm_arguments(),
            vllm_environment(scene.admin_url, engine_token),
        )
        config = scratch / "hemostat.yaml"
        settings = serve_settings(options, checkpoints, vllm.url, data_port, admin_port, engine_token)
        settings["records"] = {"path": str(records.absolute())}
        config.write_text(yaml.safe_dump(settings, sort_keys=False))
        self._say(f"starting vLLM on the {options.compression} model, and Hemostat with the reference in process")
        with stopping(vllm):
            vllm.start()
            with serving(serve_command(config, options.overrides), logs / "hemostat.log") as serve:
                try:
                    await self._measure(scene, vllm, serve, logs)
                finally:
                    self._write_page(scene, checkpoints, records)

    def _checkpoints(self) -> Checkpoints:
        cached = cached_checkpoints(self._options.compression, self._say)
        keep = self._options.keep
        if keep is None:
            return cached
        kept = Checkpoints(keep / "reference", keep / "compressed")
        try:
            copy_checkpoint(cached.reference, kept.reference, self._say)
            copy_checkpoint(cached.compressed, kept.compressed, self._say)
        except FolderTakenError as taken:
            raise DemoFailure(f"--keep: {taken.what}; name another folder") from None
        return kept

    async def _measure(self, scene: view.Scene, vllm: VllmServer, serve: subprocess.Popen[bytes], logs: Path) -> None:
        """Send the prompts and show the figures, while both programs run."""
        options = self._options
        async with (
            httpx.AsyncClient(base_url=scene.admin_url, timeout=10.0, trust_env=False) as admin,
            self._background(self._poll(admin, scene), watch_programs(vllm, serve, logs)) as watched,
        ):
            await self._first(watched, self._until_ready(scene, vllm))
            self._say(f"ready. Console {scene.admin_url}/   data port {scene.data_url}/v1")
            for line in self._plan():
                self._say(line)
            requests = prompts.plan(self._prompts, SERVED_NAME, options.seed)
            driving = drive(
                scene.data_url,
                requests,
                options.requests,
                scene.traffic,
                lambda: _queued(scene) < QUEUE_SOFT_LIMIT,
                lambda: scene.finished,
            )
            try:
                async with self._shown(scene):
                    await self._first(watched, driving)
                    scene.note = "all requests sent; waiting for the reference to score the rest"
                    await self._first(watched, self._drained(scene))
                    scene.note = ""
            finally:
                with contextlib.suppress(httpx.HTTPError, ValueError):
                    await _refresh(admin, scene)
                self._finish(scene)
            if not scene.traffic.ok:
                raise DemoFailure("no request succeeded")

    def _plan(self) -> list[str]:
        """Returns what the demo does, and how it differs from production, in lines."""
        requests = self._options.requests
        least, most = view.REQUESTS_AFTER_PROMOTION, view.MOST_AFTER_PROMOTION
        after = f"{least} to {most} requests after a promotion, when the difference of the arms has an interval"
        end = f"after {requests} requests" if requests else after
        return [
            "every request is scored by the reference; an adapter is made of 30 % of the prompts and tested on the "
            f"others; the demo ends {end}, or at Ctrl-C",
            "evidence.cycle_hours is 0 here, so that minutes suffice for a proof; in production keep its default: a "
            "profile is promoted only after two cycles of the traffic, such as days",
        ]

    def _finish(self, scene: view.Scene) -> None:
        """Print the last figures and write the report, also after an early end."""
        if not scene.status:
            return
        self._say(view.status_line(scene))
        lines = [view.adapter_line(scene.status), view.promotion_line(scene), view.arms_line(scene.status)]
        for line in [*view.kind_lines(scene), *lines]:
            if line:
                self._say(line)
        if scene.traffic.last_failure:
            self._say(f"last failure: {scene.traffic.last_failure}")
        if self._options.report is not None:
            text = json.dumps(view.report(scene), indent=2)
            self._options.report.write_text(text + "\n", encoding="utf-8")
            self._say(f"report: {self._options.report}")

    def _write_page(self, scene: view.Scene, checkpoints: Checkpoints, records: Path) -> None:
        """Writes the page with the result, also after an early end."""
        if not scene.status:
            return
        try:
            classes = losses_by_class(records, checkpoints.reference)
        except (OSError, ValueError) as error:
            self._say(f"the loss by class of token is not known: {error}")
            classes = []
        write_atomically(self._options.html, page(scene, checkpoints, classes).encode())
        self._say(f"what it cost, what was recovered, and what to do next: {self._options.html.absolute()}")

    async def _until_ready(self, scene: view.Scene, vllm: VllmServer) -> None:
        """Wait until both models answer, and their vocabularies were compared."""
        await asyncio.to_thread(vllm.wait_ready, progress=self._say, cancelled=self._stop.is_set)
        self._say("vLLM answers; warming up")
        await warm_up(vllm)
        printed = ""
        began = time.monotonic()
        while (reference := scene.status.get("reference", {})).get("state") != "ready":
            state, detail = reference.get("state", "starting"), reference.get("detail", "")
            if state == "mismatch":
                raise DemoFailure(f"the two models do not match: {detail}")
            if time.monotonic() - began > REFERENCE_TIMEOUT_SECONDS:
                raise DemoFailure(f"the reference is not ready ({state}): {detail}\n{log_tail(Path(scene.logs))}")
            late = time.monotonic() - began > REFERENCE_DETAIL_SECONDS
            if late and (news := f"reference {with_detail(state, detail)}") != printed:
                self._say(news)
                printed = news
            await asyncio.sleep(POLL_SECONDS)
        while (learner := scene.status["learner"])["state"] == "starting":
            if (news := f"learner {with_detail(learner['state'], learner['detail'])}") != printed:
                self._say(news)
                printed = news
            await asyncio.sleep(POLL_SECONDS)

    async def _drained(self, scene: view.Scene) -> None:
        """Wait until every capture is scored, or until nothing changes any more."""
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
            if not waiting and (accounted >= scene.traffic.ok or still > IDLE_SECONDS):
                return
            if still > STALLED_SECONDS:
                self._say(f"{waiting} captures were not scored within {STALLED_SECONDS:.0f} s; continuing without them")
                return
            await asyncio.sleep(POLL_SECONDS)

    async def _poll(self, admin: httpx.AsyncClient, scene: view.Scene) -> None:
        """Update the scene from the admin port; while it does not answer, the scene keeps the last status."""
        while True:
            with contextlib.suppress(httpx.HTTPError, ValueError):
                await _refresh(admin, scene)
            scene.elapsed = time.monotonic() - self._began
            await asyncio.sleep(POLL_SECONDS if scene.traffic.sent == 0 else REFRESH_SECONDS)

    @asynccontextmanager
    async def _shown(self, scene: view.Scene) -> AsyncIterator[None]:
        """Show the live view, or print a line every few seconds."""
        if self._options.console and self._console.is_terminal:
            with Live(console=self._console, get_renderable=lambda: view.render(scene), refresh_per_second=4):
                yield
            return

        async def lines() -> None:
            last_event, background = 0.0, ""
            while True:
                self._say(view.status_line(scene))
                if (now := scene.status.get("background", "")) not in {"", background}:
                    self._say(f"background: {now}")
                background = now
                for event in [e for e in reversed(scene.decisions) if e["at"] > last_event]:
                    self._say(view.decision_line(event))
                    last_event = event["at"]
                await asyncio.sleep(LINE_SECONDS)

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
        """The result of `work`. Raises _StoppedError on a signal, or the error of the first of `watched` that fails."""
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


async def _refresh(admin: httpx.AsyncClient, scene: view.Scene) -> None:
    scene.status = await _get_json(admin, "/api/v1/status")
    scene.update_decisions((await _get_json(admin, "/api/v1/profiles"))["events"])


async def _get_json(admin: httpx.AsyncClient, path: str) -> dict[str, Any]:
    response = await admin.get(path)
    response.raise_for_status()
    body: dict[str, Any] = response.json()
    return body


def _queued(scene: view.Scene) -> int:
    return int(scene.status.get("queue", {}).get("depth", 0))
