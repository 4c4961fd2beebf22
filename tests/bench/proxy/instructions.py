"""Instructions that a relay takes for a request, without sockets: `python -m tests.bench.proxy.instructions`.

A client's connection gets a small chat completion, the upstream's connection the answer, over and over; nothing is
sampled or treated. valgrind counts the instructions of the whole process for two numbers of requests; the difference
is theirs, and does not depend on what else the machine does. Two starts differ by up to 4 %. Compiled and interpreted,
with one engine and with four. Takes six minutes and `apt-get install valgrind`.

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
import re
import socket
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import uvloop
from tests.bench.proxy.load import PATH, ROOT, Answers, request_body
from tests.bench.proxy.proxies import compiled_build, observing
from tests.support.paths import SOURCES

from hemostat.interception.interceptor import Interceptor
from hemostat.openai.conversation_key import conversation_key
from hemostat.relay.client_connection import ClientConnection
from hemostat.relay.relay import Relay
from hemostat.relay.upstreams.connection import UpstreamConnection
from hemostat.relay.upstreams.settings import UpstreamSettings

FEW, MANY = 200, 8200


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


async def relay(requests: int, engines: int, answer: bytes) -> None:
    settings = UpstreamSettings(tuple(f"http://127.0.0.1:{port + 1}" for port in range(engines)), health_seconds=0.0)
    instance = Relay(settings)
    instance.hook = Interceptor(observing(0.0), lambda capture: True, instance.counters.add)
    socks = socket.socketpair()
    transport = cast("asyncio.Transport", Transport(socks[0]))
    client = ClientConnection(instance._context, instance.clients)
    client.connection_made(transport)
    upstreams = {}
    for engine in instance.upstreams.engines:
        upstreams[engine.name] = connection = UpstreamConnection(engine.pool)
        connection.connection_made(transport)
        engine.pool.offer(connection)
    body = json.dumps(request_body(stream=False)).encode()
    chosen = instance.upstreams.choose(conversation_key(body))
    assert chosen is not None
    fields = f"Host: a:1\r\nContent-Type: application/json\r\nAuthorization: Bearer k\r\nContent-Length: {len(body)}"
    request = f"POST {PATH} HTTP/1.1\r\n{fields}\r\n\r\n".encode() + body
    fields = f"date: today\r\nserver: uvicorn\r\ncontent-length: {len(answer)}\r\ncontent-type: application/json"
    response = f"HTTP/1.1 200 OK\r\n{fields}\r\n\r\n".encode() + answer
    gc.collect()
    gc.freeze()  # as the relay's process does, too; a full collection would count for thousands a request
    for _ in range(requests):
        client.data_received(request)
        upstreams[chosen.name].data_received(response)
    answered = instance.counters.requests[PATH, "ok"]
    print(answered, flush=True)
    os._exit(0 if answered == requests else 1)  # without the end of the process, which takes instructions, too


def counted(requests: int, engines: int, code: Path | None, answer: Path, checkout: Path = ROOT) -> int:
    """code: the compiled relay of the checkout; None: its sources."""
    command = ["valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null", sys.executable]
    command += ["-m", "tests.bench.proxy.instructions", str(requests), str(engines), str(answer)]
    paths = [str(path) for path in ([checkout / folder for folder in SOURCES] if code is None else [code])]
    environment = os.environ | {"PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join([*paths, str(checkout)])}
    ran = subprocess.run(command, env=environment, cwd=checkout, check=True, capture_output=True, text=True)
    match = re.search(r"I *refs: *([\d,]+)", ran.stderr)
    assert match is not None, ran.stderr
    return int(match[1].replace(",", ""))


def of_request(engines: int, code: Path | None, answer: Path, checkout: Path = ROOT) -> float:
    """Instructions a request."""
    many, few = (counted(requests, engines, code, answer, checkout) for requests in (MANY, FEW))
    return (many - few) / (MANY - FEW)


def compare(beside: Path, starts: int, answer: Path) -> None:
    builds: dict[str, tuple[Path | None, Path | None]] = {"interpreted": (None, None)}
    ours, other = compiled_build(), compiled_build(beside)
    if ours is not None and other is not None:
        builds["compiled"] = (ours, other)
    for name, (ours, other) in builds.items():
        pairs = [(of_request(1, ours, answer), of_request(1, other, answer, beside)) for _ in range(starts)]
        ratios = [present / past for present, past in pairs]
        print(
            f"{name}: {statistics.median(pair[0] for pair in pairs):,.0f} instructions a request, the other checkout "
            f"{statistics.median(pair[1] for pair in pairs):,.0f}; ratio {statistics.median(ratios):.3f} "
            f"({min(ratios):.3f}-{max(ratios):.3f}) of {starts} starts",
            flush=True,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beside", type=Path, metavar="FOLDER")
    parser.add_argument("--starts", type=int, default=6, metavar="N")
    parser.add_argument("run", nargs="*", help=argparse.SUPPRESS)  # requests, engines, the answer's file
    arguments = parser.parse_args()
    if arguments.run:
        requests, engines, file = arguments.run
        uvloop.run(relay(int(requests), int(engines), Path(file).read_bytes()))
    with TemporaryDirectory(prefix="hemostat-bench-") as folder:
        answer = Path(folder, "answer.json")
        answer.write_bytes(asyncio.run(Answers.make()).json_plain)
        if arguments.beside is not None:
            compare(arguments.beside.resolve(), arguments.starts, answer)
            return 0
        built = compiled_build()
        for name, code in (("interpreted", None), *((("compiled", built),) if built is not None else ())):
            for engines in (1, 4):
                print(f"{name}, {engines} engine(s): {of_request(engines, code, answer):,.0f} instructions a request")
    return 0


if __name__ == "__main__":
    sys.exit(main())
