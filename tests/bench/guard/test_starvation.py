"""A good build is promoted however fast newer ones follow."""

from tests.bench.guard import starvation as world


def test_builds_that_come_fast_do_not_keep_a_good_one_from_being_promoted():
    """If tests ended for every newer build, it would be after more than 1,100 requests, and the sixth build."""
    for traffic in world.lives_of(6, 0, tokens=3_000, kinds=1, requests=900):
        assert traffic.promoted
        assert traffic.builds > 2, "newer ones came meanwhile"


def test_a_build_that_gains_nothing_gives_way_to_a_newer_one():
    assert max(world.useless_first(2, 0)) <= 500


def test_how_often_builds_come_changes_nothing_of_the_test_that_runs():
    """The first build is promoted by the same request, with 50 and more newer ones and without any."""
    alone, beside = (world.offered(2, 0, tokens=3_000, kinds=1, every=every) for every in (None, 1))
    assert [world.first(traffic) for traffic in alone] == [world.first(traffic) for traffic in beside]
    assert all(traffic.promoted and traffic.builds == 1 for traffic in alone)
    assert all(traffic.builds > 50 for traffic in beside)
