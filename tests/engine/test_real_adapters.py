"""The general plugin inside a real vLLM server (model runner V1, on a CPU): adapters by version, slots, isolation."""

from __future__ import annotations

import hashlib
import json
import struct
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tests.support.adapter_profiles import smollm_adapter
from tests.support.running_vllm import RunningVllm

from hemostat.engines.messages import RankReport

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

PROMPTS = ("The capital of France is", "Water boils at", "A triangle has", "The first president of the United States")
RANK = 16


class Client:
    """Requests to the server itself."""

    def __init__(self, server: RunningVllm) -> None:
        self.server = server

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        request = urllib.request.Request(
            self.server.url + path, json.dumps(body).encode(), {"content-type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=280) as answer:
                text = answer.read()
                return answer.status, json.loads(text) if text[:1] == b"{" else text.decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    def complete(self, prompt: str, model: str | None = None, tokens: int = 8) -> tuple[int, Any]:
        return self.post(
            "/v1/completions",
            {
                "model": model or self.server.model,
                "prompt": prompt,
                "max_tokens": tokens,
                "temperature": 0,
                "logprobs": 5,
                "return_token_ids": True,
            },
        )

    def answer(self, prompt: str, model: str | None = None) -> tuple[list[int], list[float]]:
        """Token ids and their logprobs."""
        status, body = self.complete(prompt, model)
        assert status == 200, body
        choice = body["choices"][0]
        return choice["token_ids"], choice["logprobs"]["token_logprobs"]

    def models(self) -> set[str]:
        with urllib.request.urlopen(f"{self.server.url}/v1/models", timeout=30) as answer:
            return {model["id"] for model in json.load(answer)["data"]}

    def unload(self, version: str) -> int:
        return self.post("/v1/unload_lora_adapter", {"lora_name": version})[0]

    def report(self) -> RankReport:
        with self.server.admin.lock:
            (report,) = self.server.admin.registry.live(self.server.admin.now)
        return report

    def until_loaded(self, expected: set[str]) -> RankReport:
        end = time.monotonic() + 30
        while time.monotonic() < end:
            report = self.report()
            if set(report.adapters) == expected:
                return report
            time.sleep(0.1)
        pytest.fail(f"{self.report()} instead of {expected}\n{self.server.log.read_text()[-3000:]}")


@pytest.fixture(scope="module")
def client(lora_server: RunningVllm) -> Client:
    return Client(lora_server)


@pytest.fixture
def offered(client: Client) -> Iterator[list[str]]:
    """Versions of two adapters that the admin port has; unloaded at the end."""
    profiles = [smollm_adapter(RANK, seed) for seed in (1, 2)]
    for profile in profiles:
        client.server.admin.files[profile.version] = profile.to_bytes()
    yield [profile.version for profile in profiles]
    for profile in profiles:
        client.unload(profile.version)
        client.server.admin.files.pop(profile.version)
    client.until_loaded(set())


def test_adapter_is_fetched_by_version_reported_and_unloaded(client: Client, offered: list[str]) -> None:
    version, _ = offered
    plain = client.answer(PROMPTS[0])
    adapted = client.answer(PROMPTS[0], version)
    assert adapted != plain
    assert version in client.models()
    report = client.until_loaded({version})
    assert report.lora is not None
    assert (report.lora.slots, report.lora.max_rank, report.lora.grouped) == (2, RANK, True)
    assert (report.lora.loaded, report.lora.was_full) == (1, False)
    assert client.unload(version) == 200
    assert client.until_loaded(set()).lora.loaded == 0  # type: ignore[union-attr]
    assert version not in client.models()
    assert client.answer(PROMPTS[0]) == plain
    # Loaded again, it is the same adapter.
    assert client.answer(PROMPTS[0], version) == adapted


def test_base_rows_beside_adapter_rows_are_untouched(client: Client, offered: list[str]) -> None:
    version, _ = offered
    alone = [client.answer(prompt) for prompt in PROMPTS]
    client.answer(PROMPTS[0], version)
    assert [client.answer(prompt) for prompt in PROMPTS] == alone
    asked = [(prompt, model) for prompt in PROMPTS for model in (None, version)]
    with ThreadPoolExecutor(len(asked)) as pool:
        in_one_batch = list(pool.map(lambda pair: client.answer(*pair), asked))
    assert [answer for (_, model), answer in zip(asked, in_one_batch, strict=True) if model is None] == alone


def test_unwanted_adapter_gives_way_so_that_a_slot_stays_free(client: Client, offered: list[str]) -> None:
    first, second = offered
    client.answer(PROMPTS[0], first)
    client.until_loaded({first})
    client.answer(PROMPTS[0], second)
    report = client.until_loaded({second})
    assert report.lora is not None
    assert not report.lora.was_full


def test_what_is_no_version_or_unknown_is_answered_as_by_vllm(client: Client) -> None:
    admin = client.server.admin
    seen = len([path for path in admin.seen if "/profiles/" in path])
    for name in ("nobody", "0" * 31, "A" * 32, "../" + "0" * 29):
        assert client.complete(PROMPTS[0], name)[0] == 404
    assert len([path for path in admin.seen if "/profiles/" in path]) == seen
    for _ in range(3):
        status, body = client.complete(PROMPTS[0], "f" * 32)
        assert status == 404, body
    assert len([path for path in admin.seen if "/profiles/" in path]) == seen + 1
    # The name by which `hemostat check` recognizes the plugin.
    status, body = client.complete(PROMPTS[0], "0" * 32)
    assert (status, "Hemostat's resolver" in json.dumps(body)) == (400, True)


def test_bytes_of_another_version_are_refused(client: Client) -> None:
    other, wanted = smollm_adapter(RANK, 3), smollm_adapter(RANK, 4)
    client.server.admin.files[wanted.version] = other.to_bytes()
    assert client.complete(PROMPTS[0], wanted.version)[0] == 404
    too_high = smollm_adapter(2 * RANK, 5)
    client.server.admin.files[too_high.version] = too_high.to_bytes()
    assert client.complete(PROMPTS[0], too_high.version)[0] == 404
    log = client.server.log.read_text()
    assert "--max-lora-rank" in log
    assert "digest" in log
    assert client.complete(PROMPTS[0])[0] == 200


def test_weights_that_are_not_finite_are_refused(client: Client) -> None:
    """A file whose digest is its version, but whose factors are NaN: an error of the client's name, and one line."""
    data = bytearray(smollm_adapter(RANK, 6).to_bytes())
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    begin, end = header["model.layers.29.mlp.down_proj.b_scale"]["data_offsets"]
    data[8 + length + begin : 8 + length + end] = struct.pack("<f", float("nan")) * ((end - begin) // 4)
    version = hashlib.sha256(data).hexdigest()[:32]
    client.server.admin.files[version] = bytes(data)
    plain = client.answer(PROMPTS[0])
    for _ in range(2):
        assert client.complete(PROMPTS[0], version)[0] == 404
    client.server.admin.files.pop(version)
    assert version not in client.models()
    assert client.answer(PROMPTS[0]) == plain
    (line,) = [line for line in client.server.log.read_text().splitlines() if version in line and "not loaded" in line]
    assert "down_proj" in line
