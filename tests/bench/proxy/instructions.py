"""Instructions that a relay takes for a request, without sockets: `python -m tests.bench.proxy.instructions`.

A client's connection gets a small chat completion, the upstream's connection the answer, over and over. valgrind counts
the instructions of the whole process for two numbers of requests; the difference is theirs, and does not depend on what
else the machine does. Two starts differ by up to 4 %. Compiled and interpreted, with one engine, and with four if the
requests are untreated. Takes six minutes and `apt-get install valgrind`.

--traffic NAME   What happens to each request: nothing (`untreated`, unless another is given), it is treated by a
                 `profile` or an `adapter`, or it is `sampled` or `sampled-by-plugin`. It may be given several times.
--stream         The answers are streams, which come event by event.
--beside FOLDER  Another checkout, whose relay is measured, too: several starts of each, one after the other, and the
                 ratio of this one's instructions to the other's. With one engine only.
--starts N       Starts of each relay; 6 unless given.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import pickle
import re
import socket
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import uvloop
from tests.bench.proxy.load import PATH, ROOT, Answers, request_body
from tests.bench.proxy.proxies import compiled_build, policy
from tests.support.paths import SOURCES

from hemostat.interception.interceptor import Interceptor
from hemostat.ipc.messages import Capture, OutcomeReport, encode
from hemostat.openai.conversation_key import conversation_key
from hemostat.relay.client_connection import ClientConnection
from hemostat.relay.relay import Relay
from hemostat.relay.upstreams.connection import PIECE_BYTES, UpstreamConnection
from hemostat.relay.upstreams.settings import UpstreamSettings

UNTREATED = "untreated"
TRAFFIC = {
    UNTREATED: policy(0.0),
    "profile": policy(0.0, "profile"),
    "adapter": policy(0.0, "adapter"),
    "sampled": policy(1.0),
    "sampled-by-plugin": policy(1.0, by_plugin=True),
}
"""The policy of the relay, by traffic."""
REQUESTS = {UNTREATED: (200, 8200)}
"""Two numbers of requests, by traffic."""
FEW, MANY = 200, 2200
"""They of any other traffic, whose requests take more instructions."""


class Transport:
    """Takes all that is written. The socket is one that nothing arrives on."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    def write(self, data: bytes) -> None:
        pass

    def is_closing(self) -> bool:
        return False

    def get_extra_info(self, name: str) -> Any:
        return self._socket if name == "socket" else ("127.0.0.1", 1)


def responses(answers: Answers) -> dict[tuple[str, bool], list[bytes]]:
    """Returns the pieces in which an engine answers, by traffic, and by whether they are a stream."""
    fields = b"date: today\r\nserver: uvicorn\r\n"
    result = {}
    for traffic in TRAFFIC:
        body, events = answers.json_plain, answers.stream_plain
        if traffic == "adapter":
            body, events = answers.json_adapter, answers.stream_adapter
        elif traffic == "sampled":
            body, events = answers.json_asked, answers.stream_asked
        length = b"content-length: %d\r\ncontent-type: application/json" % len(body)
        whole = b"HTTP/1.1 200 OK\r\n" + fields + length + b"\r\n\r\n" + body
        result[traffic, False] = [whole[at : at + PIECE_BYTES] for at in range(0, len(whole), PIECE_BYTES)]
        coded = b"transfer-encoding: chunked\r\ncontent-type: text/event-stream; charset=utf-8"
        chunks = [b"%x\r\n%b\r\n" % (len(event), event) for event in events]
        result[traffic, True] = [b"HTTP/1.1 200 OK\r\n" + fields + coded + b"\r\n\r\n", *chunks, b"0\r\n\r\n"]
    return result


async def relay(requests: int, engines: int, traffic: str, pieces: list[bytes], *, stream: bool) -> None:
    reports: list[bytes] = []

    def emit(message: Capture | OutcomeReport) -> bool:
        reports[:] = [encode(message)] if isinstance(message, Capture) else []
        captured.append(None)
        return True

    captured: list[None] = []
    settings = UpstreamSettings(tuple(f"http://127.0.0.1:{port + 1}" for port in range(engines)), health_seconds=0.0)
    instance = Relay(settings, report_outcome=emit)
    instance.hook = Interceptor(TRAFFIC[traffic], emit, instance.counters.add)
    socks = socket.socketpair()
    transport = cast("asyncio.Transport", Transport(socks[0]))
    client = ClientConnection(instance._context, instance.clients)
    client.connection_made(transport)
    upstreams = {}
    for engine in instance.upstreams.engines:
        upstreams[engine.name] = connection = UpstreamConnection(engine.pool)
        connection.connection_made(transport)
        engine.pool.offer(connection)
    body = json.dumps(request_body(stream=stream)).encode()
    chosen = instance.upstreams.choose(conversation_key(body))
    assert chosen is not None
    fields = f"Host: a:1\r\nContent-Type: application/json\r\nAuthorization: Bearer k\r\nContent-Length: {len(body)}"
    request = f"POST {PATH} HTTP/1.1\r\n{fields}\r\n\r\n".encode() + body
    gc.collect()
    gc.freeze()  # as the relay's process does, too; a full collection would count for thousands a request
    for _ in range(requests):
        client.data_received(request)
        for piece in pieces:
            upstreams[chosen.name].data_received(piece)
    answered = instance.counters.requests[PATH, "ok"]
    print(answered, flush=True)
    expected = 0 if traffic == UNTREATED else requests  # captures, or outcomes of the treated arm
    os._exit(0 if answered == requests and len(captured) == expected else 1)  # the process's end takes instructions


def counted(
    requests: int, engines: int, traffic: str, code: Path | None, pieces: Path, checkout: Path, *, stream: bool
) -> int:
    """code: the compiled relay of the checkout; None: its sources."""
    command = ["valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null", sys.executable]
    command += ["-m", "tests.bench.proxy.instructions", str(requests), str(engines), traffic, str(pieces)]
    command += ["--stream"] if stream else []
    paths = [str(path) for path in ([checkout / folder for folder in SOURCES] if code is None else [code])]
    environment = os.environ | {"PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join([*paths, str(checkout)])}
    ran = subprocess.run(command, env=environment, cwd=checkout, check=True, capture_output=True, text=True)
    match = re.search(r"I *refs: *([\d,]+)", ran.stderr)
    assert match is not None, ran.stderr
    return int(match[1].replace(",", ""))


@dataclass
class Measured:
    """Requests of one traffic, whose instructions are counted."""

    traffic: str
    stream: bool
    pieces: Path
    """The path of the file with the pieces of the response."""

    def __str__(self) -> str:
        return self.traffic + (", stream" if self.stream else "")

    def instructions(self, engines: int, code: Path | None, checkout: Path = ROOT) -> float:
        """Returns the instructions a request."""
        few, many = REQUESTS.get(self.traffic, (FEW, MANY))
        if self.stream:
            few, many = few // 10, many // 10
        of_few, of_many = (
            counted(number, engines, self.traffic, code, self.pieces, checkout, stream=self.stream)
            for number in (few, many)
        )
        return (of_many - of_few) / (many - few)


def compare(beside: Path, starts: int, measured: list[Measured]) -> None:
    builds: dict[str, tuple[Path | None, Path | None]] = {"interpreted": (None, None)}
    ours, other = compiled_build(), compiled_build(beside)
    if ours is not None and other is not None:
        builds["compiled"] = (ours, other)
    for name, (ours, other) in builds.items():
        for each in measured:
            pairs = [(each.instructions(1, ours), each.instructions(1, other, beside)) for _ in range(starts)]
            ratios = [present / past for present, past in pairs]
            ours_median, other_median = (statistics.median(values) for values in zip(*pairs, strict=True))
            print(
                f"{name}, {each}: {ours_median:,.0f} instructions a request, the other checkout {other_median:,.0f}; "
                f"ratio {statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f}) of {starts} starts",
                flush=True,
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traffic", action="append", choices=TRAFFIC, metavar="NAME")
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--beside", type=Path, metavar="FOLDER")
    parser.add_argument("--starts", type=int, default=6, metavar="N")
    parser.add_argument("run", nargs="*", help=argparse.SUPPRESS)  # requests, engines, traffic, the file of the pieces
    arguments = parser.parse_args()
    if arguments.run:
        requests, engines, traffic, file = arguments.run
        pieces = pickle.loads(Path(file).read_bytes())
        uvloop.run(relay(int(requests), int(engines), traffic, pieces, stream=arguments.stream))
    with TemporaryDirectory(prefix="hemostat-bench-") as folder:
        measured = []
        for traffic, pieces in responses(asyncio.run(Answers.make())).items():
            if traffic in {(name, arguments.stream) for name in arguments.traffic or [UNTREATED]}:
                measured.append(Measured(*traffic, Path(folder, traffic[0])))
                measured[-1].pieces.write_bytes(pickle.dumps(pieces))
        if arguments.beside is not None:
            compare(arguments.beside.resolve(), arguments.starts, measured)
            return 0
        built = compiled_build()
        for name, code in (("interpreted", None), *((("compiled", built),) if built is not None else ())):
            for each in measured:
                for engines in (1, 4) if each.traffic == UNTREATED else (1,):
                    instructions = each.instructions(engines, code)
                    print(
                        f"{name}, {each}, {engines} engine(s): {instructions:,.0f} instructions a request", flush=True
                    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
