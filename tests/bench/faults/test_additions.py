"""The benchmark's cases hold, but for what they cost: CPU times are for a machine that does nothing else."""

from __future__ import annotations

from tests.bench import bench_proxy
from tests.bench.faults import additions
from tests.bench.proxy import plugin_cost, sampled_cost


async def test_no_client_notices_what_is_added_to_its_request() -> None:
    rows = [*await additions.answer_rows(), await additions.pause_row(), *additions.record_rows()]
    assert [row for row in rows if not row.holds] == []


async def test_the_cost_of_a_sampled_answer_is_measured() -> None:
    costs = await sampled_cost.measure_both(rounds=2)
    assert all(0.0 < cost.until_queued < cost.total for cost in costs.values())
    assert all(0.0 < cost.floor.skipped < cost.floor.decoded for cost in costs.values())
    assert len(sampled_cost.lines(costs)) == 4


async def test_the_cost_of_an_answer_by_the_plugin_is_measured() -> None:
    costs = await plugin_cost.measure_both(rounds=2)
    assert all(0.0 < cost.queued < cost.queued + cost.parsed for cost in costs.values())
    message = plugin_cost.message_ms(messages=2)
    assert message > 0.0
    assert len(plugin_cost.lines(costs, message)) == 3


def test_the_interval_of_a_median() -> None:
    assert bench_proxy.median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0)
    assert bench_proxy.median_interval([float(n) for n in range(1, 8)]) == (1.0, 7.0)
    assert bench_proxy.median_interval([float(n) for n in range(1, 10)]) == (2.0, 8.0)
