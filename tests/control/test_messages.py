"""What commands print, log and answer while everything fails: words, and no representations of objects."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import httpx
import pytest
from tests.support.fake_vllm import FakeVllm
from tests.support.served import AUTHORIZED, hemostat

from hemostat import cli
from hemostat_lab.demo.vllm_server import free_port

REPRESENTATION = re.compile(r"<\w+(\.\w+)*: |<\w+ object|\b\w+(Error|Exception)\(|Errno|Traceback|\bat 0x|\bNone\b")


def assert_in_words(text: str) -> None:
    assert [line for line in text.splitlines() if REPRESENTATION.search(line)] == []


async def test_a_run_in_which_everything_is_dead_is_reported_in_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    upstream, reference = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
    store = tmp_path / "store.db"
    store.write_bytes(b"no database" * 100)
    more = {
        "reference": {"backend": "vllm", "url": reference},
        "store": {"url": f"sqlite:///{store}"},
        "calibration": {"mode": "auto"},
        "adapter": {"enabled": True, "folder": str(tmp_path / "missing")},
    }
    said = []
    with hemostat(tmp_path, FakeVllm(), upstream, **more) as served:
        await served.until(lambda s: s["control"]["state"] == "reading" and "not known" in s["control"]["detail"])
        said.append((await served.get("/api/v1/status")).text)
        store.unlink()
        await served.until(lambda s: s["reference"]["state"] == "down" and s["relays"] == 1)
        answer = await served.ask("hello")
        assert answer.status_code == 502
        said.append(answer.text)
        pages = ("/api/v1/status", "/api/v1/profiles", "/readyz")
        said += [(await served.get(page)).text for page in pages]
        async with httpx.AsyncClient(base_url=served.admin, headers=AUTHORIZED) as client:
            for body in (b"", b"junk", b"{}", b'{"mode":3}'):
                refused = await client.post("/api/v1/calibration", content=body)
                assert refused.status_code == 422
                said.append(refused.text)
        await asyncio.to_thread(cli.main, ["engines", "--admin", served.admin])
        await asyncio.to_thread(cli.main, ["check", "--config", str(tmp_path / "hemostat.yaml")])
        shown = capsys.readouterr()
        said += [shown.out, shown.err]
    for command in (["engines"], ["profile", "list"]):
        assert cli.main([*command, "--admin", served.admin]) == 2
        said.append(capsys.readouterr().err)
    assert all("Connection refused" in text for text in said[-2:])
    log = served.log.read_text()
    assert f"reference down: {reference}/v1/models: " in log
    assert "store" in log
    for text in (*said, log):
        assert_in_words(text)


@pytest.mark.parametrize(
    "config",
    [
        "upstream: [",
        "upstream: 3",
        "upstream: {url: 3}",
        "upstream: {url: 'ftp://x'}",
        "upstream: {urls: []}",
        "upstream: {url: 'http://x', ca: /no/such/file}",
        "upstream: {url: 'http://x'}\nshadow: {rate: 2, top_k: many}",
        "upstream: {url: 'http://x'}\nreference: {backend: torch}",
        "upstream: {url: 'http://x'}\nreference: {backend: transformers}",
        "upstream: {url: 'http://x'}\nstore: {url: 'oracle://x'}",
        "upstream: {url: 'http://x'}\ncalibration: {mode: null}",
        "upstream: {url: 'http://x'}\nadmin: {token_file: /no/such/file}",
        "upstream: {url: 'http://x'}\nlisten: {port: 99999, tls: {certificate: /no, key: /no}}",
        "upstream: {url: 'http://x'}\nunknown: {a: 1}",
        "\x00",
    ],
)
def test_a_wrong_configuration_is_refused_in_words(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "hemostat.yaml"
    file.write_text(config)
    assert cli.main(["check", "--config", str(file)]) == 2
    shown = capsys.readouterr()
    assert shown.out + shown.err
    assert_in_words(shown.out + shown.err)
