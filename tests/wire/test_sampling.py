"""What is sampled is drawn, and arms follow from a secret: neither can be chosen by a client."""

from __future__ import annotations

import random
from hashlib import blake2b
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.wire import policy

from hemostat.interception.assignment import (
    ARM,
    CONVERSATION,
    client_digest,
    conversation_digest,
    in_control_arm,
    uniform,
)
from hemostat.interception.interceptor import Interceptor
from hemostat.openai.reading import read_request
from hemostat.openai.routes import CHAT, Form

SALT = bytes(range(32))


def chat(*texts: str, **more: Any) -> bytes:
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]
    return msgspec.json.encode({"model": "m", "messages": messages} | more)


def digest(body: bytes, salt: bytes = SALT, *, is_chat: bool = True) -> bytes:
    return conversation_digest(
        read_request(body, form=Form.CHAT if is_chat else Form.COMPLETIONS).conversation_key, salt
    )


def sampled(interceptor: Interceptor, request_ids: list[str]) -> list[bool]:
    return [
        interceptor.begin("POST", CHAT.encode(), [], request_token_id) is not None for request_token_id in request_ids
    ]


def interceptor(rate: float, draws: Any) -> Interceptor:
    return Interceptor(policy(shadow_rate=rate), lambda _: True, lambda *_: None, draw=draws)


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.3, 1.0])
def test_the_sampled_fraction_is_the_rate(rate: float) -> None:
    n = 20_000
    hits = sum(sampled(interceptor(rate, random.Random(3).random), ["r"] * n))
    # Five standard deviations of a binomial.
    assert abs(hits - n * rate) <= 5 * (n * rate * (1 - rate)) ** 0.5


def test_a_chosen_request_id_changes_nothing_about_what_is_sampled() -> None:
    """With the same draws the same requests are sampled, and one id is sampled as often as any other."""
    n = 500
    chosen = sampled(interceptor(0.3, random.Random(1).random), ["the one that always was"] * n)
    others = sampled(interceptor(0.3, random.Random(1).random), [f"request-{i}" for i in range(n)])
    assert chosen == others
    assert 0 < sum(chosen) < n


def test_by_default_the_operating_system_draws() -> None:
    two = [Interceptor(policy(shadow_rate=0.5), lambda _: True, lambda *_: None) for _ in range(2)]
    first, second = (sampled(sampler, ["r"] * 200) for sampler in two)
    assert first != second


@given(st.text(max_size=40), st.lists(st.text(max_size=20), max_size=4), st.binary(max_size=64))
def test_every_turn_of_a_conversation_has_its_digest_and_its_arm(first: str, turns: list[str], salt: bytes) -> None:
    short, long = digest(chat(first), salt), digest(chat(first, *turns), salt)
    assert short == long
    assert len(short) == 16
    assert in_control_arm(short, 0.5, salt) == in_control_arm(long, 0.5, salt)


def test_the_arm_follows_from_the_salt_alone() -> None:
    talks = [digest(chat(f"talk {n}")) for n in range(2000)]
    arms = [in_control_arm(talk, 0.1, SALT) for talk in talks]
    assert abs(sum(arms) - 200) < 5 * (2000 * 0.09) ** 0.5
    assert arms == [in_control_arm(talk, 0.1, SALT) for talk in talks]
    again = [in_control_arm(digest(chat(f"talk {n}"), b"other"), 0.1, b"other") for n in range(2000)]
    both = sum(a and b for a, b in zip(arms, again, strict=True))
    assert both < 50, "another salt gives other arms: 20 agree by chance"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (chat("a"), chat("a", "b", "c"), True),
        (chat("a"), chat("a", temperature=0.5, user="somebody else"), True),
        (chat("a"), chat("b"), False),
        (chat("a"), chat("a", model="n"), False),
    ],
)
def test_a_conversation_is_its_model_and_first_messages(one: bytes, other: bytes, same: bool) -> None:
    assert (digest(one) == digest(other)) == same


def test_a_completion_is_named_by_its_prompt() -> None:
    def named(prompt: Any) -> bytes:
        return digest(msgspec.json.encode({"model": "m", "prompt": prompt, "max_tokens": 3}), is_chat=False)

    assert named("a") == named("a") != named("b")
    assert len({named([1, 2]), named([1, 3]), named("a")}) == 3
    assert digest(b'{"model": "m"}', is_chat=False) == b""


def test_a_chat_without_a_message_of_the_user_is_named_by_its_messages() -> None:
    system = msgspec.json.encode({"model": "m", "messages": [{"role": "system", "content": "x"}]})
    other = msgspec.json.encode({"model": "m", "messages": [{"role": "system", "content": "y"}]})
    assert digest(system) == digest(system) != digest(other)


def test_clients_are_named_by_their_header_as_servers_read_it() -> None:
    named = client_digest(b"Bearer key", SALT)
    assert len(named) == 8
    assert client_digest(b"  bEARER  key ", SALT) == client_digest(b"BEARER\t key", SALT) == named
    assert client_digest(b"Bearer Key", SALT) != named
    assert client_digest(b"Bearer key", b"other") != named
    assert client_digest(b"", SALT) == client_digest(b"  ", SALT) == b""
    assert client_digest(b"KEY", SALT) != client_digest(b"key", SALT)


def test_the_purpose_changes_the_hash() -> None:
    assert uniform(b"k", SALT, ARM) != uniform(b"k", SALT, CONVERSATION)


@given(st.binary(max_size=200), st.binary(max_size=64))
def test_the_hashes_are_keyed_blake2b_whichever_were_made_before(value: bytes, salt: bytes) -> None:
    for _ in range(2):
        given_hash = blake2b(value, digest_size=8, key=salt, person=ARM).digest()
        assert uniform(value, salt, ARM) == (int.from_bytes(given_hash, "little") >> 11) / 2**53
        named = blake2b(value, digest_size=16, key=salt, person=CONVERSATION).digest()
        assert conversation_digest(value, salt) == named
