"""A profile serves: requests for models that it is not for go upstream as the client wrote them."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import msgspec
import pytest
from tests.support.fake_vllm import FakeVllm, serving
from tests.support.wire import VERSION, Wire, policy

from hemostat.ipc.messages import REST_KIND, Policy


@pytest.fixture
def wire() -> Iterator[Wire]:
    fake = FakeVllm(model="a", others=(FakeVllm(model="b"), FakeVllm(model="c")))
    with serving(fake) as url, httpx.Client(base_url=url) as client:
        yield Wire(client)


def served(**more: object) -> Policy:
    """A profile serves all of model a; b is matched with its reference too, c is not."""
    return policy(
        mode="auto",
        control_fraction=0.0,
        serving_by_kind={REST_KIND: VERSION},
        scorable_models=frozenset({"a", "b"}),
        calibrated_models=frozenset({"a"}),
        default_model="a",
        **more,
    )


def body(model: str | None, **more: object) -> bytes:
    named = {} if model is None else {"model": model}
    return msgspec.json.encode(named | {"prompt": "Hello", "max_tokens": 4} | more)


def profile_of(sent: bytes) -> str | None:
    result: str | None = msgspec.json.decode(sent).get("vllm_xargs", {}).get("hemostat")
    return result


def test_a_model_without_a_reference_is_passed_untouched(wire: Wire) -> None:
    wire.interceptor.policy = served()
    given = body("c")
    assert wire.send("/v1/completions", given).sent == given
    assert wire.shadow("skipped", "no_reference") == wire.calibration("none", "no_reference") == 1
    assert not wire.captures


def test_a_model_that_profiles_are_not_for_is_measured_and_not_treated(wire: Wire) -> None:
    wire.interceptor.policy = served()
    assert profile_of(wire.send("/v1/completions", body("b")).sent) is None
    assert wire.calibration("none", "other_model") == 1
    assert [(capture.model, capture.arm) for capture in wire.captures] == [("b", "none")]
    wire.interceptor.policy = served(shadow_rate=0.0)
    assert wire.send("/v1/completions", body("b")).sent == body("b")
    assert profile_of(wire.send("/v1/completions", body("a")).sent) == VERSION
    assert wire.calibration("treated", "assigned") == 1


def test_a_request_without_a_model_is_one_for_the_first(wire: Wire) -> None:
    wire.interceptor.policy = served()
    for given in (body(None), body("")):
        assert profile_of(wire.send("/v1/completions", given).sent) == VERSION
    wire.interceptor.policy = msgspec.structs.replace(served(), default_model="c")
    assert wire.send("/v1/completions", body(None)).sent == body(None)
    assert wire.shadow("skipped", "no_reference") == 1
