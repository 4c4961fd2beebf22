"""Which weights are in force, by what several engines report over a rolling update."""

from __future__ import annotations

import pytest

from hemostat.engines.messages import InvalidEngineMessage, RankReport, decode_report
from hemostat.engines.reports import SILENCE_SECONDS, PluginReports, ServedWeights

NAMES = frozenset(("m", "alias"))


class Deployment:
    def __init__(self) -> None:
        self.registry = PluginReports()
        self.served = ServedWeights(self.registry)
        self.now = 0.0

    def at(self, now: float, **engines: str) -> str:
        """By boot id, the weights that each engine reports now; the weights in force afterwards."""
        self.now = now
        for boot, weights in engines.items():
            report = RankReport(boot, 0, 1, [], 100, {}, "v1", "0", model="m" if weights else "", weights=weights)
            self.registry.update(report, now)
        return self.served.of("m", NAMES, now)


def test_a_rolling_update_is_complete_once_no_engine_has_the_old_weights() -> None:
    deployment = Deployment()
    assert deployment.at(0.0) == ""
    assert deployment.at(1.0, a="old", b="old") == "old"
    assert deployment.at(5.0, a="old", new="new") == "old"
    assert deployment.at(16.5, a="old", new="new") == "old", "b is gone"
    assert deployment.at(30.0, new="new", newer="new") == "old", "a reported 13 s ago"
    assert deployment.at(31.6, new="new", newer="new") == "new"


def test_a_rolling_update_that_is_taken_back_changes_nothing() -> None:
    deployment = Deployment()
    assert [deployment.at(0.0, a="old"), deployment.at(1.0, a="old", b="new"), deployment.at(17.0, a="old")] == [
        "old"
    ] * 3


def test_engines_that_say_nothing_change_nothing() -> None:
    """Of an older plugin, of one that reads the files meanwhile, and without a plugin."""
    deployment = Deployment()
    assert deployment.at(0.0, older="", a="old") == "old"
    assert deployment.at(1.0 + SILENCE_SECONDS, older="") == "old"
    assert deployment.at(2.0 + 2 * SILENCE_SECONDS) == "old", "all are silent: they start again"
    assert deployment.at(60.0, again="") == "old"
    assert deployment.at(61.0, again="new") == "new"


def test_nothing_is_known_while_engines_differ_from_the_start() -> None:
    deployment = Deployment()
    assert deployment.at(0.0, a="old", b="new") == ""
    assert deployment.at(16.0, b="new") == "new"


def test_of_several_others_most_engines_decide() -> None:
    deployment = Deployment()
    deployment.at(0.0, a="old")
    assert deployment.at(17.0, b="x", c="y", d="y") == "y"


def test_weights_of_another_model_do_not_count() -> None:
    deployment = Deployment()
    deployment.at(0.0, a="old")
    for boot, model, now in (("y", "alias", 1.0), ("z", "other", 10.0)):
        report = RankReport(boot, 0, 1, [], 100, {}, "v1", "0", model=model, weights=f"of {model}")
        deployment.registry.update(report, now)
    assert deployment.served.of("m", NAMES, 10.0) == "old"
    assert deployment.served.of("m", NAMES, 15.5) == "of alias", "another of its names"
    assert deployment.served.of("m", NAMES, 20.0) == "of alias", "z serves another model"
    assert deployment.served.of("other", {"other"}, 20.0) == "of other"


def test_ranks_of_one_engine_count_once() -> None:
    deployment = Deployment()
    for rank in range(2):
        report = RankReport("a", rank, 2, [], 100, {}, "v1", "0", model="m", weights="w" if rank == 0 else "")
        deployment.registry.update(report, 0.0)
    assert deployment.registry.weights(NAMES, 0.0) == {"w": 1}


def test_a_report_of_an_older_plugin_is_read() -> None:
    body = b'{"boot_id": "b", "rank": 0, "world_size": 1, "versions": [], "vocab_size": 8, "counters": {}, '
    result = decode_report(body + b'"runner": "v1", "vllm": "0"}')
    assert (result.model, result.weights) == ("", "")


def test_an_engine_cannot_change_its_weights_while_it_runs() -> None:
    """It loads them once. Else one that reports others each second would begin everything anew each second."""
    deployment = Deployment()
    assert deployment.at(0.0, a="old") == "old"
    for now in (1.0, 2.0):
        with pytest.raises(InvalidEngineMessage, match="weights"):
            deployment.at(now, a="new")
        assert deployment.served.of("m", NAMES, now) == "old"
    # Silent for long enough, it is another engine.
    assert deployment.at(3.0 + SILENCE_SECONDS, a="new") == "new"


@pytest.mark.parametrize("given", ["a\\nb", "a b", "\\u00e4", "a\\n", "0" * 65])
def test_a_fingerprint_is_a_name(given: str) -> None:
    """It is stored before what was learned, up to the end of the line, and logged."""
    with pytest.raises(InvalidEngineMessage, match="weights"):
        decode_report(REPORT + b'"weights": "%s"}' % given.encode())
    assert decode_report(REPORT + b'"weights": "0123456789abcdef0123456789abcdef"}').weights


REPORT = (
    b'{"boot_id": "b", "rank": 0, "world_size": 1, "versions": [], "vocab_size": 8, "counters": {}, '
    b'"runner": "v1", "vllm": "0", '
)
