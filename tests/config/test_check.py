"""`hemostat check`, against servers that answer as vLLM does."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import re
import shutil
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.support import postgres
from tests.support.admin_server import served
from tests.support.certificates import certificate
from tests.support.fake_lora import FakeLora
from tests.support.fake_vllm import FakeVllm, running
from tests.support.tiny_checkpoints import make_pair

from hemostat import __version__
from hemostat.commands.setup_check import Finding, State, check, exit_code, table
from hemostat.config.schema import Settings
from hemostat.control.composition import Control
from hemostat.engines.messages import AnswerMessage
from hemostat.ipc.addresses import server_context
from hemostat.ipc.control_end import RelayLink
from hemostat.ipc.relay_listener import RelayListener, Security
from hemostat.reference.match import served_as_reference
from hemostat.reference.protocol import ReferenceInfo
from hemostat.reference.server import VllmServer
from hemostat_calibration.passive import PassiveCounts
from hemostat_lab.compression.checkpoint_writer import compress
from hemostat_lab.demo.vllm_server import free_port

AUTO = {"calibration": {"mode": "auto"}}


async def findings_of(
    upstream: dict[str, Any],
    reference: dict[str, Any] | None,
    models: dict[str, Any] | None = None,
    folder: str | None = None,
    **sections: Any,
) -> dict[str, Finding]:
    """folder: `reference.folder`."""
    async with (
        running(FakeVllm(**({"plugin": True} | upstream))) as ours,
        running(FakeVllm(**(reference or {}))) as theirs,
    ):
        settings = Settings.model_validate(
            {
                "upstream": {"url": ours.url},
                "reference": {"backend": "vllm", "url": theirs.url, "models": models or {}, "folder": folder}
                if reference is not None
                else {"folder": folder},
            }
            | sections
        )
        result = await check(settings)
    assert exit_code(result) == any(f.state is State.NO for f in result)
    assert all("\n" not in f.detail + f.fix for f in result)
    assert len({f.what for f in result}) == len(result)
    return {f.what: f for f in result}


def states(findings: dict[str, Finding]) -> dict[str, str]:
    return {what: f.state.value for what, f in findings.items()}


async def test_everything_works() -> None:
    result = await findings_of({}, {}, calibration={"mode": "auto"})
    assert states(result) == {
        "store": "note",
        "evidence": "ok",
        "engine token": "note",
        "upstream": "ok",
        "max_logprobs": "ok",
        "return_token_ids": "ok",
        "logprobs_mode": "ok",
        "reasoning": "note",
        "engine plugin": "ok",
        "reference": "ok",
        "reference score": "ok",
        "same tokens": "ok",
    }
    assert "serves fake, up to 2048 tokens (vLLM 0.32.0)" in result["upstream"].detail


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("0.1.7", "loaded; its version is 0.1.7 and does not fit Hemostat "),
        ("", "loaded; its version is unknown (older than 0.3) and does not fit Hemostat "),
    ],
)
async def test_a_plugin_whose_version_does_not_fit_is_named_in_one_line(version: str, said: str) -> None:
    result = await findings_of({"plugin_version": version}, None)
    plugin = result["engine plugin"]
    assert (plugin.state, plugin.detail) == (State.NOTE, said + __version__)
    assert "pip install ./calibration, in the folder of Hemostat's sources" in plugin.fix
    assert (await findings_of({}, None))["engine plugin"].detail == f"loaded ({__version__})"


@pytest.mark.parametrize(
    ("admin", "state", "said"),
    [
        ({}, "note", "can neither report nor fetch profiles"),
        ({"token": "a"}, "note", "engines need admin.token, with which a vLLM host can change all"),
        ({"token": "a", "engine_token": "b"}, "ok", "a token that can change nothing else"),
    ],
)
async def test_what_engines_are_let_in_with(admin: dict[str, Any], state: str, said: str) -> None:
    result = (await findings_of({}, None, admin=admin))["engine token"]
    assert result.state.value == state
    assert said in result.detail
    assert ("HEMOSTAT_ENGINE_TOKEN" in result.fix) == (state == "note")


@pytest.mark.parametrize("headers", [True, False])
async def test_a_running_control_process_says_that_the_plugin_measures_alone(tmp_path: Path, headers: bool) -> None:
    async def alone(plane: Control, _: Path) -> None:
        plane.engines.reports.passive.enabled = True

    with served(tmp_path, alone) as running:
        admin = {"port": running.port, "token": "a", "engine_token": "b"}
        result = await findings_of({"plugin": False}, {}, admin=admin)
        assert result["plugin alone"].state is State.NO
        assert "restart vLLM with HEMOSTAT_ADMIN_URL and HEMOSTAT_ENGINE_TOKEN" in result["plugin alone"].fix
        message = AnswerMessage("boot", [], 0, PassiveCounts({}, 0, {}, headers))
        running.do(lambda plane: plane.engines.reports.update_answers(message, time.monotonic()))
        result = await findings_of({"plugin": False}, {}, admin=admin)
        assert "NO" not in states(result).values()
        assert ("X-Hemostat-Shadow: off opts" in result["plugin alone"].detail) == headers
        assert ("--middleware" in result["plugin alone"].fix) != headers
        assert "need the proxy" in result["proxy"].detail
        assert "requests under a grammar are not scored" in result["engine plugin"].detail
        result = await findings_of({}, {}, admin={"port": running.port}, calibration={"mode": "auto"})
        assert states(result)["engine token"] == states(result)["proxy"] == "NO"
        assert result["proxy"].detail.startswith("calibration.mode auto: ")
        running.do(lambda plane: setattr(plane.engines.reports.passive, "enabled", False))
        assert {"plugin alone", "proxy"}.isdisjoint(await findings_of({}, {}, admin=admin))


async def test_each_served_model_is_matched_or_said_to_be_left_out() -> None:
    upstream = {"model": "a", "others": (FakeVllm(model="b"), FakeVllm(model="c", max_logprobs=3))}
    result = await findings_of(upstream, {})
    assert states(result)["same tokens of a"] == "ok"
    assert states(result)["reference of b"] == states(result)["reference of c"] == "note"
    assert "neither scored nor treated" in result["reference of b"].detail
    assert "add it to reference.models, as b: REFERENCE, with the first model" in result["reference of b"].fix

    async with running(FakeVllm(model="small")) as other, running(FakeVllm(model="odd", vocab_size=999)) as odd:
        models = {"a": "fake", "b": {"model": "small", "url": other.url}, "c": {"model": "odd", "url": odd.url}}
        result = await findings_of(upstream, {}, models={**models, "d": "gone"})
    assert "vllm: small (server, 512 tokens)" in result["reference of b"].detail
    assert states(result)["same tokens of b"] == states(result)["calibration.model"] == "ok"
    assert result["calibration.model"].detail == "profiles are for a; the others are only measured"
    assert states(result)["same tokens of c"] == states(result)["max_logprobs of c"] == "NO"
    assert (states(result)["reference.models"], result["reference.models"].detail) == (
        "note",
        "the upstream does not serve d",
    )
    result = await findings_of(upstream, {}, models={"a": "fake"}, calibration={"model": "a"})
    assert "calibration.model" not in result
    result = await findings_of(upstream, {}, models={"a": "fake", "d": "fake"}, calibration={"model": "d"})
    assert (states(result)["calibration.model"], result["calibration.model"].fix) == ("NO", "name one of a")
    result = await findings_of(upstream, {}, models={"d": "fake"})
    assert states(result)["reference.models"] == "NO"


async def test_a_store_in_postgresql_is_tried() -> None:
    async def store_at(url: str) -> Finding:
        return (await findings_of({}, None, store={"url": url}))["store"]

    server = postgres.shared()
    database = server.new_database()
    result = await store_at(server.url(database))
    assert (result.state, result.fix) == (State.OK, "")
    assert re.fullmatch(r"postgresql://\*\*\*@127\.0\.0\.1:\d+… \(PostgreSQL \d+\..*\)", result.detail)
    for url, detail, fix in (
        (server.url(database, password="wr0ng"), "password authentication failed", "correct user, password and"),
        (server.url("absent"), 'database "absent" does not exist', "correct user, password and database in store.url"),
        (server.url(server.new_database("postgres")), "permission denied for schema", "its user has to own the"),
        (server.url(database, port="1"), "Connection refused", "start it, or change store.url"),
    ):
        result = await store_at(url)
        assert result.state is State.NO
        assert detail in result.detail
        assert result.fix.startswith(fix)
        assert "wr0ng" not in result.detail
    with postgres.pooler(server) as address:
        result = await store_at(f"{address}/{database}")
    assert result.state is State.NO
    assert "a pooler (such as pgbouncer) is between" in result.detail
    assert result.fix == "name the PostgreSQL server itself in store.url"


@pytest.mark.parametrize(
    ("upstream", "reference", "sections", "what", "state", "fix"),
    [
        ({"max_logprobs": 5}, {}, {}, "max_logprobs", "NO", "--max-logprobs 20"),
        ({"max_logprobs": 5}, None, {}, "max_logprobs", "note", "--max-logprobs 20"),
        ({"max_logprobs": 5}, {}, {"shadow": {"top_k": 5}}, "max_logprobs", "ok", ""),
        ({"returns_token_ids": False}, {}, {}, "return_token_ids", "NO", "vLLM 0.32"),
        ({"raw_logprobs": False}, {}, {}, "logprobs_mode", "NO", "--logprobs-mode raw_logprobs"),
        ({"status": 500}, {}, {}, "completion", "NO", "vLLM's log"),
        ({"replace_body": "no"}, {}, {}, "upstream", "NO", ""),
        ({"api_key": "k"}, {}, {}, "upstream", "NO", "upstream.api_key"),
        ({"plugin": False}, {}, {}, "engine plugin", "note", "--logits-processors"),
        ({"plugin": False}, {}, AUTO, "engine plugin", "NO", "--logits-processors"),
        ({"speculates": True, "plugin": False}, {}, {}, "engine plugin", "note", "V2_MODEL_RUNNER=1"),
        ({"speculates": True, "plugin": False}, {}, AUTO, "engine plugin", "NO", "without --speculative-config"),
        ({"speculates": True}, {}, AUTO, "engine plugin", "ok", ""),
        ({}, None, {}, "reference", "note", "reference.backend"),
        ({}, {"max_logprobs": 5}, {}, "reference score", "NO", "--max-logprobs 20"),
        ({}, {"vocab_size": 520}, {}, "same tokens", "NO", "compressed from"),
        ({}, {"chat_template": "x{}"}, {}, "same tokens", "NO", "compressed from"),
        ({"names_vocab_size": False}, {}, {}, "same tokens", "NO", ""),
        ({}, {"names_vocab_size": False}, {}, "reference", "NO", "reference.*"),
        ({}, {}, {"store": {"url": "sqlite:////no/such/folder/h.db"}}, "store", "NO", "store.url"),
    ],
)
async def test_a_problem_is_reported_with_its_fix(
    upstream: dict[str, Any],
    reference: dict[str, Any] | None,
    sections: dict[str, Any],
    what: str,
    state: str,
    fix: str,
) -> None:
    result = (await findings_of(upstream, reference, **sections))[what]
    assert result.state.value == state
    assert fix in result.fix


@pytest.mark.parametrize(
    ("lora", "adapter", "states_of", "detail", "fix"),
    [
        ({"resolves": {"a" * 32: 16}}, {}, "ok", "1 of Hemostat's at a time (--max-loras 2)", ""),
        ({"resolves": {"a" * 32: 16}, "slots": 1}, {}, "NO", "--max-loras is 1", "--max-loras 2"),
        (
            {},
            {},
            "NO",
            "missing HEMOSTAT_ADAPTERS=1",
            "--max-loras 2 --max-lora-rank 16, the environment",
        ),
        ({}, {"folder": "/shared"}, "ok", "--max-loras 2", ""),
        ({"updating": False}, {}, "NO", "missing VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, HEMOSTAT_ADAPTERS=1", ""),
        ({"enabled": False, "resolves": {"a" * 32: 16}}, {}, "NO", "missing --enable-lora", "one API server"),
        (None, {"rank": 20, "shared_out": True}, "NO", "missing VLLM_ALLOW_RUNTIME", "--max-lora-rank 128"),
    ],
)
async def test_what_adapters_need_is_reported_with_the_exact_flags(
    lora: dict[str, Any] | None, adapter: dict[str, Any], states_of: str, detail: str, fix: str
) -> None:
    upstream = {"lora": None if lora is None else FakeLora(**lora)}
    result = await findings_of(upstream, None, adapter={"enabled": True, **adapter})
    assert result["adapters"].state.value == states_of, result["adapters"]
    assert detail in result["adapters"].detail
    assert fix in result["adapters"].fix
    if states_of == "ok":
        assert "needs --max-lora-rank 16 or more" in result["adapter rank"].detail
        assert "refuses these routes with 403" in result["adapter routes"].detail
    assert "adapters" not in await findings_of(upstream, None)


async def test_clients_adapters_take_slots_and_routes_that_are_allowed_are_said() -> None:
    async with running(FakeVllm(lora=FakeLora(resolves={"a" * 32: 16}), adapters=("theirs",))) as ours:
        given = {"upstream": {"url": ours.url, "allow_adapter_routes": True}, "adapter": {"enabled": True}}
        result = {f.what: f for f in await check(Settings.model_validate(given))}
    assert result["adapters"].fix == "start vLLM with --max-loras 3"
    assert result["adapter routes"].fix == "set upstream.allow_adapter_routes: false"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_the_upstream_is_not_its_own_reference(host: str) -> None:
    async with running(FakeVllm(plugin=True)) as ours:
        url = ours.url.replace("127.0.0.1", host)
        settings = Settings.model_validate(
            {"upstream": {"url": ours.url}, "reference": {"backend": "vllm", "url": url}}
        )
        result = await check(settings)
    assert exit_code(result) == 1
    assert [(f.what, f.detail) for f in result if f.state is State.NO] == [
        ("reference", f"it is the served model itself: {url} is the upstream, and serves the same model")
    ]


@pytest.mark.parametrize("copied", [False, True])
async def test_the_reference_has_other_files_than_the_served_model(copied: bool, tmp_path: Path) -> None:
    served, other = tmp_path / "served", tmp_path / "other"
    for folder, text in ((served, "{}"), (other, "{}" if copied else '{"a": 1}')):
        folder.mkdir()
        (folder / "config.json").write_text(text)
    info = ReferenceInfo("m", "", "bfloat16", 100, full_vocabulary=True, folder=other)
    async with running(FakeVllm(root=str(served))) as ours:
        server = VllmServer(ours.url)
        same = await served_as_reference(info, None, server, "fake")
        loaded = await served_as_reference(replace(info, folder=served), None, server, "fake")
        await server.close()
    assert same == (f"the upstream loaded fake from {served}, which has the same files as {other}" if copied else "")
    assert loaded == f"the upstream loaded fake from {served}, which has the same files as {served}"


async def test_control_processes_are_tried_as_a_relay_does(tmp_path: Path) -> None:
    made = certificate(tmp_path)
    listeners, ports = [], []
    for admit in (None, RelayLink().serve):
        context = server_context(made.cert, made.key)
        security = Security("relay-token", context, ["http://127.0.0.1:1"])
        listening = socket.create_server(("127.0.0.1", 0))
        ports.append(listening.getsockname()[1])
        listeners.append(RelayListener([listening], security))
        listeners[-1].admit = admit
        listeners[-1].start()
    given = {"addresses": [f"127.0.0.1:{port}" for port in ports], "ca": str(made.cert), "token": "relay-token"}

    async def found(**changed: Any) -> Finding:
        settings = {"upstream": {"url": "http://127.0.0.1:1"}, "control": given | changed}
        return (await check(Settings.model_validate(settings)))[0]

    standby, active = (f"127.0.0.1:{port}" for port in ports)
    both = await found()
    assert (both.what, both.state, both.fix) == ("control processes", State.OK, "")
    assert sorted(both.detail.split("; ")) == sorted([f"{standby}: not active", f"{active}: active"])
    waiting = await found(addresses=[standby])
    assert (waiting.state, waiting.detail) == (State.NO, f"{standby}: not active")
    partly = await found(addresses=[active, f"127.0.0.1:{free_port()}"])
    assert partly.state is State.NOTE
    assert "Connect call failed" in partly.detail or "Connection refused" in partly.detail
    wrong = await found(token="another")
    assert wrong.state is State.NO
    assert "wrong token; control.token has to be the same on both sides" in wrong.detail
    other = await found(ca=str(certificate(tmp_path / "other").cert))
    assert "self-signed certificate" in other.detail
    for listener in listeners:
        await listener.close()


async def test_how_evidence_is_divided_is_reported() -> None:
    sections = {"evidence": {"kinds": 5, "client_header": "x-team"}}
    result = (await findings_of({}, {}, **sections))["evidence"]
    assert result.state is State.OK
    assert "up to 5 kinds" in result.detail
    assert "header 'x-team', and one contributes at most 25% of a test (not limited below 4 clients)" in result.detail
    assert "evidence" not in await findings_of({}, {}, calibration={"mode": "off"})


async def test_unreachable_servers_are_reported() -> None:
    async with running(FakeVllm()) as gone:
        pass
    settings = Settings.model_validate(
        {"upstream": {"url": gone.url}, "reference": {"backend": "vllm", "url": gone.url}}
    )
    result = await check(settings)
    assert [f.what for f in result if f.state is State.NO] == ["upstream", "reference"]
    shown = " ".join(table(result).split())
    assert f"NO upstream {gone.url}/v1/models" in shown
    assert "-> start vLLM, or change upstream.url" in shown


async def test_the_command_prints_the_table_and_ends_with_its_code(tmp_path: Path) -> None:
    async with running(FakeVllm(max_logprobs=5)) as ours, running(FakeVllm(max_logprobs=5)) as theirs:
        path = tmp_path / "h.yaml"
        path.write_text(
            f"upstream: {{url: {ours.url}}}\nadmin: {{token: s3cret}}\n"
            f"reference: {{backend: vllm, url: {theirs.url}}}\n"
        )

        async def run(*arguments: str) -> tuple[int | None, str]:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "hemostat", "check", "--config", str(path), *arguments),
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )
            out, _ = await asyncio.wait_for(process.communicate(), 120)
            return process.returncode, out.decode()

        code, shown = await run()
        assert code == 1
        assert "NO    max_logprobs" in shown
        code, shown = await run("--set", "shadow.top_k=5")
        assert code == 0
        assert "NO " not in shown
        code, shown = await run("--print-config", "--rate", "0.25", "--mode", "off")
        assert code == 0
        assert "rate: 0.25" in shown
        assert "mode: 'off'" in shown
        assert "s3cret" not in shown
        assert "token: '**********'" in shown


@pytest.mark.vllm
async def test_a_real_vllm_that_was_not_started_for_adapters_is_told_what_it_lacks(vllm_server: Any) -> None:
    given = {"upstream": {"url": vllm_server.url}, "adapter": {"enabled": True}}
    (adapters,) = [f for f in await check(Settings.model_validate(given)) if f.what == "adapters"]
    assert adapters.detail.endswith("missing VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, --enable-lora, HEMOSTAT_ADAPTERS=1")


async def test_adapters_need_both_checkpoints_of_one_model_on_this_machine(tmp_path: Path) -> None:
    pair = make_pair(tmp_path)
    reference, compressed = str(pair.reference), str(pair.compressed)
    both = {"enabled": True, "compressed": compressed}
    (tmp_path / "other").mkdir()
    shutil.copy(pair.compressed / "model.safetensors", tmp_path / "other")
    config = json.loads((pair.compressed / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    for upstream, folder, adapter, state, detail in (
        ({}, reference, both, "ok", f"{reference} and {compressed}"),
        ({}, reference, {"enabled": True}, "NO", "adapter.compressed: name the folder"),
        ({"root": compressed}, None, {"enabled": True}, "NO", "reference.folder: name the folder"),
        ({}, str(tmp_path / "gone"), both, "NO", "reference.folder: .*gone is no folder"),
        ({}, reference, both | {"compressed": str(tmp_path)}, "NO", "adapter.compressed: .*"),
        (
            {},
            reference,
            both | {"compressed": str(tmp_path / "other")},
            "NO",
            "no adapter can be made of .*num_hidden_layers",
        ),
    ):
        result = (await findings_of(upstream, None, folder=folder, adapter=adapter))["adapter checkpoints"]
        assert result.state.value == state, result
        assert re.search(detail, result.detail), result


async def test_the_reference_s_checkpoint_is_also_found_in_a_hub_cache(tmp_path: Path) -> None:
    """The compressed one is where the engine says that it is: nothing else names it here."""
    pair = make_pair(tmp_path)
    compressed = str(pair.compressed)
    cache = tmp_path / "hub" / "models--org--name"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("abc")
    (cache / "snapshots").mkdir()
    (cache / "snapshots" / "abc").symlink_to(pair.reference)
    result = await findings_of(
        {"root": compressed}, {"root": "org/name"}, folder=str(tmp_path / "hub"), adapter={"enabled": True}
    )
    assert result["adapter checkpoints"].detail == f"{cache / 'snapshots' / 'abc'} and {compressed}"


async def test_what_adapters_do_not_correct_is_said(tmp_path: Path) -> None:
    from tests.support.tiny_models import tiny_model

    whole, compressed = tmp_path / "whole", tmp_path / "compressed"
    tiny_model("olmoe").save_pretrained(whole)
    compress(whole, compressed, "w4a16")
    given = {"enabled": True, "compressed": str(compressed)}
    finding = (await findings_of({}, None, folder=str(whole), adapter=given))["adapter checkpoints"]
    assert finding.state is State.OK
    assert "; 36 layers of experts that a router chooses are not corrected; vLLM's CPU build ends" in finding.detail


@pytest.mark.parametrize(
    ("absent", "message"),
    [
        ("transformers", "not installed: transformers -> pip install 'transformers<"),
        ("compressed_tensors", "not installed: compressed-tensors -> pip install 'compressed-tensors<"),
        ("hemostat_lab", "not installed: hemostat-lab -> pip install ./middleware/lab, in the folder of"),
    ],
)
async def test_a_package_that_adapters_need_is_named_with_its_bounds(
    absent: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = make_pair(tmp_path)
    config = json.loads((pair.compressed / "config.json").read_text())
    quantization = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}}
    (pair.compressed / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    given = {"enabled": True, "compressed": str(pair.compressed)}
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None if name == absent else find(name, *more))
    finding = (await findings_of({}, None, folder=str(pair.reference), adapter=given))["adapter checkpoints"]
    assert finding.state is State.NO
    assert message in f"{finding.detail} -> {finding.fix}"
