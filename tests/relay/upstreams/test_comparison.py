"""Which engine fails more requests than the others: simulated engines and clients, one request after the other."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.memory import kept_bytes

from hemostat.relay.upstreams.comparison import MAX_CLIENTS, FailureComparison
from hemostat.relay.upstreams.group import RETRY_BURST, RETRY_RATIO, RetryBudget

Fails = Callable[[int], bool]
"""A request, asked whether it fails at this engine."""


class World:
    """Uses the comparison as relays do. odd: how often each engine was found to fail more than the others; nothing
    follows from it here, so that it is found again and again."""

    def __init__(self, engines: int, seed: int) -> None:
        self.random = random.Random(seed)
        self.engines = engines
        self.now = 0.0
        self.requests = [0] * engines
        self.comparison = FailureComparison(self.requests, self.now)
        self.odd: Counter[int] = Counter()

    def at(self, rate: float) -> Fails:
        """It fails at every engine, each time with this probability."""
        return lambda engine: self.random.random() < rate

    def ask(
        self,
        client: bytes,
        fails: Fails,
        *,
        conversation: int | None = None,
        retried: bool = False,
        network: bytes | None = None,
    ) -> None:
        """conversation: the engine that it falls to. retried: it is sent to a second engine if the first fails it.
        network: None: one of its own."""
        self.now += 0.01
        if int(self.now * 100) % 100 == 0:
            self.comparison.advance(self.requests, self.now)
        started = self.now
        spread = self.comparison.spreading and self.comparison.spreads(client, self.now)
        engine = self.random.randrange(self.engines) if conversation is None or spread else conversation
        self.requests[engine] += 1
        if not fails(engine):
            return
        if retried and self.comparison.may_retry(client, self.now):
            other = self.random.choice([candidate for candidate in range(self.engines) if candidate != engine])
            self.requests[other] += 1
            if fails(other):
                self.comparison.put_down(client, self.now)
                return
        else:
            retried = False
        self.comparison.failed(
            client,
            client if network is None else network,
            engine,
            self.requests,
            self.engines,
            started=started,
            now=self.now,
            proven=retried,
        )
        if self.comparison.odd(client, engine, self.requests, self.engines):
            self.odd[engine] += 1


def client(number: int) -> bytes:
    return b"client %d" % number


@pytest.mark.parametrize("retried", [False, True])
@pytest.mark.parametrize("clients", [1, 20, 100_000])
@pytest.mark.parametrize("engines", [2, 4, 16])
def test_engines_that_fail_equally_often_are_all_left_alone(engines: int, clients: int, retried: bool) -> None:
    """Eight lives of 2,000 requests."""
    lives = 0
    for seed in range(8):
        world = World(engines, seed)
        rate = world.random.choice([0.01, 0.1, 0.3, 0.9])
        for _ in range(2_000):
            world.ask(client(world.random.randrange(clients)), world.at(rate), retried=retried)
        lives += bool(world.odd)
    assert not lives


@given(st.integers(2, 8), st.integers(1, 200), st.floats(0.0, 0.02), st.booleans(), st.integers(0, 99))
def test_an_engine_that_fails_far_more_often_than_the_others_is_found(
    engines: int, clients: int, others: float, retried: bool, seed: int
) -> None:
    """Each client has one conversation. Failures that are not proven have to show in where the clients fail."""
    world = World(engines, seed)
    rates = [0.3 if retried else 1.0] + [others] * (engines - 1)
    for _ in range(4_000):
        number = world.random.randrange(clients)
        world.ask(
            client(number),
            lambda engine: world.random.random() < rates[engine],
            conversation=number % engines,
            retried=retried,
        )
        if world.odd:
            break
    assert set(world.odd) == {0}


@pytest.mark.parametrize("seed", range(10))
def test_clients_with_one_request_each_find_it_too(seed: int) -> None:
    world = World(4, seed)
    for number in range(200):
        world.ask(client(number), lambda engine: engine == 2)
    assert set(world.odd) == {2}


@pytest.mark.parametrize("engines", [2, 4, 64])
@pytest.mark.parametrize("retried", [False, True])
@pytest.mark.parametrize("pinned", [False, True])
def test_a_client_whose_requests_fail_everywhere_has_no_engine_ejected(
    engines: int, retried: bool, pinned: bool
) -> None:
    """Bad requests of a conversation that falls to one engine, and good ones of another conversation between them."""
    for seed in range(10):
        world = World(engines, seed)
        bad, good = (0, 1) if pinned else (None, None)
        for _ in range(1_000):
            world.ask(b"poisons", lambda engine: True, conversation=bad, retried=retried)
            world.ask(b"poisons", lambda engine: False, conversation=good)
            world.ask(client(world.random.randrange(20)), world.at(0.001))
        assert not world.odd


@pytest.mark.parametrize("credentials", [5, 50, 100_000])
def test_a_network_that_invents_credentials_has_no_engine_ejected(credentials: int) -> None:
    """Bad requests of a conversation that falls to one engine, which are not sent again."""
    for seed in range(5):
        world = World(4, seed)
        for _ in range(1_000):
            key = client(world.random.randrange(credentials))
            world.ask(key, lambda engine: True, conversation=0, network=b"network")
            for _ in range(4):
                world.ask(b"good", lambda engine: False)
        assert not world.odd


def test_a_bad_engine_is_found_behind_a_gateway_by_requests_that_another_one_answers() -> None:
    """Clients with one request each, all of one network."""
    for seed in range(10):
        world = World(4, seed)
        for number in range(200):
            world.ask(client(number), lambda engine: engine == 2, retried=True, network=b"gateway")
        assert set(world.odd) == {2}


def test_a_bad_engine_is_found_beside_a_client_whose_requests_fail_everywhere() -> None:
    for seed in range(10):
        world = World(4, seed)
        for _ in range(1_000):
            world.ask(b"poisons", lambda engine: True, conversation=0)
            world.ask(client(world.random.randrange(20)), lambda engine: engine == 3)
        assert set(world.odd) == {3}


def test_requests_in_progress_at_one_engine_count_once() -> None:
    """A hundred bad requests of one conversation, sent before the first of them has failed."""
    comparison = FailureComparison([0] * 4, 0.0)
    for number in range(100):
        comparison.failed(b"a", b"a", 0, [100, 0, 0, 0], 4, started=1.0, now=2.0 + number / 100, proven=False)
        assert not comparison.odd(b"a", 0, [100, 30, 30, 30], 4)


def test_an_engine_with_a_few_failures_among_many_requests_is_left_alone() -> None:
    world = World(4, 1)
    for _ in range(20_000):
        world.ask(b"a", lambda engine: engine == 1 and world.random.random() < 0.02, retried=True)
    assert not world.odd


def test_what_is_kept_of_clients_is_bounded() -> None:
    world, kept = World(4, 1), []
    for turn in range(3):
        for number in range(MAX_CLIENTS):
            world.ask(client(turn * MAX_CLIENTS + number), world.at(1.0))
        kept.append(kept_bytes(world.comparison))
    assert kept[2] < 1.5 * kept[0]
    world.now += 1_000.0
    world.comparison.advance(world.requests, world.now)
    assert kept_bytes(world.comparison) < 0.5 * kept[0]


@pytest.mark.parametrize("engines", [2, 3, 4, 8])
def test_the_retries_last_until_an_engine_that_fails_all_its_requests_is_found(engines: int) -> None:
    """However the requests happen to fall to the engines, no client sees an error of the one that fails."""
    for seed in range(500):
        draw, budget, requests, resent = random.Random(seed), RetryBudget(), [0] * engines, 0
        comparison = FailureComparison(requests, 0.0)
        for number in range(400):
            engine = draw.randrange(engines)
            requests[engine] += 1
            if engine:
                continue
            assert budget.take(sum(requests) - resent), f"seed {seed}, request {number}"
            resent += 1
            requests[draw.randrange(1, engines)] += 1
            comparison.failed(b"a", b"a", 0, requests, engines, started=number, now=number + 0.5, proven=True)
            if comparison.odd(b"a", 0, requests, engines):
                break
        else:
            pytest.fail(f"seed {seed}: not found")


@given(st.lists(st.tuples(st.integers(0, 50), st.booleans()), max_size=200))
def test_retries_are_a_tenth_of_the_requests(steps: list[tuple[int, bool]]) -> None:
    budget, requests, taken = RetryBudget(), 0, 0
    for more, fails in steps:
        requests += more
        taken += fails and budget.take(requests)
        assert taken <= RETRY_BURST + RETRY_RATIO * requests + 1e-9
    assert budget.take(requests + 1 + int(1 / RETRY_RATIO))
