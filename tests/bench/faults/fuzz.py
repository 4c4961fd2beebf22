"""Messages changed at random, both ways through relays: nothing may be smuggled, mixed up, lost or crash.

`python -m tests.bench.faults.fuzz --messages 1000000 --seed 1` sends as many each way, in pieces. A third of the pieces
goes through relays that sample every request, a third through relays that also treat half of the conversations by a
profile, and a third through relays that treat them by an adapter. In each piece half of the messages go through a relay
whose upstream also sends bytes behind its responses. With PYTHONPATH=FOLDER:. it runs the build in FOLDER
(`python -m tests.support.compiled FOLDER`).

With `--file FILE` each finished piece is a line of FILE, and a run with the same file goes on behind the last piece.
With `--seconds S` a run ends with the first piece that ends after so many seconds. So the whole may be run in parts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import uvloop
from tests.bench.faults import Row
from tests.bench.faults.fuzzing.running import Findings, Upstream, World, run
from tests.support.relay_listener import listen
from tests.support.wire import VERSION, policy

from hemostat.ipc.control_end import RelayLink
from hemostat.ipc.messages import Policy
from hemostat.ipc.supervised import is_compiled
from hemostat.relay import exchange

NAME = "fuzz"
TAKES = "1 minute"

MESSAGES = 20_000
"""Each way, in the table."""
PIECE_MESSAGES = 50_000
"""Each way, in one piece."""
CLIENTS = 24
NOTED = ("Traceback", "Exception", "ERROR", "exception was never retrieved")
"""In a relay's log."""


TREATMENTS: dict[str, Policy] = {
    "none": policy(shadow_rate=1.0),
    "profile": policy(shadow_rate=1.0, served=VERSION, tap=True),
    "adapter": policy(
        shadow_rate=1.0, served=VERSION, adapters=frozenset({VERSION}), base_models=frozenset({"m"}), answered_name="m"
    ),
}
"""The policies of relays, by the family of the profile that they treat requests by; the pieces take turns."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One piece of a run, as it is kept in the file."""

    build: str
    seed: int
    messages: int
    """The number of messages each way that were asked for."""
    treatment: str
    counts: dict[str, int]
    found: dict[str, int]
    shown: list[str]
    seconds: float


@asynccontextmanager
async def relay(
    upstream: int, folder: Path, findings: Findings, treatment: str
) -> AsyncIterator[tuple[int, asyncio.subprocess.Process]]:
    """A relay process that samples every request; its port, and the process."""
    link = RelayLink()
    relays = listen(link, folder / "control.sock")
    link.set_policy(TREATMENTS[treatment])
    config = {
        "worker": 0,
        "upstream": {
            "urls": [f"http://127.0.0.1:{upstream}"],
            "api_key": None,
            "ca": None,
            "max_connections": 512,
            "queue_seconds": 60.0,
            "health_seconds": 2.0,
            "resolve_seconds": 5.0,
            "affinity": True,
        },
        "control": {"path": str(folder / "control.sock")},
        "shutdown_seconds": 5.0,
    }
    log = folder / "log"
    with socket.create_server(("127.0.0.1", 0), backlog=2048) as listener, log.open("wb") as stderr:
        fd = listener.fileno()
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "hemostat.relay.main"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=stderr,
            pass_fds=(fd,),
        )
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(config | {"fds": [fd]}).encode() + b"\n")
        for _ in range(2):
            await process.stdout.readline()
        try:
            yield listener.getsockname()[1], process
        finally:
            if process.returncode is None:
                process.terminate()
            if (code := await process.wait()) != 0:
                findings.add("the relay ended", code)
            for line in log.read_text().splitlines():
                if any(word in line for word in NOTED):
                    findings.add("the relay's log", line)
            await relays.close()


async def through_relay(findings: Findings, seed: int, messages: int, treatment: str, *, stray: bool) -> None:
    """Until there are as many messages each way. stray: see `World`."""
    world = World(findings, seed, stray=stray, version=VERSION)
    server = await asyncio.get_running_loop().create_server(lambda: Upstream(world), "127.0.0.1", 0)
    counts = findings.counts
    with tempfile.TemporaryDirectory() as folder:
        async with relay(server.sockets[0].getsockname()[1], Path(folder), findings, treatment) as (port, process):
            await run(
                port,
                world,
                clients=CLIENTS,
                enough=lambda: (
                    min(counts["requests"], counts["responses"]) >= messages or process.returncode is not None
                ),
            )
    server.close()


async def fuzz(messages: int, seed: int, treatment: str = "none") -> Findings:
    """messages: each way, a half of them with stray bytes."""
    findings = Findings()
    await through_relay(findings, seed, messages // 2, treatment, stray=False)
    await through_relay(findings, seed + 1, messages, treatment, stray=True)
    return findings


def pieces(messages: int, seed: int, done: Sequence[Piece]) -> Iterator[Piece]:
    """Runs and yields the pieces that are missing. done: the first ones of the same run.

    Raises SystemExit if those belong to another run.
    """
    treatments = list(TREATMENTS)
    for number in range(-(-messages // PIECE_MESSAGES)):
        size = min(PIECE_MESSAGES, messages - number * PIECE_MESSAGES)
        own, treatment = seed + 2 * number, treatments[number % len(treatments)]
        if number < len(done):
            kept = done[number]
            if (kept.build, kept.seed, kept.messages, kept.treatment) != (build(), own, size, treatment):
                raise SystemExit(f"piece {number} of the file is of another run: {kept.build}, seed {kept.seed}")
            continue
        started = time.monotonic()
        findings = uvloop.run(fuzz(size, own, treatment))
        yield Piece(
            build=build(),
            seed=own,
            messages=size,
            treatment=treatment,
            counts=dict(findings.counts),
            found=dict(findings.found),
            shown=findings.shown,
            seconds=round(time.monotonic() - started, 1),
        )


def build() -> str:
    return "compiled" if is_compiled(exchange.__name__) else "interpreted"


def rows() -> Iterator[Row]:
    findings = uvloop.run(fuzz(MESSAGES, 1))
    counts = findings.counts
    yield Row(
        f"{counts['requests']} requests, {counts['responses']} responses, changed at random ({build()}): findings",
        "",
        sum(findings.found.values()),
        "0",
        not findings.found,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=MESSAGES, help="each way")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--file", type=Path, help="finished pieces, of earlier runs too")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    options = parser.parse_args()
    started = time.monotonic()
    file: Path | None = options.file
    done: list[Piece] = []
    if file is not None and file.exists():
        done = [Piece(**json.loads(line)) for line in file.read_text().splitlines()]
    for piece in pieces(options.messages, options.seed, tuple(done)):
        done.append(piece)
        print(f"seed {piece.seed}, {piece.treatment}, {piece.seconds:.0f} s: {sum(piece.found.values())} findings")
        if file is not None:
            with file.open("a") as lines:
                lines.write(json.dumps(asdict(piece)) + "\n")
        if time.monotonic() - started > options.seconds:
            break
    return told(done, options.messages)


def told(done: Sequence[Piece], messages: int) -> int:
    """Prints what was found in all pieces; returns the exit status. messages: asked for, each way."""
    counts: Counter[str] = Counter()
    found: Counter[str] = Counter()
    for piece in done:
        counts.update(piece.counts)
        found.update(piece.found)
    for name, count in sorted(counts.items()):
        print(f"{count:>10} {name}")
    finished = sum(piece.messages for piece in done)
    seconds = sum(piece.seconds for piece in done)
    print(f"{finished} of {messages} each way, {build()}, {seconds:.0f} s, {sum(found.values())} findings")
    for name, count in found.items():
        print(f"{count:>10} {name}")
    for piece in done:
        for finding in piece.shown:
            print(f"seed {piece.seed}: {finding}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
