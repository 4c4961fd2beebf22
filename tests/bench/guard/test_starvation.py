"""A good build is promoted however fast newer ones follow."""

from tests.bench.guard import starvation as world


def test_builds_that_come_fast_do_not_keep_a_good_one_from_being_promoted():
    """If tests ended for every newer build, it would be after more than 1,100 requests, and the sixth build."""
    for traffic in world.lives_of(6, 0, tokens=3_000, kinds=1, requests=900):
        assert traffic.promoted
        assert traffic.builds > 2, "newer ones came meanwhile"


def test_a_build_that_gains_nothing_gives_way_to_a_newer_one():
    assert max(world.useless_first(2, 0)) <= 500
