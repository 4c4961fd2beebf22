"""Servers for a gate whose answers are changed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tests.support.fake_vllm import FakeVllm, serving

Change = Callable[[dict[str, Any]], None]


@dataclass
class Changed(FakeVllm):
    """A server whose answers to the gate are changed. change: it gets the choice of each such answer. by_clients: only
    answers to requests without sampling parameters, as clients send them, are changed."""

    change: Change = lambda choice: None
    by_clients: bool = False

    async def generate(self, path: str, headers: Any, body: bytes, receive: Any, send: Any) -> None:
        asked = json.loads(body)
        if "return_token_ids" not in asked or (self.by_clients and "temperature" in asked):
            await super().generate(path, headers, body, receive, send)
            return

        async def changed(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = [(key, value) for key, value in message["headers"] if key.lower() != b"content-length"]
                await send({**message, "headers": headers})
                return
            answer = json.loads(message["body"])
            for choice in answer["choices"]:
                self.change(choice)
            await send({**message, "body": json.dumps(answer).encode()})

        await super().generate(path, headers, body, receive, changed)


@contextmanager
def servers(*fakes: FakeVllm) -> Iterator[list[str]]:
    if not fakes:
        yield []
        return
    with serving(fakes[0]) as url, servers(*fakes[1:]) as others:
        yield [url, *others]


def emptied(choice: dict[str, Any]) -> None:
    choice["token_ids"] = []
