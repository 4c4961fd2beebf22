"""The benchmark's worlds, with few lives and a fixed seed: every row holds."""

import json
import math

import numpy as np
import pytest
from tests.bench import bench_guard
from tests.bench.guard import Row, adapters, clients, count_row, dependence, median, modules, most, watch
from tests.bench.guard.traffic import normal
from tests.support.slow import slow_unless

from hemostat_calibration.guard import harm, wealth
from hemostat_calibration.guard.decisions import Reason
from hemostat_calibration.guard.guard import Guard
from hemostat_calibration.guard.kind_test import KindTest

LIVES = 10
"""A wrong rule decides wrongly in most of them; how often a right one does, `make bench-guard` counts in 1,000."""
MODULES = {module.NAME: module for module in modules() if getattr(module, "TEST_LIVES", LIVES)}
"""Those that are fast enough for a test; `make bench-guard` runs the others, too."""


QUICK = set(MODULES) - {
    "alarm",
    "clients",
    "conversations",
    "dependence",
    "excess",
    "kinds",
    "sampled_outcomes",
    "serving",
    "starvation",
    "templates",
    "watch",
}
"""The modules left out simulate for five to twenty seconds each. For the worlds of the alarm and of dependence,
`test_alarm.py` and `test_dependence.py` try the rule in the hardest worlds, with 20 to 120 lives each."""


@pytest.mark.parametrize("name", slow_unless(QUICK, list(MODULES)))
def test_every_row_holds(name, monkeypatch):
    monkeypatch.setattr(dependence, "UNITS", 1000)  # all lives are computed together: its time is that of the units
    lives = getattr(MODULES[name], "TEST_LIVES", LIVES)
    rows = list(MODULES[name].rows(lives, 0))
    assert rows
    assert [row for row in rows if not row.holds] == []


def test_one_client_could_buy_a_promotion_if_the_evidence_could_hang_on_it(monkeypatch):
    """Its share of the units is limited as before: that alone is not enough."""
    monkeypatch.setattr(wealth, "MIN_CLIENTS", 10**9)
    promoted, _, _ = clients.harmful_promoted(50, np.random.default_rng(0))
    assert promoted > most(50, 0.05)


def test_a_useless_profile_would_serve_on_if_restarts_began_its_window_anew():
    rng = np.random.default_rng(0)
    gains = normal(rng, 0.0, 3000)
    assert watch.serve(rng, gains, keep=False) == (3000, 300, None)
    assert watch.serve(rng, gains)[1:] == (1000, Reason.UNSUPPORTED)


def test_a_loss_would_be_hidden_by_an_earlier_gain_if_the_evidence_did_not_begin_anew(monkeypatch):
    assert watch.turned(4, np.random.default_rng(0)).holds
    monkeypatch.setattr(harm, "STEP", 10**9)
    assert not watch.turned(4, np.random.default_rng(0)).holds


def test_an_adapter_would_be_replaced_on_gains_over_identity_if_tests_went_on(monkeypatch):
    """A test that goes on when what serves changes, and adds up nats and total variation."""

    def begin_kind(guard, name, kind, width, figure):
        if kind not in guard.kinds(name):
            return begin(guard, name, kind, width, figure)
        return guard.candidate_tests

    begin = Guard.begin_kind
    monkeypatch.setattr(Guard, "begin_kind", begin_kind)
    monkeypatch.setattr(KindTest, "_require", lambda test, figure: None)
    assert not adapters.switching(20, np.random.default_rng(0)).holds


def test_limits_of_counts():
    assert (most(1000, 0.05), most(1000, 0.01)) == (64, 17)
    assert most(10, 0.0) == 0
    assert count_row("x", 64, 1000, 0.05) == Row("x", "64 of 1000", "<= 64 of 1000", True)
    assert not count_row("x", 65, 1000, 0.05).holds
    assert median([1.0, 2.0, math.inf]) == 2.0


def test_the_table_and_the_file(tmp_path, monkeypatch, capsys):
    """One module is run, in a process of its own; the rows of others stay in the file."""
    path = tmp_path / "guard.json"
    monkeypatch.setattr(bench_guard, "RESULT", path)
    path.write_text(json.dumps({"rows": [{"module": "another", "case": "x"}, {"module": "breaks", "case": "old"}]}))
    status = bench_guard.main(["--only", "breaks", "--lives", "2", "--seed", "3", "--jobs", "1"])
    result = json.loads(path.read_text())
    rows = result["rows"]
    assert rows[0] == {"module": "another", "case": "x"}
    assert {row["module"] for row in rows[1:]} == {"breaks"}
    assert "old" not in {row["case"] for row in rows}
    assert status == (0 if all(row["holds"] for row in rows[1:]) else 1)
    assert (result["lives"], result["seed"]) == (2, 3)
    assert f"breaks: {rows[1]['case']}" in capsys.readouterr().out
    given: list[str] = []
    monkeypatch.setattr(bench_guard, "run_modules", lambda _, names, *more, done: given.extend(names) or [])
    assert bench_guard.main(["--only", "breaks", "--lives", "2", "--seed", "3", "--resume"]) == status
    assert json.loads(path.read_text()) == result
    for other in (["--seed", "4", "--resume"], ["--seed", "3"]):
        bench_guard.main(["--only", "breaks", "--lives", "2", *other])
    assert given == ["breaks", "breaks"], "of another seed, and without --resume"
