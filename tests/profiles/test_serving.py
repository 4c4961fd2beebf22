"""Tests of which version serves, by mode, models, pin and force."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tests.support.profile_bench import harmful
from tests.support.records import Truth, log_softmax, make_record
from tests.support.world import V

from hemostat.ipc.messages import REST_KIND
from hemostat.profiles.serving import MAX_SERVING_VERSIONS, KindState, ServedModel, ServingState
from hemostat_calibration.errors import HemostatError, InvalidProfileError
from hemostat_calibration.records import TokenRecord

MODEL = ServedModel("m", V)
RECORD = make_record(Truth(*(log_softmax(np.zeros((3, V))),) * 2, np.zeros(3, int)), 4)


def serving(**state: object) -> ServingState:
    """In mode auto with both models known; two kinds have different profiles, one has none."""
    made = ServingState("auto")
    made.model = MODEL
    made.kinds[REST_KIND] = KindState(version="one", units=3)
    made.kinds["chat"] = KindState(version="two", units=5)
    made.kinds["code"] = KindState(units=90)
    for name, value in state.items():
        setattr(made, name, value)
    return made


def of_kind(kind: str) -> TokenRecord:
    return replace(RECORD, kind=kind)


BY_KIND = {REST_KIND: "one", "chat": "two"}


@pytest.mark.parametrize(
    ("state", "version", "by_kind", "reported"),
    [
        ({}, "two", BY_KIND, "two"),
        ({"mode": "observe"}, None, {}, "two"),
        ({"mode": "off"}, None, {}, None),
        ({"model": None}, None, {}, "two"),
    ],
)
def test_what_serves(
    state: dict[str, object], version: str | None, by_kind: dict[str, str], reported: str | None
) -> None:
    made = serving(**state)
    assert (made.version, made.version_by_kind, made.reported) == (version, by_kind, reported)
    assert made.selected_by_kind == BY_KIND
    assert made.versions == ["two", "one"], "most units first"


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ({}, ["two", None, "one", "one"]),
        ({"mode": "observe"}, ["two", None, "one", "one"]),
        ({"mode": "off"}, [None] * 4),
    ],
)
def test_what_would_serve_a_request(state: dict[str, object], expected: list[str | None]) -> None:
    made = serving(**state)
    assert [made.would_serve(of_kind(kind)) for kind in ("chat", "code", REST_KIND, "not followed")] == expected


def test_an_operator_names_a_kind_that_is_followed() -> None:
    made = serving()
    assert made.named(None) == [REST_KIND, "chat", "code"]
    assert made.named("code") == ["code"]
    with pytest.raises(HemostatError, match="no kind 'x' is followed; followed are: chat; code; rest"):
        made.named("x")


def test_the_number_of_different_profiles_that_serve_is_bounded() -> None:
    made = serving()
    for n in range(MAX_SERVING_VERSIONS - 2):
        assert made.has_room("new", {"code"})
        made.kinds[f"k{n}"] = KindState(version=f"v{n}")
    assert not made.has_room("new", {"code"})
    assert made.has_room("one", {"code"})
    assert made.has_room("new", {"chat"}), "it replaces the only use of another"
    assert made.has_room("new", set(made.kinds))


@pytest.mark.parametrize("state", [{"mode": "off"}, {"model": None}])
def test_nothing_is_learned_or_judged_while_calibration_is_not_active(state: dict[str, object]) -> None:
    assert serving().uses(of_kind("chat"))
    assert not serving(**state).uses(of_kind("chat"))


def test_records_of_another_base_model_are_not_used() -> None:
    made = serving(names=frozenset({"m", "adapter"}))
    result = [made.uses(replace(of_kind("chat"), model=model)) for model in ("m", "adapter", "other")]
    assert result == [True, True, False]


def test_a_profile_must_be_for_the_model() -> None:
    serving().require_model(harmful())
    serving(model=None).require_model(harmful(V + 1))
    with pytest.raises(InvalidProfileError, match="the model m, not for other"):
        serving(model=ServedModel("other", V)).require_model(harmful())
