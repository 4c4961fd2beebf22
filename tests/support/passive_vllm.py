"""A real vLLM server in passive mode: its plugin samples by a policy, and hands on what it has sampled."""

from __future__ import annotations

import json
import time
import urllib.request
from typing import Any

import numpy as np
from tests.support.running_vllm import VLLM_ARGUMENTS, RunningVllm

from hemostat.engines.messages import TapAnswer
from hemostat_calibration.passive import PassivePolicy

POLICY = PassivePolicy(
    rate=1.0,
    allow_on=False,
    top_k=5,
    max_tokens=2048,
    tap=False,
    grammars=False,
    labels=frozenset(),
    salt=b"salt",
    client_header="authorization",
)
PASSIVE_ARGUMENTS = VLLM_ARGUMENTS[:-2]
"""The server's arguments without the logits processor, which passive mode does not need."""


class PassiveVllm:
    """A server whose plugin samples every request. taken: the answers that the plugin has handed on."""

    def __init__(self, server: RunningVllm) -> None:
        self.server = server
        self.taken: list[TapAnswer] = []
        self.plugins = server.admin.registry.passive
        self.before = self.plugins.on_answer, self.plugins.policy, self.plugins.enabled
        self.plugins.on_answer = self.taken.append
        self.plugins.policy, self.plugins.enabled = POLICY, True
        time.sleep(5.0)  # the plugin asks for its policy every two seconds

    def end(self) -> None:
        """Ends passive mode on a server that other tests use, too."""
        self.plugins.on_answer, self.plugins.policy, self.plugins.enabled = self.before
        time.sleep(5.0)

    def post(self, route: str, body: dict[str, Any], headers: dict[str, str] | None = None) -> bytes:
        data = json.dumps({"model": self.server.model, **body}).encode()
        named = {"content-type": "application/json", **(headers or {})}
        request = urllib.request.Request(self.server.url + route, data, named)
        with urllib.request.urlopen(request, timeout=280) as response:
            return bytes(response.read())

    def wait(self, number: int) -> list[TapAnswer]:
        give_up = time.monotonic() + 60
        while len(self.taken) < number:
            assert time.monotonic() < give_up, self.server.log.read_text()[-2000:]
            time.sleep(0.1)
        result, self.taken[:] = list(self.taken), []
        return result


def ids_of(answer: TapAnswer) -> list[int]:
    return np.frombuffer(answer.token_ids, "<i4").tolist()  # type: ignore[no-any-return]
