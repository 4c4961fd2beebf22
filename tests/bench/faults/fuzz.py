"""Messages changed at random, both ways through relays: nothing may be smuggled, mixed up, lost or crash.

`python -m tests.bench.faults.fuzz --messages 1000000 --seed 1` sends as many each way, half of them through a relay
whose upstream also sends bytes behind its responses. With PYTHONPATH=FOLDER:. it runs the build in FOLDER
(`python -m tests.support.compiled FOLDER`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import uvloop
from tests.bench.faults import Row
from tests.bench.faults.fuzzing.running import Findings, Upstream, World, run
from tests.support.relay_listener import listen
from tests.support.wire import policy

from hemostat.ipc.control_end import RelayLink
from hemostat.ipc.supervised import is_compiled
from hemostat.relay import exchange

NAME = "fuzz"
TAKES = "1 minute"

MESSAGES = 20_000
"""Each way, in the table."""
CLIENTS = 24
NOTED = ("Traceback", "Exception", "ERROR", "exception was never retrieved")
"""In a relay's log."""


@asynccontextmanager
async def relay(
    upstream: int, folder: Path, findings: Findings
) -> AsyncIterator[tuple[int, asyncio.subprocess.Process]]:
    """A relay process that samples every request; its port, and the process."""
    link = RelayLink()
    relays = listen(link, folder / "control.sock")
    link.set_policy(policy(shadow_rate=1.0))
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


async def through_relay(findings: Findings, seed: int, messages: int, *, stray: bool) -> None:
    """Until there are as many messages each way. stray: see `World`."""
    world = World(findings, seed, stray=stray)
    server = await asyncio.get_running_loop().create_server(lambda: Upstream(world), "127.0.0.1", 0)
    counts = findings.counts
    with tempfile.TemporaryDirectory() as folder:
        async with relay(server.sockets[0].getsockname()[1], Path(folder), findings) as (port, process):
            await run(
                port,
                world,
                clients=CLIENTS,
                enough=lambda: (
                    min(counts["requests"], counts["responses"]) >= messages or process.returncode is not None
                ),
            )
    server.close()


async def fuzz(messages: int, seed: int) -> Findings:
    """messages: each way, a half of them with stray bytes."""
    findings = Findings()
    await through_relay(findings, seed, messages // 2, stray=False)
    await through_relay(findings, seed + 1, messages, stray=True)
    return findings


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
    options = parser.parse_args()
    started = time.monotonic()
    findings = uvloop.run(fuzz(options.messages, options.seed))
    for name, count in sorted(findings.counts.items()):
        print(f"{count:>10} {name}")
    seconds = time.monotonic() - started
    print(f"seed {options.seed}, {build()}, {seconds:.0f} s, {sum(findings.found.values())} findings")
    for name, count in findings.found.items():
        print(f"{count:>10} {name}")
    for finding in findings.shown:
        print(finding)
    return 1 if findings.found else 0


if __name__ == "__main__":
    sys.exit(main())
