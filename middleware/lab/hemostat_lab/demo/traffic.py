"""The demo's clients: concurrent requests like those of an OpenAI client."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from hemostat_calibration.messages import in_words

CONCURRENCY = 16
"""The number of requests at a time. vLLM takes a fifth less of the processor for each than with half as many."""
TIMEOUT = httpx.Timeout(300.0, connect=10.0)


@dataclass(slots=True)
class Traffic:
    """Results of the clients' requests."""

    began_at: float = 0.0
    """The time of the first request, in seconds since the epoch, as decisions have it."""
    sent: int = 0
    ok: int = 0
    failed: int = 0
    last_failure: str = ""
    last_text: str = ""


async def drive(
    url: str,
    requests: Iterator[tuple[str, dict[str, Any]]],
    limit: int | None,
    traffic: Traffic,
    may_send: Callable[[], bool] = lambda: True,
    finished: Callable[[], bool] = lambda: False,
) -> None:
    """Send `limit` requests (None: until `finished` is true, or until cancelled) to the data port at `url`, counting in
    `traffic`.

    Clients pause while `may_send` is false: both models share one machine, and captures that the reference cannot
    score in time would be dropped.
    """

    async def client(http: httpx.AsyncClient) -> None:
        while not finished() if limit is None else traffic.sent < limit:
            if not may_send():
                await asyncio.sleep(0.1)
                continue
            traffic.sent += 1
            request_id, body = next(requests)
            try:
                traffic.last_text = await complete(http, request_id, body)
                traffic.ok += 1
            except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
                traffic.failed += 1
                traffic.last_failure = f"{request_id}: {in_words(error)}"
                await asyncio.sleep(0.5)

    traffic.began_at = time.time()
    async with (
        httpx.AsyncClient(base_url=url, timeout=TIMEOUT, trust_env=False) as http,
        asyncio.TaskGroup() as clients,
    ):
        for _ in range(min(CONCURRENCY, limit or CONCURRENCY)):
            clients.create_task(client(http))


async def complete(http: httpx.AsyncClient, request_id: str, body: dict[str, Any]) -> str:
    """One chat completion's text; httpx.HTTPError, ValueError, LookupError or TypeError when the answer is invalid."""
    headers = {"x-request-id": request_id}
    if not body["stream"]:
        response = await http.post("/v1/chat/completions", json=body, headers=headers)
        if not response.is_success:
            raise ValueError(_http_error(response.status_code, response.text))
        return str(response.json()["choices"][0]["message"]["content"] or "")
    parts: list[str] = []
    done = False
    async with http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as response:
        if not response.is_success:
            raise ValueError(_http_error(response.status_code, (await response.aread()).decode(errors="replace")))
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                done = True  # read to the end of the response, so that the connection is reused
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise ValueError(str(event["error"]))
            parts += [choice["delta"].get("content") or "" for choice in event["choices"]]
    if not done:
        raise ValueError("the stream ended without [DONE]")
    return "".join(parts)


def _http_error(status: int, text: str) -> str:
    return f"HTTP {status}: {' '.join(text.split())[:300]}"
