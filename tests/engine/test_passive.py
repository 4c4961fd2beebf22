"""Passive mode: the plugin samples requests by the control process's policy, and hands on their answers."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from hemostat.engines.messages import AnswerMessage
from hemostat.metrics.reasons import Unscored

pytest.importorskip("vllm")
from tests.support.async_llm import PROMPT, Engine, params
from tests.support.engine_admin import TOKEN, EngineAdmin
from tests.support.passive_server import POLICY, SECRET, TOKENS, Server
from vllm.sampling_params import StructuredOutputsParams

from hemostat_engine import answer_tap, passive
from hemostat_engine.answer_sender import AnswerQueue, AnswerSender
from hemostat_engine.client_headers import ClientHeaders
from hemostat_engine.passive import Lost
from hemostat_engine.peers import Peers
from hemostat_engine.settings import Settings


def test_the_fake_engine_is_called_as_vllm_calls_its_own() -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    real = inspect.signature(AsyncLLM.generate).parameters
    assert tuple(real)[:4] == tuple(inspect.signature(Engine.generate).parameters)
    assert "lora_request" in real
    assert inspect.isasyncgenfunction(AsyncLLM.generate)


def test_a_sampled_request_is_recorded_with_what_it_is_counted_by_and_its_answer_is_the_same() -> None:
    server = Server()
    seen = server.serve(params(temperature=0.0, max_tokens=7))
    assert [o.outputs[0].logprobs for o in seen] == [None, None]
    (answer,) = server.recorded()
    assert np.frombuffer(answer["token_ids"], "<i4").tolist() == [3, 8, 4]
    request = answer["request"]
    assert (request.route, request.model, request.request_id) == ("/v1/completions", "served", "cmpl-1-0")
    assert (request.temperature, request.max_tokens, request.stream, request.grammar) == (0.0, 7, True, False)
    assert answer["nonce"].startswith("prefix-")
    counts = server.sampler.counts()
    assert (counts.requests, counts.sampled, counts.unscored) == ({"/v1/completions": 1}, 0, {})


def test_without_a_policy_or_after_it_has_expired_nothing_is_sampled() -> None:
    server = Server(None)
    plain = params()
    server.serve(plain)
    server.sampler.heard("http://control", POLICY, "prefix")
    server.now = passive.POLICY_SECONDS + 1.0
    server.serve(plain)
    assert server.engine.given == [plain, plain]
    assert server.engine.given[0] is plain
    assert server.recorded() == []


def test_nothing_is_sampled_where_one_control_process_says_that_relays_sample() -> None:
    server = Server()
    server.sampler.heard("http://with-relays", None, "other")
    server.serve()
    assert server.recorded() == []


def test_a_request_that_a_relay_has_sampled_is_recorded_once_and_for_the_relay() -> None:
    from hemostat_calibration.engine_keys import signed

    server = Server()
    asked = signed({"hemostat_tap": "relays", "hemostat_tap_top": "2"}, SECRET, "")
    server.serve(params(asked))
    (answer,) = server.recorded()
    assert answer["nonce"] == "relays"
    assert "request" not in answer
    server.serve(params(signed({"hemostat_tap": "relays"}, SECRET, "")))
    assert server.recorded() == []


def test_a_client_cannot_make_the_plugin_act_and_is_sampled_like_others() -> None:
    server = Server(dataclasses.replace(POLICY, tap=True))
    server.serve(params({"hemostat_force": [1], "hemostat_tap": "own", "hemostat_tap_top": "2", "theirs": 1}))
    (given,) = server.engine.given
    assert given.extra_args.keys() == {"theirs", "hemostat_tap", "hemostat_mac"}
    assert server.secrets.signed(given.extra_args)
    (answer,) = server.recorded()
    assert given.extra_args["hemostat_tap"] == answer["nonce"] != "own"


@pytest.mark.parametrize(
    ("given", "prompt", "request_id", "reason"),
    [
        (params({"hemostat_shadow": "off"}), TOKENS, "cmpl-1-0", Lost.OPTED_OUT),
        (params({"hemostat_shadow": ["?"]}), TOKENS, "cmpl-1-0", Lost.OPTED_OUT),
        (params({"hemostat_shadow": "on"}), TOKENS, "cmpl-1-0", Lost.ON_NOT_ALLOWED),
        (params(n=17), TOKENS, "cmpl-1-0", Lost.N),
        (params(), {"type": "multimodal", "prompt_token_ids": PROMPT}, "chatcmpl-1", Lost.MULTIMODAL),
        (params(), {"type": "embeds"}, "chatcmpl-1", Lost.MULTIMODAL),
        (params(), {"type": "token", "prompt_token_ids": [1] * 100}, "chatcmpl-1", Lost.TOO_LONG),
        (params(), TOKENS, "chatcmpl-1-abc-beam-0", Lost.BEAM_SEARCH),
        (params(structured_outputs=StructuredOutputsParams(regex="a")), TOKENS, "resp_1_0", Lost.GRAMMAR),
        (params(logprob_token_ids=[1]), TOKENS, "cmpl-1-0", Lost.CLIENT_LOGPROBS),
    ],
)
def test_what_is_not_sampled_is_counted_by_reason_and_not_touched(
    given: Any, prompt: Any, request_id: str, reason: str
) -> None:
    server = Server()
    server.serve(given, prompt, request_id)
    assert server.engine.given[0] is given
    assert (server.recorded(), server.unscored()) == ([], {reason: 1})


def test_every_reason_is_one_of_the_metrics() -> None:
    own = {value for name, value in vars(Lost).items() if name.isupper()}
    assert own <= {reason.value for reason in Unscored}


def test_other_routes_are_neither_sampled_nor_counted() -> None:
    server = Server()
    server.serve(request_id="generate-tokens-1")
    assert (server.recorded(), server.sampler.counts().requests) == ([], {})


def test_each_choice_is_handed_on_and_an_aborted_one_is_counted() -> None:
    server = Server(choices=[[[3]], [[4], [9]]])
    server.serve(params(n=2))
    assert [(a["choice"], a["choices"]) for a in server.recorded()] == [(0, 2), (1, 2)]
    server = Server()
    server.serve(limit=1)
    assert (server.recorded(), server.unscored(), server.engine.closed) == ([], {Lost.INCOMPLETE: 1}, True)


def test_an_answer_that_becomes_too_long_is_left_and_still_served() -> None:
    server = Server(dataclasses.replace(POLICY, max_tokens=5))
    seen = server.serve()
    assert [o.outputs[0].logprobs for o in seen] == [None, None]
    assert (server.recorded(), server.unscored()) == ([], {Lost.TOO_LONG: 1})


def test_memory_and_rate_are_bounded_and_what_is_beyond_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server()
    for _ in range(int(passive.MAX_AT_ONCE) + 3):
        server.serve()
    assert len(server.recorded()) == passive.MAX_AT_ONCE
    assert server.unscored() == {Lost.PLUGIN_BUSY: 3}
    server = Server()
    server.queue = AnswerQueue(max_bytes=1)
    server.start_tap()
    server.serve()
    assert server.unscored() == {Lost.LINK_FULL: 1}
    monkeypatch.setattr(answer_tap, "MAX_ACTIVE", 0)
    server = Server()
    server.serve()
    assert (server.engine.given[0].logprobs, server.unscored()) == (None, {Lost.PLUGIN_BUSY: 1})


def test_all_recordings_together_are_bounded_and_give_their_room_back() -> None:
    server = Server(choices=[[[3, 8], [4]], [[3], [4, 9]]])
    room = server.tap.room
    room.max_bytes = 200
    server.serve(params(n=2))
    assert len(server.recorded()) == 2
    assert room.bytes == 0
    server.serve(params(n=2), limit=1)
    assert (room.bytes, server.unscored()) == (0, {Lost.INCOMPLETE: 1})
    room.max_bytes = 50
    seen = server.serve(params(n=2))
    assert [o.outputs[0].logprobs for o in seen] == [None] * 4
    assert (room.bytes, server.recorded()) == (0, [])
    assert server.unscored() == {Lost.INCOMPLETE: 1, Lost.PLUGIN_BUSY: 1}


def test_the_middleware_hands_headers_on_and_none_of_the_request_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ClientHeaders, "in_force", False)
    server = Server()
    server.serve(headers=[(b"x-hemostat-shadow", b"off")])
    assert server.unscored() == {Lost.OPTED_OUT: 1}
    server.serve(headers=[(b"x-hemostat-label", b"batch"), (b"authorization", b"bearer  key")])
    server.serve(headers=[(b"x-hemostat-label", b"unknown"), (b"authorization", b"Bearer key")])
    first, second = (answer["request"] for answer in server.recorded())
    assert (first.label, second.label) == ("batch", "")
    assert first.client == second.client != b""
    from hemostat.interception.assignment import client_digest

    assert first.client == client_digest(b"Bearer key", POLICY.salt)
    assert server.sampler.counts().headers
    server.serve()
    assert server.recorded()[0]["request"].client == b""


def test_the_policy_and_the_answers_go_over_the_admin_port() -> None:
    admin = EngineAdmin()
    try:
        plugins = admin.registry.passive
        taken: list[Any] = []
        plugins.enabled, plugins.policy, plugins.on_answer = True, POLICY, taken.append
        server = Server(None)
        settings = Settings(admin_url=admin.url, engine_token=TOKEN)
        sender = AnswerSender(
            server.queue, Peers(settings), "boot", server.secrets, server.sampler, pause=lambda _: None
        )
        sender.look()
        assert server.sampler.policy() == (POLICY, "")
        server.serve(params(temperature=0.3))
        sender.send()
        (answer,) = taken
        assert (answer.tokens, answer.request.temperature) == (3, pytest.approx(0.3))
        assert plugins.live(admin.now) == 1
        assert server.sampler.counts().sampled == 1
        admin.status = 500
        server.serve()
        sender.send()
        assert server.unscored() == {Lost.LINK_FULL: 1}
    finally:
        admin.close()


def test_messages_with_a_request_decode_and_older_ones_too() -> None:
    old = msgspec.msgpack.encode({"boot_id": "b", "answers": [], "dropped": 0})
    assert msgspec.msgpack.decode(old, type=AnswerMessage).passive is None
    assert json.loads(msgspec.json.encode(POLICY))["rate"] == 1.0


def test_the_engine_is_wrapped_when_vllm_imports_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A stand-in for the module tells what vLLM's own, which takes nine seconds of the processor, would tell again."""
    module = tmp_path / "vllm" / "v1" / "engine" / "async_llm.py"
    module.parent.mkdir(parents=True)
    for folder in list(module.parents)[:3]:
        (folder / "__init__.py").touch()
    module.write_text(
        "class AsyncLLM:\n    async def generate(self, prompt, sampling_params, request_id):\n        yield None\n"
    )
    own = os.environ.get("PYTHONPATH", "")
    code = (
        "import hemostat_engine.adapters as plugin, sys; plugin.register(); plugin.register();"
        "assert 'vllm' not in sys.modules;"
        "from vllm.v1.engine.async_llm import AsyncLLM; print(hasattr(AsyncLLM.generate, '__wrapped__'))"
    )
    address = "http://127.0.0.1:9"
    for path, url, result in ((own, address, "True"), (tmp_path, address, "True"), (tmp_path, "", "False")):
        monkeypatch.setenv("PYTHONPATH", f"{path}:{own}")
        monkeypatch.setenv("HEMOSTAT_ADMIN_URL", url)
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert ran.stdout.split()[-1:] == [result], ran.stderr[-2000:]
