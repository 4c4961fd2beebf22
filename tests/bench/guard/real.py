"""On a real vLLM: a profile that is learned on open questions, then JSON asked for in words, then structured output.

The compressed model (W4A16) runs in vLLM, `hemostat serve` before it with calibration on `auto`, as in `make demo`:

1. Open questions until a profile serves a kind of traffic, or `OPEN_REQUESTS` were sent.
2. `EXTRACTIONS` requests that ask for JSON in words, greedy. Is the answer a JSON object? By arm.
3. `EXTRACTIONS` requests with `response_format: json_object`: none may be treated.

The answer is judged here, by `outcomes.is_json_object` of the recovery benchmark, not by Hemostat's own observer.
"""

from __future__ import annotations

import json
import math
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from tests.bench.guard import Row
from tests.bench.recovery.outcomes import is_json_object

from hemostat_calibration.profiles.profile import IDENTITY
from hemostat_calibration.statistics.two_arms import TwoArms
from hemostat_lab.demo.checkpoints import cached_checkpoints
from hemostat_lab.demo.options import DemoOptions
from hemostat_lab.demo.programs import serve_command, serve_settings, serving, stopping, vllm_arguments
from hemostat_lab.demo.prompts import SUBJECTS, TASKS
from hemostat_lab.demo.vllm_server import VllmServer, free_port, runnable

NAME = "real"
TAKES = "about 25 minutes, as it starts vLLM and sends some 900 requests"
ONLY_BY_NAME = True
TEST_LIVES = 0
"""It needs a vLLM: not among the tests of worlds."""

MODEL = "smollm2-135m-instruct"
TOKEN = "bench"
OPEN_REQUESTS = 800
EXTRACTIONS = 200
AFTER_PROMOTION = 60
"""Open questions that follow on the promotion."""
CLIENTS = 8
QUEUE_LIMIT = 32
"""Clients pause while more captures than this wait for the reference."""

NAMES = ("Anna", "Bela", "Chidi", "Dilnoza", "Emre", "Fatima", "Goran", "Hana", "Ivo", "Jun")
CITIES = ("Lisbon", "Osaka", "Nairobi", "Quito", "Riga", "Perth", "Oslo", "Izmir", "Lyon", "Hanoi")
SENTENCES = (
    "{name} moved to {city} in {month} {year} and opened a small bakery there.",
    "In {month} {year}, {name} gave a talk on bridges in {city}.",
)
MONTHS = ("January", "March", "May", "July", "September", "November")


@dataclass(frozen=True)
class Answer:
    """status: of HTTP. text: of the first choice."""

    status: int
    text: str


def open_questions() -> Iterator[str]:
    """In random order, without those that ask for JSON or code."""
    tasks = [task for task in TASKS if "JSON" not in task and "Python" not in task]
    texts = [task.format(subject) for subject in SUBJECTS for task in tasks]
    yield from random.Random(11).sample(texts, len(texts))


def extractions() -> list[str]:
    """`EXTRACTIONS` different ones."""
    prompts = []
    for n in range(EXTRACTIONS):
        sentence = SENTENCES[n % 2].format(
            name=NAMES[n // 2 % 10], city=CITIES[n // 20 % 10], month=MONTHS[n % 6], year=1990 + n % 30
        )
        prompts.append(f'Extract the data as a JSON object with the keys "name", "city" and "year". Text: "{sentence}"')
    return prompts


class Run:
    """The running programs. kept: folder with records.jsonl."""

    def __init__(self, url: str, admin: str, kept: Path) -> None:
        self._http = httpx.Client(base_url=url, timeout=300.0, trust_env=False)
        self._admin = httpx.Client(base_url=admin, timeout=10.0, trust_env=False)
        self._kept = kept

    def status(self) -> dict[str, Any]:
        result: dict[str, Any] = self._admin.get("/api/v1/status").raise_for_status().json()
        return result

    def counted(self, metric: str) -> Counter[tuple[str, ...]]:
        """By (arm, reason)."""
        text = self._admin.get("/metrics").raise_for_status().text
        counts: Counter[tuple[str, ...]] = Counter()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == metric:
                    counts[sample.labels["arm"], sample.labels["reason"]] += int(sample.value)
        return counts

    def wait(self, what: str, done: Callable[[], bool], seconds: float) -> None:
        ends = time.monotonic() + seconds
        while not done():
            if time.monotonic() > ends:
                raise SystemExit(f"not within {seconds:.0f} s: {what}; see {self._kept}/hemostat.log")
            time.sleep(0.5)

    def served(self) -> dict[str, str]:
        """Version by kind."""
        return {kind["kind"]: kind["version"] for kind in self.status()["profiles"]["kinds"] if kind["version"]}

    def ask(self, request_id: str, text: str, **parameters: Any) -> Answer:
        body = {"model": MODEL, "messages": [{"role": "user", "content": text}], **parameters}
        answer = self._http.post("/v1/chat/completions", json=body, headers={"x-request-id": request_id})
        if not answer.is_success:
            return Answer(answer.status_code, "")
        return Answer(200, str(answer.json()["choices"][0]["message"]["content"] or ""))

    def ask_all(self, requests: Sequence[tuple[str, str]], **parameters: Any) -> dict[str, Answer]:
        """By request id; `CLIENTS` at a time."""

        def send_request(request: tuple[str, str]) -> Answer:
            self.wait("captures are scored", lambda: self.status()["queue"]["depth"] < QUEUE_LIMIT, 300.0)
            return self.ask(*request, **parameters)

        with ThreadPoolExecutor(CLIENTS) as pool:
            return dict(zip((request_id for request_id, _ in requests), pool.map(send_request, requests), strict=True))

    def drain(self) -> None:
        def idle() -> bool:
            status = self.status()
            return not status["queue"]["depth"] and not status["requests"].get("pending", 0)

        self.wait("all captures are scored", idle, 300.0)
        time.sleep(2.0)  # relays send their counters once a second

    def records(self) -> dict[str, dict[str, Any]]:
        """By request id."""
        lines = (self._kept / "records.jsonl").read_text().splitlines()
        return {record["request_id"]: record for record in map(json.loads, lines)}


def rows(lives: int, seed: int) -> Iterator[Row]:
    """lives, seed: not used, as this is one run."""
    with tempfile.TemporaryDirectory(prefix="hemostat-bench-") as folder:
        kept = Path(os.environ.get("BENCH_KEEP", folder))
        kept.mkdir(parents=True, exist_ok=True)
        checkpoints = cached_checkpoints("w4a16", print)
        data_port, admin_port = free_port(), free_port()
        admin = f"http://127.0.0.1:{admin_port}"
        environment = {"HEMOSTAT_ADMIN_URL": admin, "HEMOSTAT_ENGINE_TOKEN": TOKEN}
        vllm = VllmServer(
            runnable(checkpoints.compressed, print), MODEL, kept / "vllm.log", vllm_arguments(), environment
        )
        options = DemoOptions(keep=kept)
        settings = serve_settings(options, checkpoints, vllm.url, data_port, admin_port, TOKEN)
        config = kept / "hemostat.yaml"
        config.write_text(json.dumps(settings))
        with stopping(vllm):
            vllm.start()
            with serving(serve_command(config), kept / "hemostat.log"):
                vllm.wait_ready(progress=print)
                run = Run(f"http://127.0.0.1:{data_port}", admin, kept)
                run.wait("the reference is ready", lambda: _ready(run), 300.0)
                yield from _phases(run)


def _ready(run: Run) -> bool:
    try:
        status = run.status()
    except httpx.HTTPError:
        return False
    return bool(status["reference"]["state"] == "ready" and status["learner"]["state"] != "starting")


def _phases(run: Run) -> Iterator[Row]:
    questions = open_questions()
    sampled = {"temperature": 1.0, "max_tokens": 48}
    sent = 0

    def ask_open(count: int) -> None:
        nonlocal sent
        run.ask_all([(f"open-{sent + n}", next(questions)) for n in range(count)], **sampled)
        sent += count

    while sent < OPEN_REQUESTS and not run.served():
        ask_open(40)
        print(
            f"  open questions: {sent}, scored {run.status()['requests']['scored']}, serving {run.served() or IDENTITY}"
        )
    served = run.served()
    yield Row(
        "real vLLM: open questions until a profile serves a kind",
        sent if served else f"none after {sent}",
        f"≤ {OPEN_REQUESTS}",
        holds=bool(served),
    )
    ask_open(AFTER_PROMOTION)

    answers = run.ask_all([(f"json-{n}", text) for n, text in enumerate(extractions())], temperature=0.0, max_tokens=64)
    run.drain()
    yield from _json_rows(run, answers)

    before = run.counted("hemostat_calibration_requests_total")
    formatted = run.ask_all(
        [(f"format-{n}", text) for n, text in enumerate(extractions())],
        **{"temperature": 0.0, "max_tokens": 96, "response_format": {"type": "json_object"}},
    )
    run.drain()
    after = run.counted("hemostat_calibration_requests_total")
    treated = sum(count for (arm, _), count in (after - before).items() if arm == "treated")
    valid = sum(is_json_object(answer.text) for answer in formatted.values())
    yield Row("real vLLM: requests with response_format that were treated", treated, "0", holds=treated == 0)
    yield Row("real vLLM: valid JSON with response_format", f"{valid} of {len(formatted)}", "", holds=True)

    still = run.served()
    kept = [kind for kind, version in served.items() if still.get(kind) == version or still.get(kind)]
    yield Row(
        "real vLLM: kinds of open questions that keep a profile",
        f"{len(kept)} of {len(served)}",
        f"{len(served)}",
        holds=bool(served) and len(kept) == len(served),
    )
    gains = _gains(run, served)
    yield Row(
        "real vLLM: gain of what serves on open questions, nats a token",
        ", ".join(f"{kind}: {gain:+.3f}" for kind, gain in gains.items()) or "none",
        "> 0",
        holds=bool(gains) and all(gain > 0.0 for gain in gains.values()),
    )


def _json_rows(run: Run, answers: Mapping[str, Answer]) -> Iterator[Row]:
    records = run.records()
    arms = TwoArms()
    by_arm: Counter[str] = Counter()
    kinds: set[str] = set()
    for request_id, answer in answers.items():
        record = records.get(request_id)
        if record is None:
            by_arm["not scored"] += 1
            continue
        by_arm[record["arm"]] += 1
        kinds.add(record["kind"])
        if record["arm"] in ("treated", "control"):
            arms = arms.update(treated=record["arm"] == "treated", bad=not is_json_object(answer.text))
    valid = sum(is_json_object(answer.text) for answer in answers.values())
    yield Row("real vLLM: JSON asked for in words, valid", f"{valid} of {len(answers)}", "", holds=True)
    shares = ", ".join(f"{arm} {count}" for arm, count in sorted(by_arm.items()))
    yield Row(f"real vLLM: arms of these requests ({', '.join(sorted(kinds))})", shares, "", holds=True)
    if not arms.treated:
        still = {kind: run.served().get(kind, IDENTITY) for kind in kinds}
        identity = all(version == IDENTITY for version in still.values())
        yield Row("real vLLM: valid JSON, treated − control", "the kind is at identity", "or not wholly < 0", identity)
        return
    bad = arms.get()
    low, high = -bad.high, -bad.low
    at_identity = not any(run.served().get(kind) for kind in kinds)
    measured = "unknown" if math.isnan(bad.mean) else f"{-bad.mean:+.3f} ({low:+.3f} to {high:+.3f})"
    yield Row(
        "real vLLM: valid JSON, treated − control (95 %)", measured, "not wholly < 0", holds=high >= 0.0 or at_identity
    )


def _gains(run: Run, served: Mapping[str, str]) -> dict[str, float]:
    """Mean gain by request over identity, of what still serves, from the watch."""
    gains = {}
    for kind in run.status()["profiles"]["kinds"]:
        watch = kind.get("watch")
        if kind["kind"] in served and watch and watch.get("mean_gain") is not None:
            gains[kind["kind"]] = float(watch["mean_gain"])
    return gains
