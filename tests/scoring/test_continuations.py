"""Turns of a conversation whose beginning changes are known by what they repeat; variants of a template are not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tests.support.memory import kept_bytes
from tests.support.records import make_record
from tests.support.world import World

from hemostat.scoring.record_reader import SeenUnits
from hemostat_calibration.arrays import Ids
from hemostat_calibration.statistics import continuations
from hemostat_calibration.statistics.continuations import ANSWER, WINDOW, Continuations


def text(random: np.random.Generator, tokens: int) -> Ids:
    return random.integers(0, 40_000, tokens).astype(np.int32)


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("answer_tokens", [4, 60])
def test_turns_whose_beginning_changes_are_one_conversation(answer_tokens: int, dropped: bool) -> None:
    """A date in the system prompt, or a first message that the application drops."""
    random, known = np.random.default_rng(0), Continuations(b"key")
    history, conversations = [text(random, 30)], []
    for turn in range(5):
        prompt = np.concatenate([text(random, 6), *history[max(turn - 1, 0) if dropped else 0 :]])
        conversations.append(known.conversation(prompt, b"%d" % turn))
        answer = text(random, answer_tokens)
        known.update(prompt, answer, conversations[-1])
        history += [np.concatenate([answer, text(random, 40)])]
    assert set(conversations) == {b"0"}


def test_variants_of_a_template_are_conversations_of_their_own() -> None:
    """They end alike, and are answered alike."""
    random, known = np.random.default_rng(1), Continuations(b"key")
    beginning, end, answer = text(random, 50), text(random, 40), text(random, 40)
    for number in range(20):
        prompt = np.concatenate([beginning, text(random, 3), end])
        assert known.conversation(prompt, b"%d" % number) == b"%d" % number
        known.update(prompt, answer, b"%d" % number)


def test_what_several_conversations_have_in_common_names_none_of_them() -> None:
    """Agents: every tool's result ends alike, and every next call begins alike."""
    random, known = np.random.default_rng(4), Continuations(b"key")
    end, call = text(random, WINDOW), text(random, ANSWER)
    for number in range(5):
        history, own = [text(random, 50)], b"%d" % number
        for _ in range(3):
            prompt, answer = np.concatenate([*history, end]), np.concatenate([call, text(random, 9)])
            assert known.conversation(prompt, own) == own
            known.update(prompt, answer, own)
            history += [end, answer, text(random, 30)]


def test_less_than_a_window_is_not_remembered_and_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continuations, "MAX_REQUESTS", 8)
    random, known = np.random.default_rng(2), Continuations(b"key")
    short, answer = text(random, WINDOW - ANSWER - 1), text(random, ANSWER)
    known.update(short, answer, b"short")
    assert known.conversation(np.concatenate([short, answer, short]), b"own") == b"own"
    asked = [(text(random, 40), text(random, 20)) for _ in range(12)]
    kept = []
    for number, (prompt, output) in enumerate(asked):
        known.update(prompt, output, b"%d" % number)
        kept.append(kept_bytes(known))
    conversations = [known.conversation(np.concatenate(both), b"own") for both in asked]
    assert conversations[0] == b"own"
    assert conversations[-1] == b"11"
    assert kept[-1] < 1.01 * kept[8]


def test_a_later_turn_is_no_observation_of_its_own() -> None:
    random, seen, record = np.random.default_rng(3), SeenUnits(), make_record(World().truth(0), 20)
    prompt = text(random, 40)
    later = np.concatenate([text(random, 3), prompt[3:], record.output_ids, text(random, 10)])
    assert seen.update(replace(record, conversation=b"one"), prompt)
    assert not seen.update(replace(record, conversation=b"another"), later)
    assert seen.update(replace(record, conversation=b"third"), text(random, 60))
