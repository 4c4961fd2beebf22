"""Instructions that a relay takes for a request, without sockets: `python -m tests.bench.proxy.instructions`.

A client's connection gets a small chat completion, the upstream's connection the answer, over and over; nothing is
sampled or treated. valgrind counts the instructions of the whole process for two numbers of requests; the difference
is theirs, and does not depend on what else the machine does. Two starts differ by up to 4 %. Compiled and interpreted,
with one engine and with four. Takes six minutes and `apt-get install valgrind`.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import uvloop
from tests.bench.proxy.load import PATH, ROOT, Answers, request_body
from tests.bench.proxy.proxies import compiled_build, observing

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


def counted(requests: int, engines: int, code: Path | None, answer: Path) -> int:
    command = ["valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null", sys.executable]
    command += ["-m", "tests.bench.proxy.instructions", str(requests), str(engines), str(answer)]
    paths = [str(path) for path in (code, ROOT) if path is not None]
    environment = os.environ | {"PYTHONHASHSEED": "0", "PYTHONPATH": os.pathsep.join(paths)}
    ran = subprocess.run(command, env=environment, cwd=ROOT, check=True, capture_output=True, text=True)
    match = re.search(r"I *refs: *([\d,]+)", ran.stderr)
    assert match is not None, ran.stderr
    return int(match[1].replace(",", ""))


def main() -> int:
    if len(sys.argv) > 1:
        uvloop.run(relay(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]).read_bytes()))
    built = compiled_build()
    with TemporaryDirectory(prefix="hemostat-bench-") as folder:
        answer = Path(folder, "answer.json")
        answer.write_bytes(asyncio.run(Answers.make()).json_plain)
        for name, code in (("interpreted", None), *((("compiled", built),) if built is not None else ())):
            for engines in (1, 4):
                many, few = (counted(requests, engines, code, answer) for requests in (MANY, FEW))
                print(f"{name}, {engines} engine(s): {(many - few) / (MANY - FEW):,.0f} instructions a request")
    return 0


if __name__ == "__main__":
    sys.exit(main())
