"""A control process without relays: what plugins sample themselves is queued, and their figures stand for a relay's."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import msgspec
import numpy as np
import pytest
from tests.support.control import settings

from hemostat.control.composition import Control
from hemostat.engines.messages import AnswerMessage, TapAnswer
from hemostat.ipc.messages import Capture
from hemostat.metrics import names
from hemostat.metrics.reasons import Unscored
from hemostat.openai.reading import read_request
from hemostat.openai.routes import Form
from hemostat.scoring.passive_captures import Conversations, decoding_of, kind_of
from hemostat.scoring.pipeline import ScoringPipeline
from hemostat_calibration.passive import PassiveCounts, PassivePolicy, PassiveRequest

REQUEST = PassiveRequest("/v1/chat/completions", "chatcmpl-1", "served", temperature=0.0, max_tokens=100)
POLICY = PassivePolicy(
    rate=1.0,
    allow_on=False,
    top_k=2,
    max_tokens=100,
    tap=False,
    grammars=False,
    labels=frozenset(),
    salt=b"",
    client_header="authorization",
)


def ids(*values: int) -> bytes:
    return np.array(values, "<i4").tobytes()


def message(prefix: str, unscored: int = 1) -> AnswerMessage:
    floats = np.array([-0.5, -1.0], "<f4").tobytes()
    answer = TapAnswer(
        f"{prefix}-1", 0, 0, 1, ids(5, 6), ids(3), 1, ids(3, 4), floats, floats[:4], "stop", request=REQUEST
    )
    counts = PassiveCounts({REQUEST.route: 9}, 1, {"opted_out": unscored, "unheard of": 3}, headers=True)
    return AnswerMessage("boot", [answer], 0, counts)


def test_what_a_plugin_samples_is_offered_and_its_counts_are_those_of_a_relay(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = list[Capture]()
    monkeypatch.setattr(ScoringPipeline, "offer", lambda _, capture: taken.append(capture))
    control = Control(settings(), 0, passive=True)
    reports = control.engines.reports
    assert reports.passive.told() is None
    reports.passive.policy = POLICY
    assert reports.passive.told() == POLICY
    for unscored in (1, 1, 3):
        reports.update_answers(message(reports.nonce_prefix, unscored), 0.0)
    assert len(taken) == 3
    assert (taken[0].kind, taken[0].nonce, taken[0].output_token_ids) == ("chat text greedy", "", ids(3))
    assert (control.link.relays, control.link.ready) == (1, True)
    shadow = control.link.total().counters[names.SHADOW_REQUESTS]
    assert shadow == {("shadowed", ""): 1.0, ("skipped", "opted_out"): 3.0}
    assert control.pipeline.coverage.report()["requests"] == 3
    assert not reports.answers.complete(f"{reports.nonce_prefix}-1", 1)


def test_a_control_process_with_relays_tells_plugins_to_sample_nothing_and_takes_nothing() -> None:
    control = Control(settings(), 1234)
    reports = control.engines.reports
    reports.passive.policy = POLICY
    assert reports.passive.told() is None
    reports.update_answers(message(reports.nonce_prefix), 0.0)
    assert (control.link.relays, control.pipeline.received) == (0, 0)


def test_turns_of_one_conversation_begin_with_the_prompt_before() -> None:
    turns = Conversations()
    first = turns.assign(ids(*range(20)), b"salt")
    assert turns.assign(ids(*range(30)), b"salt") == first
    assert turns.assign(ids(*range(40)), b"salt") == first
    assert turns.assign(ids(*range(19), 99, *range(30)), b"salt") != first
    assert turns.assign(ids(1), b"salt") != turns.assign(ids(1, 2), b"salt")


def test_kinds_and_parameters() -> None:
    longer = dataclasses.replace(REQUEST, top_p=0.5, temperature=1.0, label="batch", grammar=True, max_tokens=9)
    assert kind_of(longer, 1001, several_models=True) == "chat model served label batch grammar cut long brief"
    assert msgspec.json.decode(decoding_of(REQUEST))["max_tokens"] == 100
    assert decoding_of(dataclasses.replace(REQUEST, temperature=math.nan)) == b""


def test_a_relay_honours_the_key_that_opts_out() -> None:
    body = b'{"model": "m", "prompt": "x", "vllm_xargs": {"hemostat_shadow": "off"}}'
    assert read_request(body, form=Form.COMPLETIONS).unscorable is Unscored.OPTED_OUT


@pytest.mark.parametrize(
    ("counts", "named"),
    [
        ({"sampled": -1}, "sampled is -1"),
        ({"requests": {str(route): 1 for route in range(17)}}, "requests has 17 names"),
        ({"unscored": {"x" * 300: 1}}, "unscored has 300 characters"),
    ],
)
def test_counts_that_no_plugin_has_are_refused_where_they_are_decoded(counts: dict[str, Any], named: str) -> None:
    whole = {"requests": {}, "sampled": 0, "unscored": {}, "headers": True}
    with pytest.raises(msgspec.ValidationError, match=named):
        msgspec.convert(whole | counts, PassiveCounts)
