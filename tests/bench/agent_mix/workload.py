"""The requests of a mix file, and how they are sent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import yaml

MIX = Path(__file__).with_name("mix.yaml")
LABEL = "X-Hemostat-Label"
SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class Planned:
    """One request. name: of the entry of the mix that it is of."""

    name: str
    server: str
    route: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Mix:
    """servers: name -> arguments of vLLM. names: of the entries."""

    servers: dict[str, list[str]]
    names: list[str]
    entries: list[dict[str, Any]]
    prompts: list[str]
    defaults: dict[str, dict[str, Any]]

    @classmethod
    def load(cls, path: Path = MIX) -> Mix:
        told = yaml.safe_load(path.read_text(encoding="utf-8"))
        entries = told["requests"]
        return cls(told["servers"], [entry["name"] for entry in entries], entries, told["prompts"], told["defaults"])

    def plan(self, model: str) -> Iterator[Planned]:
        """For ever: entries by their weights, each evenly spread, prompts in turn, every other one a stream."""
        sent = dict.fromkeys(self.names, 0)
        number = 0
        while True:
            entry = min(
                self.entries,
                key=lambda candidate: ((sent[candidate["name"]] + 0.5) / candidate["weight"], candidate["name"]),
            )
            turn = sent[entry["name"]]
            sent[entry["name"]] += 1
            body = {"model": model, **self.defaults[entry["route"]], **entry["body"]}
            if entry["stream"] == "both":
                body["stream"] = turn % 2 == 1
            # A number makes every prompt another conversation.
            prompt = f"{self.prompts[number % len(self.prompts)]} ({number})"
            number += 1
            yield Planned(entry["name"], entry.get("server", "plain"), entry["route"], filled(body, prompt))


def filled(value: Any, prompt: str) -> Any:
    """The value with `prompt` in place of {prompt} in its texts."""
    match value:
        case str():
            return value.replace("{prompt}", prompt)
        case dict():
            return {key: filled(item, prompt) for key, item in value.items()}
        case list():
            return [filled(item, prompt) for item in value]
    return value


def send(url: str, planned: Sequence[Planned], at_once: int, *, labelled: bool = True) -> dict[str, list[str]]:
    """Send them all; by name, what was answered with an error: status and the body's beginning."""
    failed: dict[str, list[str]] = {}

    def send_request(request: Planned) -> None:
        headers = {LABEL: request.name} if labelled else {}
        answer = httpx.post(url + request.route, json=request.body, headers=headers, timeout=SECONDS)
        if answer.status_code != 200 or b'"error":{' in answer.content:
            failed.setdefault(request.name, []).append(f"{answer.status_code}: {answer.text[:200]}")

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(send_request, planned))
    return failed


def first(mix: Mix, model: str, requests: int, server: str | None = None) -> list[Planned]:
    """Of the first `requests` of the plan, those for this server (None: all)."""
    return [request for request in islice(mix.plan(model), requests) if server in (None, request.server)]
