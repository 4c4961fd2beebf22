"""The plugin acts for few only: in both model runners only requests that carry the MAC of the control process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.engine_profiles import VOCAB_SIZE, make_profile

pytest.importorskip("vllm")
import torch
from tests.support.engine_admin import TOKEN, EngineAdmin
from tests.support.slots import context, request_states
from tests.support.waiting import HANG_SECONDS
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.sample.logits_processor import BatchUpdate, validate_logits_processors_parameters
from vllm.v1.worker.gpu.sample.logits_processor import build_custom_logits_processors

from hemostat_calibration.engine_keys import ACTING_KEYS, CHECKSUMS_KEY, FORCE_KEY, MAC_KEY, acts, is_signed, signed
from hemostat_engine.agent import Agent, Identity
from hemostat_engine.answer_sender import AnswerQueue, AnswerSender
from hemostat_engine.answer_tap import AnswerTap, wrapped
from hemostat_engine.library import Counters, Library
from hemostat_engine.peers import Peers
from hemostat_engine.processor import BatchV1
from hemostat_engine.secrets import KEEP_SECONDS, MAX_SECRETS, Secrets
from hemostat_engine.settings import Settings
from hemostat_engine.taps import Taps

OURS, THEIRS = "a" * 32, "b" * 32
REQUESTS: dict[str, Any] = {
    "hemostat_tap": {"hemostat_tap": "n"},
    "hemostat_tap_top": {"hemostat_tap": "n", "hemostat_tap_top": "8"},
    "hemostat_force": {"hemostat_force": [5, 3]},
    "hemostat_kv_precision": {"hemostat_kv_precision": 1},
    "hemostat_checksums": {"hemostat_checksums": "n"},
}


def test_the_list_of_keys_is_complete_here() -> None:
    assert tuple(REQUESTS) == ACTING_KEYS


def not_ours(keys: dict[str, Any]) -> list[dict[str, Any]]:
    """The keys that a client can send: nothing, a MAC of its own, another's MAC, or our MAC of other keys."""
    ours = signed({"hemostat_tap": "another"}, OURS, "s")[MAC_KEY]
    return [
        keys,
        signed(keys, THEIRS, "s"),
        *(
            keys | {MAC_KEY: mac}
            for mac in ("", ".", "x", "s." + "0" * 32, ours, 7, ["s"], "é" * 9, "s" * 10_000, None)
        ),
        signed(keys, OURS, "s") | {"hemostat_force": [9]},
    ]


@pytest.mark.parametrize("key", ACTING_KEYS)
def test_a_core_acts_on_signed_keys_alone(make_core: Callable[..., Any], key: str) -> None:
    core, profile = make_core(tapping=True), make_profile(1)
    core.library.put(profile)
    core.agent.secrets.update([OURS])
    requests = not_ours(REQUESTS[key] | {"hemostat": profile.version})
    bindings = core.bind([SamplingParams(extra_args=request) for request in requests])
    assert [(b.applied, b.nonce, b.forced) for b in bindings] == [(profile.version, None, ())] * len(requests), (
        "the profile is an open key"
    )
    assert core.counters.read()["requests_refused"] == len(requests)
    (binding,) = core.bind([SamplingParams(extra_args=signed(REQUESTS[key], OURS, "s"))])
    if key == CHECKSUMS_KEY:
        assert binding is None, "the API server's process acts on it: test_checksums.py"
    else:
        assert binding.nonce or binding.forced
    assert core.counters.read()["requests_refused"] == len(requests)


def test_a_plugin_without_a_secret_refuses_and_one_that_was_named_long_ago_is_forgotten(
    make_core: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    core, now = make_core(), 1000.0
    monkeypatch.setattr(core.agent.secrets, "_clock", lambda: now)

    def forces(secret: str = OURS) -> bool:
        (binding,) = core.bind([SamplingParams(extra_args=signed(REQUESTS[FORCE_KEY], secret, "s"))])
        return binding is not None

    assert not forces()
    core.agent.secrets.update([OURS])
    assert forces()
    now += KEEP_SECONDS
    core.agent.secrets.update([THEIRS])  # as a control process that was started again does
    assert forces(), "requests under way were signed before"
    assert forces(THEIRS)
    now += 1.0
    assert not forces()
    now += KEEP_SECONDS
    assert not forces(THEIRS), "the control process has been out of reach"


def test_v1_neither_forces_nor_taps_what_is_not_signed(make_core: Callable[..., Any]) -> None:
    core = make_core(tapping=True)
    core.agent.secrets.update([OURS])
    for extra, forced in ((REQUESTS[FORCE_KEY], False), (signed(REQUESTS[FORCE_KEY], OURS, "s"), True)):
        batch = BatchV1(core)
        batch.update(BatchUpdate(1, [], [(0, SamplingParams(extra_args=extra), [1], [])], []))
        logits = torch.randn(1, VOCAB_SIZE)
        assert torch.equal(batch.apply(logits.clone()), logits) is not forced
    batch = BatchV1(core)
    batch.update(BatchUpdate(1, [], [(0, SamplingParams(extra_args=REQUESTS["hemostat_tap_top"]), [1], [])], []))
    batch.apply(torch.randn(1, VOCAB_SIZE))
    assert not len(core.taps)


def test_v2_neither_forces_nor_taps_what_is_not_signed() -> None:
    states = request_states()
    (processor,) = build_custom_logits_processors(
        SimpleNamespace(parallel_config=SimpleNamespace()), states, False, ["hemostat_engine:LogitsProcessor"]
    )
    processor.core.agent.secrets.update([OURS])
    states.prompt_len.np[[5, 2]] = [4, 4]
    assert processor.add_request(5, SamplingParams(extra_args=REQUESTS[FORCE_KEY] | REQUESTS["hemostat_tap"]))
    assert processor.add_request(2, SamplingParams(extra_args=signed(REQUESTS[FORCE_KEY], OURS, "s")))
    processor.apply_staged_writes()
    logits = torch.randn(2, VOCAB_SIZE)
    result = processor.apply(logits.clone(), context([5, 2], [1, 1], [3, 3]))
    assert torch.equal(result[0], logits[0])
    assert int((result[1] > -torch.inf).sum()) == 1


def test_the_frontend_names_no_key_that_clients_may_not_use() -> None:
    for request in ({"hemostat_force": "x"}, {"hemostat_tap": "not a nonce"}, {"hemostat_tap_top": -1}):
        validate_logits_processors_parameters(["hemostat_engine:LogitsProcessor"], SamplingParams(extra_args=request))


class Engine:
    model_config = SimpleNamespace(max_logprobs=20)

    async def generate(self, prompt: Any, sampling_params: Any, request_id: str) -> AsyncGenerator[Any, None]:
        self.given = sampling_params
        for nothing in ():
            yield nothing


def test_only_signed_requests_take_a_place_among_the_recordings() -> None:
    secrets, started = Secrets(), list[bool]()
    tap = AnswerTap(AnswerQueue(), lambda: started.append(True), secrets)
    engine, generate = Engine(), wrapped(Engine.generate, tap)

    def recorded(extra: dict[str, Any]) -> bool:
        params = SamplingParams(extra_args=extra, output_kind=RequestOutputKind.DELTA)

        async def run() -> None:
            async for _ in generate(engine, [1], params, "id"):
                pass

        asyncio.run(run())
        return engine.given is not params

    keys = REQUESTS["hemostat_tap_top"]
    assert not recorded(signed(keys, OURS, "s")), "no secret is known yet"
    assert started == [True], "the sender asks for them"
    secrets.update([OURS])
    assert recorded(signed(keys, OURS, "s"))
    for request in not_ours(keys):
        assert not recorded(request)
    assert started == [True]


@pytest.fixture
def admin() -> Iterator[EngineAdmin]:
    server = EngineAdmin()
    yield server
    server.close()


def test_engine_and_api_server_learn_the_secrets_from_the_admin_port(admin: EngineAdmin) -> None:
    settings = Settings(admin_url=admin.url, engine_token=TOKEN)
    counters, request = Counters(), admin.signed(REQUESTS[FORCE_KEY])
    agent = Agent(
        Identity("boot", 0, 1, 100, "v1", "test"),
        settings,
        Library(100, torch.device("cpu")),
        counters,
        Taps(counters),
        spawn=lambda call: call(),
    )
    for _ in range(2):  # the first one finds the address
        agent.tick(1.0)
    assert agent.secrets.signed(request)
    peers, secrets = Peers(settings), Secrets()
    AnswerSender(AnswerQueue(), peers, "boot", secrets).look()
    assert secrets.signed(request)
    assert "secret" not in repr(peers.all[0].last_response)


def test_the_sender_asks_for_secrets_before_there_is_an_answer(admin: EngineAdmin) -> None:
    secrets, request = Secrets(), admin.signed(REQUESTS[FORCE_KEY])
    settings = Settings(admin_url=admin.url, engine_token=TOKEN)
    sender = AnswerSender(AnswerQueue(), Peers(settings), "boot", secrets)
    sender.start()

    async def known() -> None:
        async with asyncio.timeout(HANG_SECONDS):
            while not secrets.signed(request):
                await asyncio.sleep(0.01)

    asyncio.run(known())


def test_secrets_are_bounded() -> None:
    secrets = Secrets(lambda: 0.0)
    for n in range(1000):
        secrets.update([f"{n:032d}"])
    assert len(secrets.believed()) == MAX_SECRETS


VALUES = st.text(max_size=5) | st.integers() | st.lists(st.integers() | st.text(max_size=3), max_size=4) | st.floats()


@given(st.dictionaries(st.sampled_from(ACTING_KEYS), VALUES), st.dictionaries(st.sampled_from(ACTING_KEYS), VALUES))
def test_a_mac_is_of_one_set_of_keys(one: dict[str, Any], other: dict[str, Any]) -> None:
    sent = signed(one, OURS, "s")
    assert is_signed(sent, [THEIRS, OURS])
    assert not is_signed(sent, [THEIRS])
    assert not is_signed(sent, [])
    assert acts(one) == bool(one)
    same = repr(sorted(one.items())) == repr(sorted(other.items()))
    assert is_signed(other | {MAC_KEY: sent[MAC_KEY]}, [OURS]) is same
