"""/metrics as a Prometheus reads it."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from prometheus_client import Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from tests.support.control import connect_relay, control, profile, relay_stats, scored
from tests.support.waiting import until

from hemostat.control.composition import Control
from hemostat.engines.messages import RankReport
from hemostat.ipc.messages import OVERHEAD_BUCKETS
from hemostat.metrics.reasons import Unscored
from hemostat.profiles.decisions import DECISIONS

CONTRACT = {
    "hemostat_requests_total": {"route", "outcome"},
    "hemostat_proxy_overhead_seconds": set(),
    "hemostat_shadow_requests_total": {"outcome", "reason"},
    "hemostat_shadow_queue_depth": set(),
    "hemostat_shadow_lag_seconds": set(),
    "hemostat_reference_tokens_total": set(),
    "hemostat_scored_tokens_total": {"arm", "decoding"},
    "hemostat_token_kl_nats": {"direction", "stage", "arm"},
    "hemostat_token_total_variation": {"stage", "arm"},
    "hemostat_top1_agreement_tokens_total": {"stage", "arm", "decoding"},
    "hemostat_top1_known_tokens_total": {"stage", "arm", "decoding"},
    "hemostat_covered_mass_ratio": {"model"},
    "hemostat_recovered_distribution_ratio": set(),
    "hemostat_recovered_divergence_ratio": {"kind"},
    "hemostat_profile_decisions_total": {"decision", "reason"},
}
"""The names and labels that dashboards rely on."""


def scrape(plane: Control) -> dict[str, Metric]:
    text = generate_latest(plane.registry).decode()
    result = list(text_string_to_metric_families(text))
    assert len({family.name for family in result}) == len(result), "no family twice"
    return {family.name: family for family in result}


def samples(families: dict[str, Metric]) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    flat = [s for family in families.values() for s in family.samples]
    by_series = {(s.name, tuple(sorted(s.labels.items()))): s.value for s in flat}
    assert len(by_series) == len(flat), "no series twice"
    return by_series


async def test_names_and_labels_are_those_of_the_contract(tmp_path: Path) -> None:
    async with control(tmp_path) as plane:
        writer = await connect_relay(plane, tmp_path, 1, relay_stats())
        plane.profile_manager.set_model_pair("m", 30)
        version = plane.profile_manager.operator.import_profile(profile())
        plane.profile_manager.operator.promote(version)
        plane.pipeline.update(*scored(arm="treated"))
        families = scrape(plane)
        series = {name: set(dict(labels)) - {"le"} for name, labels in samples(families)}
        for name, labels in CONTRACT.items():
            if name == "hemostat_recovered_divergence_ratio":
                continue  # only while something is known exactly: test_measure.py
            family = families[name.removesuffix("_total")]
            assert family.documentation, name
            shown = f"{name}_bucket" if family.type == "histogram" else name
            assert series[shown] == labels, name
            assert (family.type == "counter") == name.endswith("_total"), name
        for family in families.values():
            assert family.documentation, family.name
            assert family.name.startswith("hemostat_")
            assert family.type in {"counter", "gauge", "histogram"}
        assert samples(families)["hemostat_profile_kind_info", (("kind", "rest"), ("version", version))] == 1
        writer.close()


async def test_every_family_is_there_before_anything_has_happened(tmp_path: Path) -> None:
    async with control(tmp_path) as plane:
        families = scrape(plane)
        for name in CONTRACT:
            if not name.endswith(("_divergence_ratio", "_covered_mass_ratio", "_recovered_distribution_ratio")):
                assert name.removesuffix("_total") in families
        result = samples(families)
        assert not any(name.startswith("hemostat_proxy_overhead") for name, _ in result), "no relay, no figure"
        assert result["hemostat_profile_kind_info", (("kind", "rest"), ("version", "identity"))] == 1


async def test_what_rates_are_taken_of_is_there_before_it_is_counted_but_not_before_its_relay(tmp_path: Path) -> None:
    failed = ("hemostat_requests_total", (("outcome", "upstream_failed"), ("route", "/v1/completions")))
    loops = ("hemostat_repetition_loops_total", (("arm", "treated"),))
    dropped = ("hemostat_shadow_requests_total", (("outcome", "dropped"), ("reason", "queue_full")))
    async with control(tmp_path) as plane:
        assert not {failed, loops, dropped} & samples(scrape(plane)).keys(), "a relay may know of many"
        writer = await connect_relay(plane, tmp_path, 1, relay_stats())
        result = samples(scrape(plane))
        assert [result[key] for key in (failed, loops, dropped)] == [0, 0, 0]
        writer.close()


async def test_relays_and_control_count_into_the_same_family_and_restarts_take_nothing_away(tmp_path: Path) -> None:
    async with control(tmp_path) as plane:
        first, second = (
            await connect_relay(plane, tmp_path, 1, relay_stats(3)),
            await connect_relay(plane, tmp_path, 2, relay_stats(4)),
        )
        plane.pipeline.endings.unscored(Unscored.QUEUE_FULL, scored()[1])
        before = samples(scrape(plane))
        ok = ("hemostat_requests_total", (("outcome", "ok"), ("route", "/v1/completions")))
        assert before[ok] == 7
        assert before["hemostat_shadow_requests_total", (("outcome", "dropped"), ("reason", "queue_full"))] == 1
        assert before["hemostat_shadow_requests_total", (("outcome", "skipped"), ("reason", "too_long"))] == 4
        assert before["hemostat_proxy_overhead_seconds_count", ()] == 7 * (len(OVERHEAD_BUCKETS) + 1)
        assert before["hemostat_proxy_overhead_seconds_sum", ()] == pytest.approx(0.007)
        first.close()
        await until(lambda: plane.link.relays == 1)
        assert samples(scrape(plane))[ok] == 7, "a relay that died counts on"
        third = await connect_relay(plane, tmp_path, 3, relay_stats(1))
        assert samples(scrape(plane))[ok] == 8
        second.close()
        await until(lambda: plane.link.relays == 1)
        again = await connect_relay(plane, tmp_path, 2, relay_stats(5))
        assert samples(scrape(plane))[ok] == 9, "a link that came back is the same relay"
        after = samples(scrape(plane))
        for key, value in before.items():
            if key[0].endswith(("_total", "_count", "_bucket")):
                assert after[key] >= value, key
        third.close()
        again.close()


async def test_decisions_and_clamps_that_bind_are_counted(tmp_path: Path) -> None:
    async with control(tmp_path) as plane:
        plane.profile_manager.set_model_pair("m", 30)
        version = plane.profile_manager.operator.import_profile(profile())
        plane.profile_manager.operator.pin(version)
        plane.profile_manager.operator.roll_back("asked for")
        counted = {"rows_clamped": 3, "rows_kl_clamped": 2, "rows_masked": 5, "requests_declined": 1}
        for boot in ("a", "b"):
            plane.engines.reports.update(RankReport(boot, 0, 1, [], 30, counted, "v1", "0"), time.monotonic())
        result = samples(scrape(plane))
        assert result["hemostat_engine_events_total", (("reason", "profiles_failed"),)] == 0, (
            "the alert sees it increase"
        )

        def decided(decision: str, reason: str) -> float:
            return result["hemostat_profile_decisions_total", (("decision", decision), ("reason", reason))]

        made = [("import", "operator"), ("pin", "operator"), ("roll_back", "operator")]
        assert {pair: decided(*pair) for pair in DECISIONS} == {pair: float(pair in made) for pair in DECISIONS}
        for name, count in counted.items():
            assert result["hemostat_engine_events_total", (("reason", name),)] == 2 * count


async def test_histograms_are_cumulative_and_agree_with_the_counters(tmp_path: Path) -> None:
    async with control(tmp_path) as plane:
        for n in range(4):
            plane.pipeline.update(*scored(str(n), prompt=n, tokens=3 + n))
        result = samples(scrape(plane))
        decoded = [(("arm", "none"), ("decoding", decoding)) for decoding in ("greedy", "sampled")]
        tokens = sum(result["hemostat_scored_tokens_total", labels] for labels in decoded)
        assert tokens == 3 + 4 + 5 + 6
        labels = (("arm", "none"), ("direction", "reference_compressed"), ("stage", "raw"))
        buckets = {
            float(dict(of)["le"]): value
            for (name, of), value in result.items()
            if name == "hemostat_token_kl_nats_bucket" and {*labels} <= {*of}
        }
        values = [buckets[edge] for edge in sorted(buckets)]
        assert values == sorted(values)
        assert values[-1] == tokens == result["hemostat_token_kl_nats_count", labels]
        mass = result["hemostat_covered_mass_ratio", (("model", "compressed"),)]
        assert mass == pytest.approx(0.85, abs=1e-6)


async def test_scrapes_between_any_two_changes(tmp_path: Path) -> None:
    """A scrape sees whole states: it runs in the loop, and what changes state does not await in between."""
    async with control(tmp_path) as plane:

        async def change() -> None:
            for n in range(40):
                plane.pipeline.update(*scored(str(n), prompt=n, arm=("none", "treated", "control")[n % 3]))
                plane.pipeline.endings.unscored(Unscored.INVALID_RECORD, scored()[1], f"reason{n % 5}")
                await asyncio.sleep(0)

        async def look() -> None:
            before: dict[object, float] = {}
            while not changing.done():
                now = samples(scrape(plane))
                assert all(now[key] >= value for key, value in before.items() if str(key[0]).endswith("_total"))  # type: ignore[index,call-overload]
                before = dict(now)
                await asyncio.sleep(0)

        changing = asyncio.create_task(change())
        await asyncio.gather(changing, look())
