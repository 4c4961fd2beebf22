"""Who holds most of what clients share, against a model that keeps a list and looks through all of it."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule
from tests.support.memory import kept_bytes
from tests.support.slow import examples

from hemostat.relay.request_budget import MAX_EXAMINED_UPLOADS, UPLOAD_SHARE, RequestBudget
from hemostat.relay.shares import Holding, Shares

LIMIT = 100
NAMES = st.sampled_from([b"a", b"b", b"c"])


class Named:
    """An owner of which nothing but its credential matters."""

    def __init__(self, credential: bytes) -> None:
        self._credential = credential

    def credential(self) -> bytes:
        return self._credential

    def give_way(self) -> None:
        raise NotImplementedError

    give_way_upload = give_way

    def uploads_slowly(self, now: float) -> bool:
        raise NotImplementedError


@dataclass(eq=False)
class Held:
    """What the model knows of a holding."""

    holding: Holding
    credential: bytes
    size: int = 0
    order: int = 0
    """When it became more than nothing."""


class Model:
    def __init__(self) -> None:
        self.all: list[Held] = []
        self.order = 0

    def of(self, network: bytes, credential: bytes | None = None) -> int:
        return sum(
            held.size for held in self.all if held.holding.network == network and credential in (None, held.credential)
        )

    def add(self, held: Held, size: int) -> None:
        if not held.size:
            self.order += 1
            held.order = self.order
        held.size += size

    def largest(self) -> list[Held]:
        """Of the networks that hold most, of their credentials that hold most: those that come first."""
        here = [held for held in self.all if held.size]
        if not here:
            return []
        most = max(self.of(held.holding.network) for held in here)
        here = [held for held in here if self.of(held.holding.network) == most]
        result = []
        for network in {held.holding.network for held in here}:
            own = [held for held in here if held.holding.network == network]
            top = max(self.of(network, held.credential) for held in own)
            for credential in {held.credential for held in own}:
                if self.of(network, credential) == top:
                    of_it = [held for held in own if held.credential == credential]
                    incomplete = [held for held in of_it if not held.holding.waiting]
                    if incomplete:
                        result.append(max(incomplete, key=lambda held: (held.size, -held.order)))
                    else:
                        result.append(max(of_it, key=lambda held: held.order))
        return result


class SharesMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.shares, self.model = Shares(), Model()

    holdings = Bundle("holdings")

    @rule(target=holdings, network=NAMES, credential=NAMES, waiting=st.booleans())
    def opened(self, network: bytes, credential: bytes, waiting: bool) -> Held:
        held = Held(Holding(Named(credential), network), credential)
        held.holding.waiting = waiting
        self.model.all.append(held)
        return held

    @rule(held=holdings, size=st.integers(min_value=1, max_value=20))
    def grows(self, held: Held, size: int) -> None:
        self.model.add(held, size)
        self.shares.add(held.holding, size)

    @rule(held=holdings, part=st.floats(min_value=0.0, max_value=1.0))
    def shrinks(self, held: Held, part: float) -> None:
        size = round(held.size * part)
        held.size -= size
        self.shares.add(held.holding, -size)

    @rule(held=holdings, network=NAMES, credential=NAMES, waiting=st.booleans())
    def is_emptied_and_used_by_another(self, held: Held, network: bytes, credential: bytes, waiting: bool) -> None:
        self.shares.add(held.holding, -held.size)
        held.size = 0
        held.holding.network, held.holding.owner, held.holding.waiting = network, Named(credential), waiting
        held.credential = credential

    @rule()
    def the_largest_goes(self) -> None:
        largest = self.shares.largest()
        expected = self.model.largest()
        assert (largest is None) == (not expected)
        if largest is not None:
            held = next(held for held in self.model.all if held.holding is largest)
            assert held in expected
            self.shares.add(largest, -held.size)
            held.size = 0

    @rule(network=NAMES, credential=NAMES)
    def one_more_is_asked_for(self, network: bytes, credential: bytes) -> None:
        """Who gives it holds more than the client would then; nobody does, where nobody is found."""
        result = self.shares.larger(network, credential)
        most = max((self.model.of(held.holding.network) for held in self.model.all), default=0)
        own = [held for held in self.model.all if held.holding.network == network]
        top = max((self.model.of(network, held.credential) for held in own), default=0)
        if result is None:
            assert most <= self.model.of(network) + 1
            assert top <= self.model.of(network, credential) + 1
        elif result.network != network:
            assert self.model.of(result.network) == most > self.model.of(network) + 1
        else:
            assert result.owner is not None
            assert self.model.of(network, result.owner.credential()) == top > self.model.of(
                network, credential
            ) + 1 or (self.model.of(network) == most > self.model.of(network) + 1)

    @invariant()
    def sums_are_what_is_held(self) -> None:
        assert self.shares.size == sum(held.size for held in self.model.all)
        assert all(held.holding.size == held.size >= 0 for held in self.model.all)


TestShares = SharesMachine.TestCase
TestShares.settings = settings(max_examples=examples(60), stateful_step_count=60, deadline=None)


class Keeper:
    """Has a holding in a budget, and gives all of it back when it is asked."""

    def __init__(self, machine: BudgetMachine, network: bytes, credential: bytes) -> None:
        self.machine = machine
        self.holding = Holding(self, network)
        self._credential = credential
        self.upload: Holding | None = None
        self.slow = False

    def give_way(self) -> None:
        self.machine.gave_way(self)
        self.machine.budget.hold(self.holding, -self.holding.size)

    def give_way_upload(self) -> None:
        self.machine.gave_upload(self)
        self.end_upload()

    def end_upload(self) -> None:
        assert self.upload is not None
        self.machine.budget.end_upload(self.upload)
        self.upload = None

    def credential(self) -> bytes:
        return self._credential

    def uploads_slowly(self, now: float) -> bool:
        return self.slow


class BudgetMachine(RuleBasedStateMachine):
    """Of nobody is taken who holds less than an equal share, and everybody below one is let in."""

    def __init__(self) -> None:
        super().__init__()
        self.budget = RequestBudget(LIMIT, 16)
        self.keepers: list[Keeper] = []
        self.beginner: Keeper | None = None

    keepers_known = Bundle("keepers_known")

    def held(self, network: bytes) -> int:
        return sum(keeper.holding.size for keeper in self.keepers if keeper.holding.network == network)

    def uploads(self, network: bytes) -> int:
        return sum(keeper.upload is not None for keeper in self.keepers if keeper.holding.network == network)

    def gave_way(self, keeper: Keeper) -> None:
        own = self.held(keeper.holding.network)
        assert self.budget.held_bytes > LIMIT
        networks = {keeper.holding.network for keeper in self.keepers if keeper.holding.size}
        assert own == max(map(self.held, networks))
        assert own * len(networks) > LIMIT, "above an equal share"

    def gave_upload(self, keeper: Keeper) -> None:
        beginner = self.beginner
        assert beginner is not None
        network = keeper.holding.network
        assert (
            keeper.slow
            or self.uploads(network) > self.uploads(beginner.holding.network)
            or (network == beginner.holding.network)
        )

    @rule(target=keepers_known, network=NAMES, credential=NAMES)
    def opened(self, network: bytes, credential: bytes) -> Keeper:
        keeper = Keeper(self, network, credential)
        self.keepers.append(keeper)
        return keeper

    @rule(keeper=keepers_known, size=st.integers(min_value=1, max_value=60))
    def reads(self, keeper: Keeper, size: int) -> None:
        self.budget.hold(keeper.holding, size)
        self.budget.enforce()
        assert self.budget.held_bytes <= LIMIT

    @rule(keeper=keepers_known)
    def is_complete(self, keeper: Keeper) -> None:
        self.budget.hold(keeper.holding, -keeper.holding.size)

    @rule(target=keepers_known, keeper=keepers_known)
    def begins_an_upload(self, keeper: Keeper) -> object:
        if keeper.upload is not None:
            return multiple()
        self.beginner = keeper
        upload = Holding(keeper, keeper.holding.network)
        before = self.uploads(keeper.holding.network)
        others = {other.holding.network for other in self.keepers if other.upload is not None}
        if self.budget.begin_upload(upload, 0.0):
            keeper.upload = upload
        else:
            assert all(self.uploads(network) <= before + 1 for network in others), "nobody has more"
            assert not any(other.slow for other in self.keepers if other.upload is not None)
        assert sum(other.upload is not None for other in self.keepers) <= 4
        return multiple()

    @rule(keeper=keepers_known)
    def ends_its_upload(self, keeper: Keeper) -> None:
        if keeper.upload is not None:
            keeper.end_upload()

    @rule(keeper=keepers_known)
    def becomes_slow(self, keeper: Keeper) -> None:
        keeper.slow = True

    @invariant()
    def sums_are_what_is_held(self) -> None:
        assert self.budget.held_bytes == sum(keeper.holding.size for keeper in self.keepers)


TestBudget = BudgetMachine.TestCase
TestBudget.settings = settings(max_examples=examples(60), stateful_step_count=60, deadline=None)


class Uploading(Named):
    """Of a network of its own."""

    def __init__(self, budget: RequestBudget, network: bytes, *, slow: bool) -> None:
        super().__init__(b"")
        self.budget = budget
        self.slow = slow
        self.upload = Holding(self, network)

    def begin(self) -> bool:
        return self.budget.begin_upload(self.upload, 0.0)

    def give_way_upload(self) -> None:
        self.budget.end_upload(self.upload)

    def uploads_slowly(self, now: float) -> bool:
        return self.slow


def test_a_slow_upload_is_found_behind_others_that_do_not_end() -> None:
    places = 2 * MAX_EXAMINED_UPLOADS
    budget = RequestBudget(LIMIT, UPLOAD_SHARE * places)
    for number in range(places):
        assert Uploading(budget, b"%d" % number, slow=number == places - 1).begin()
    new = Uploading(budget, b"new", slow=False)
    assert [new.begin(), new.begin()] == [False, True]


class Pipelining(Named):
    """Has sent one request more, which begins when the first one has given way."""

    def __init__(self, budget: RequestBudget, number: int, depths: list[int]) -> None:
        super().__init__(b"")
        self.budget = budget
        self.holding = Holding(self, b"%d" % number)
        self.left = 1
        self.depths = depths
        """Of calls inside of each other: at present, and the most."""

    def give_way(self) -> None:
        self.depths[0] += 1
        self.depths[1] = max(self.depths)
        self.budget.hold(self.holding, -self.holding.size)
        if self.left:
            self.left -= 1
            self.budget.hold(self.holding, 3)
            self.budget.enforce()
        self.depths[0] -= 1


def test_requests_that_begin_where_others_give_way_make_no_call_inside_of_another() -> None:
    """Of thousands of clients, such calls would end the process."""
    budget, depths = RequestBudget(LIMIT, 16), [0, 0]
    for number in range(LIMIT // 2):
        budget.hold(Pipelining(budget, number, depths).holding, 3)
    budget.enforce()
    assert budget.held_bytes <= LIMIT
    assert depths == [0, 1]


def test_nothing_is_kept_of_clients_that_hold_nothing() -> None:
    shares, kept = Shares(), 0
    for number in range(5_000):
        holding = Holding(None, b"%d" % number)
        shares.add(holding, 10)
        assert number % 2 or shares.largest() is holding
        shares.add(holding, -10)
        kept = kept or (kept_bytes(shares) if number == 500 else 0)
    assert shares.size == 0
    assert kept_bytes(shares) < 2 * kept < 50_000


def test_a_change_costs_the_same_however_many_hold_something() -> None:
    """A change takes a time that is logarithmic in what is kept, and no more is kept after a thousand changes."""
    shares, kept = Shares(), list[int]()
    many = [Holding(Named(b"%d" % (number % 500)), b"%d" % (number % 50)) for number in range(5_000)]
    for size in range(1, 5):
        for holding in many:
            shares.add(holding, size)
            assert shares.largest() is not None
        kept.append(kept_bytes(shares))
    assert kept[-1] < 1.5 * kept[0]
