"""Clusters of alike prompts: what is one, what is not, and what a restart keeps."""

import numpy as np
import pytest

from hemostat_calibration.errors import InvalidArgumentError
from hemostat_calibration.statistics import templates
from hemostat_calibration.statistics.split import held_out
from hemostat_calibration.statistics.templates import FRAME_PROMPTS, TemplateTable

KEY = b"k" * 32
VOCABULARY = 40_000


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def text(random: np.random.Generator, tokens: int) -> np.ndarray:
    return random.integers(0, VOCABULARY, tokens).astype(np.int32)


def variants(random: np.random.Generator, count: int, tokens: int = 60, places: int = 4) -> list[np.ndarray]:
    base, where = text(random, tokens), random.choice(tokens, places, replace=False)
    result = []
    for _ in range(count):
        result.append(base.copy())
        result[-1][where] = text(random, places)
    return result


def talk(random: np.random.Generator) -> bytes:
    return random.bytes(16)


def test_variants_of_a_template_are_on_one_side_of_the_split() -> None:
    random, table = rng(), TemplateTable(KEY)
    every = [(n, prompt) for n in range(60) for prompt in variants(random, 24)]
    result: dict[int, list[bytes]] = {}
    for at in random.permutation(len(every)):
        template, prompt = every[at]
        result.setdefault(template, []).append(table.assign(prompt, talk(random)))
    astray = sum(
        min(sum(held_out(prompt, 0.3) for prompt in ones), sum(not held_out(prompt, 0.3) for prompt in ones))
        for ones in result.values()
    )
    assert astray <= 0.01 * len(every)
    first = {ones[0] for ones in result.values()}
    assert len(first) > 0.95 * len(result), "different templates are different clusters"


def test_questions_behind_one_system_prompt_are_distinguished() -> None:
    random, table = rng(1), TemplateTable(KEY)
    system = text(random, 300)
    result = [table.assign(np.concatenate([system, text(random, 15)]), talk(random)) for _ in range(200)]
    assert len(set(result[:FRAME_PROMPTS])) == 1, "nobody knows yet that it is a frame"
    assert len(set(result[FRAME_PROMPTS:])) > 0.98 * (200 - FRAME_PROMPTS)


def test_a_template_that_is_a_small_part_of_much_traffic_is_no_frame() -> None:
    random, table = rng(2), TemplateTable(KEY)
    alike = variants(random, FRAME_PROMPTS + 8)
    for number in range(60 * len(alike)):
        if number % 60:
            table.assign(text(random, 20), talk(random))
        else:
            last = table.assign(alike.pop(), talk(random))
    assert table.assign(variants(rng(2), 1)[0], talk(random)) == last


@pytest.mark.parametrize("turn_tokens", [12, 40, 150])
def test_turns_whose_beginning_changes_are_one(turn_tokens: int) -> None:
    """The system prompt has the time of day: each turn is a conversation of its own for the relay."""
    random, table = rng(3), TemplateTable(KEY)
    system = text(random, 80)

    def ask(body: np.ndarray) -> bytes:
        system[40:42] = text(random, 2)
        return table.assign(np.concatenate([system, body]), talk(random))

    for _ in range(FRAME_PROMPTS):
        ask(text(random, 20))
    conversations, total = [], 100
    for _ in range(total):
        body, turns = text(random, turn_tokens), set()
        for _ in range(5):
            turns.add(ask(body))
            body = np.concatenate([body, text(random, random.integers(turn_tokens, 3 * turn_tokens))])
        conversations.append(turns)
    assert sum(len(turns) > 1 for turns in conversations) <= 0.05 * total
    assert len(set().union(*conversations)) > 0.95 * total


def test_a_conversation_is_one_cluster_whatever_it_says() -> None:
    random, table = rng(4), TemplateTable(KEY)
    first = table.assign(text(random, 40), b"conversation")
    assert table.assign(text(random, 40), b"conversation") == first != table.assign(text(random, 40), b"another")


def test_without_shingles_the_prompt_or_the_conversation_is_the_cluster() -> None:
    table = TemplateTable(KEY)
    one, two, none = (np.array(ids, np.int32) for ids in ([1], [2], []))
    result = [table.assign(one), table.assign(two), table.assign(none), table.assign(one, b"talk")]
    assert len(set(result)) == 4
    assert [table.assign(one), table.assign(two), table.assign(none), table.assign(one, b"talk")] == result
    with pytest.raises(InvalidArgumentError, match=r"prompt has shape \(1, 1\)"):
        table.assign(one[None])


def test_a_restart_changes_nothing() -> None:
    random, other = rng(5), rng(6)
    alike = [prompt for _ in range(20) for prompt in variants(random, 6)]
    table = TemplateTable(KEY)
    for prompt in alike[::2]:
        table.assign(prompt, talk(other))
    saved = table.save()
    restored = TemplateTable.load(saved, KEY)
    names = [talk(other) for _ in alike]
    assert [restored.assign(*pair) for pair in zip(alike, names, strict=True)] == [
        table.assign(*pair) for pair in zip(alike, names, strict=True)
    ]
    assert len(restored.save()) - len(saved) < 100
    assert alike[0].tobytes()[:12] not in saved


def test_a_forgotten_template_mostly_stays_on_its_side() -> None:
    """Nothing is known any more, and another variant comes first."""
    random, moved = rng(7), 0
    for _ in range(200):
        first, second = variants(random, 2)
        moved += held_out(TemplateTable(KEY).assign(first), 0.3) != held_out(TemplateTable(KEY).assign(second), 0.3)
    assert moved < 0.3 * 200, "42 % by chance"


def test_the_oldest_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "MAX_PROMPTS", 8)
    random, table = rng(8), TemplateTable(KEY)
    first = text(random, 40)
    was = table.assign(first, b"first")
    for _ in range(20):
        table.assign(text(random, 40))
    assert table.prompts == 21
    assert table.assign(first, b"first") == was, "its digest follows from its shingles"
    assert table.prompts == 22


def test_another_key_is_other_clusters_and_a_damaged_table_is_refused() -> None:
    prompt = text(rng(9), 40)
    table = TemplateTable(KEY)
    assert table.assign(prompt) != TemplateTable(b"another").assign(prompt)
    saved = table.save()
    for damaged in (b"", saved[:-1], saved.replace(b'"counted"', b'"counter"'), saved.replace(b"U16", b"I16")):
        with pytest.raises(InvalidArgumentError, match="templates"):
            TemplateTable.load(damaged, KEY)
