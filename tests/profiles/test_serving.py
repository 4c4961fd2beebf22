"""Which version serves, by mode, models, pin, force and scope."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tests.support.profile_bench import harmful
from tests.support.records import Truth, log_softmax, make_record
from tests.support.world import V

from hemostat.config.schema import Calibration
from hemostat.profiles.scopes import ALL, SCOPE_KEYS, Scopes
from hemostat.profiles.serving import ServedModel, ServingState
from hemostat_calibration.errors import InvalidProfileError
from hemostat_calibration.records import TokenRecord

MODEL = ServedModel("m", V)
RECORD = make_record(Truth(*(log_softmax(np.zeros((3, V))),) * 2, np.zeros(3, int)), 4)


def serving(**state: object) -> ServingState:
    """In mode auto with both models known; one label has a profile of its own."""
    made = ServingState(Scopes("label"), "auto")
    made.model = MODEL
    made.scopes[ALL].selected = "pooled"
    label = made.scopes.follow("chat")
    assert label is not None
    label.selected = "own"
    for name, value in state.items():
        setattr(made, name, value)
    return made


def labelled(label: str) -> TokenRecord:
    return replace(RECORD, label=label)


@pytest.mark.parametrize(
    ("state", "version", "by_scope", "reported"),
    [
        ({}, "pooled", {"chat": "own"}, "pooled"),
        ({"mode": "observe"}, None, {}, "pooled"),
        ({"mode": "off"}, None, {}, None),
        ({"model": None}, None, {}, "pooled"),
        ({"forced": "forced"}, None, {}, "forced"),
        ({"pinned": True}, "pooled", {}, "pooled"),
    ],
)
def test_what_serves(
    state: dict[str, object], version: str | None, by_scope: dict[str, str], reported: str | None
) -> None:
    made = serving(**state)
    assert (made.version, made.version_by_scope, made.reported) == (version, by_scope, reported)


@pytest.mark.parametrize(
    ("state", "expected"),
    [({}, "own"), ({"mode": "observe"}, "own"), ({"mode": "off"}, None), ({"pinned": True}, "pooled")],
)
def test_what_would_serve_a_request_of_a_label_with_a_profile_of_its_own(
    state: dict[str, object], expected: str | None
) -> None:
    made = serving(**state)
    assert made.would_serve(labelled("chat")) == expected
    assert made.baseline("chat") == (expected or "own")


@pytest.mark.parametrize("state", [{"mode": "off"}, {"model": None}, {"forced": "forced"}])
def test_nothing_is_learned_or_judged_while_calibration_is_not_active(state: dict[str, object]) -> None:
    assert serving().uses(labelled("chat"))
    assert not serving(**state).uses(labelled("chat"))


def test_a_profile_must_be_for_the_model() -> None:
    serving().require_model(harmful())
    serving(model=None).require_model(harmful(V + 1))
    with pytest.raises(InvalidProfileError, match="the model m, not for other"):
        serving(model=ServedModel("other", V)).require_model(harmful())


def test_every_kind_of_scope_of_the_settings_has_a_key() -> None:
    kinds = Calibration.model_fields["scope"].annotation
    assert kinds is not None
    assert set(SCOPE_KEYS) == set(kinds.__args__)
