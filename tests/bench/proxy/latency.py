"""The waits of a client at a given rate: `python latency.py PORT REQUESTS_PER_SECOND SECONDS SEED FILE` prints JSON.

Requests arrive as a Poisson process, whether earlier ones are answered or not, and each waits from the moment of its
arrival, also for a free connection. So a proxy that falls behind is seen to. A busy client would take the core of the
upstream, so this one sleeps between arrivals; what that adds is the same for all, and is subtracted with the wait for
the upstream without a proxy.
"""

from __future__ import annotations

import asyncio
import json
import random
import select
import socket
import sys
import time
from collections import deque
from pathlib import Path

CONNECTIONS = 64
QUANTILES = {"p50": 0.5, "p99": 0.99}


async def run_latency(
    port: int, requests_per_second: float, seconds: float, seed: int, request: Path
) -> dict[str, float]:
    """Returns the quantiles in microseconds. request: the file with the bytes of a request."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, __file__, str(port), str(requests_per_second), str(seconds), str(seed), str(request)),
        stdout=asyncio.subprocess.PIPE,
    )
    out = (await process.communicate())[0]
    if process.returncode:
        raise RuntimeError(f"the client of port {port} failed")
    result: dict[str, float] = json.loads(out)
    return result


def is_complete(answer: bytes) -> bool:
    """ValueError for an answer that is none of 200."""
    head, separator, body = answer.partition(b"\r\n\r\n")
    if not separator:
        return False
    if not head.startswith(b"HTTP/1.1 200"):
        raise ValueError(f"not the answer: {answer[:200]!r}")
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return len(body) >= int(line[15:])
    return body.endswith(b"0\r\n\r\n")


def waits(port: int, requests_per_second: float, seconds: float, seed: int, request: bytes) -> list[float]:
    """Returns the seconds that each request waited for its whole answer."""
    draw = random.Random(seed)
    idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(CONNECTIONS)]
    for connection in idle:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    busy: dict[socket.socket, float] = {}
    """The time at which the request of the connection arrived."""
    received: dict[socket.socket, bytes] = {}
    waiting: deque[float] = deque()
    result: list[float] = []
    start = time.perf_counter()
    arrival = start
    while arrival < start + seconds or busy or waiting:
        now = time.perf_counter()
        while arrival <= now and arrival < start + seconds:
            waiting.append(arrival)
            arrival += draw.expovariate(requests_per_second)
        while waiting and idle:
            connection = idle.pop()
            busy[connection], received[connection] = waiting.popleft(), b""
            connection.sendall(request)
        until = max(0.0, arrival - time.perf_counter()) if arrival < start + seconds else 1.0
        for connection in select.select(list(busy), [], [], until)[0]:
            data = connection.recv(1 << 16)
            if not data:
                raise ConnectionError("the connection was closed before its answer")
            received[connection] += data
            if is_complete(received[connection]):
                result.append(time.perf_counter() - busy.pop(connection))
                idle.append(connection)
        if now > start + 10 * seconds:
            raise TimeoutError(f"{len(waiting)} requests still wait")
    for connection in idle:
        connection.close()
    return result


def main() -> int:
    port, rate, seconds, seed, file = sys.argv[1:]
    taken = sorted(waits(int(port), float(rate), float(seconds), int(seed), Path(file).read_bytes()))
    print(json.dumps({name: taken[int(len(taken) * share)] * 1e6 for name, share in QUANTILES.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
