"""A good build is promoted however fast newer ones follow."""

import math
from dataclasses import replace

import numpy as np
from tests.bench.guard import starvation as world
from tests.bench.guard import starvation_rates as rates


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


class TestAtAnyRate:
    """Lives of drawn rates of requests and of builds."""

    class NewestOnly(rates.TimedBuilds):
        """The test that runs ends for every newer build."""

        def _propose(self):
            self.profiles.trials.remove(lambda candidate: True)
            return super()._propose()

    @staticmethod
    def lives(kind, number):
        """A build every five minutes, while a test takes ten minutes or more."""
        result = []
        for n in range(number):
            took = []
            for every in (math.inf, 300.0):
                rng = np.random.default_rng([5, n])
                traffic = kind(rng, 3_000, 1, per_second=0.5, every_seconds=every)
                traffic.run(1_300)
                took.append(traffic)
            alone, replaced = took
            result.append(rates.Life(n, 3_000, 1, 0.5, 300.0, 0.0, alone.took, replaced.took, replaced.builds))
        return result

    def test_no_life_is_starved(self):
        lives = self.lives(rates.TimedBuilds, 3)
        assert rates.starved(lives) == ([], [])
        assert all(life.builds > 1 and life.replaced == life.alone for life in lives)

    def test_lives_are_starved_if_the_newest_build_is_tested(self):
        lives = self.lives(self.NewestOnly, 3)
        late, alone = rates.starved(lives)
        assert len(late) >= 2
        assert alone == []

    def test_an_interrupted_run_goes_on_with_the_next_life(self, tmp_path, monkeypatch):
        file, drawn = tmp_path / "build" / "lives.jsonl", rates.live
        first = rates.lives_of(2, 0, file)
        with file.open("a") as other:
            other.write('{"code": "half a li')
        made = []
        monkeypatch.setattr(rates, "live", lambda seed, number: made.append(number) or drawn(seed, number))
        assert rates.lives_of(3, 0, file)[:2] == first
        assert made == [2]
        assert rates.lives_of(3, 0, file)[:2] == first
        assert made == [2], "a line that was cut off costs no other one"
        assert rates.lives_of(1, 1, file) != first[:1], "of another seed"

    def test_a_life_is_compared_with_lives_of_its_own_sort(self):
        slow = [rates.Life(n, 40, 12, 1.0, 300.0, 0.0, 1_000, 1_000, 1) for n in range(3)]
        quick = [rates.Life(n, 40, 1, 1.0, 300.0, 0.0, 100, 100, 1) for n in range(3)]
        never = replace(quick[0], replaced=None)
        assert rates.starved([*slow, *quick]) == ([], [])
        assert rates.starved([*slow, *quick, never]) == ([never], [])
