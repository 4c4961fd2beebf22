"""The captures that tests of candidates wait for: they are scored before others."""

from __future__ import annotations

import msgspec
from tests.support.adapter_bench import Judging
from tests.support.captures import capture
from tests.support.profile_bench import JUDGED, LEARNED

from hemostat.config.schema import Adapter
from hemostat.ipc.messages import REST_GRAMMAR_KIND, REST_KIND, Capture
from hemostat.scoring.awaited_evidence import AwaitedEvidence

TOKENS = Adapter().min_tokens


def test_held_out_conversations_that_a_test_can_count_are_awaited() -> None:
    judging = Judging({})
    names, unit = judging.profiles.serving.names, b""

    def template_of(prompt: object, conversation: bytes) -> bytes:
        assert judging.profiles.trials.tested, "nothing is computed while nothing is tested"
        return unit

    evidence = AwaitedEvidence(judging.profiles, template_of)

    def is_awaited(template: bytes, conversation: bytes = b"", kind: str = REST_KIND) -> bool:
        nonlocal unit
        unit = template
        return evidence.is_awaited(msgspec.structs.replace(of_the_model, conversation=conversation, kind=kind))

    of_the_model: Capture = msgspec.structs.replace(capture(), model=next(iter(names or ["m"])))
    assert not is_awaited(JUDGED[50]), "nothing is tested"
    judging.propose(1, TOKENS, 0.0)
    judging.feed(2)  # the first one begins the test
    assert is_awaited(JUDGED[50])
    assert is_awaited(b"", JUDGED[50]), "without a template the conversation is the unit"
    assert is_awaited(JUDGED[50], LEARNED[50]), "the template comes before the conversation"
    assert is_awaited(JUDGED[50], kind="a kind that is not followed")
    assert not is_awaited(JUDGED[50], kind=REST_GRAMMAR_KIND), "nothing is tested there"
    assert not is_awaited(LEARNED[50])
    assert not is_awaited(JUDGED[1]), "it has counted"
    judging.profiles.serving.names = frozenset({"another model"})
    assert not is_awaited(JUDGED[50])
