"""Coverage, parts of outputs and thinking, through a real `Control`."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
from tests.support.captures import INFO
from tests.support.control import connect_relay, control, relay_stats, scored, settings, status_json, told
from tests.support.samples import values
from tests.support.served_models import pair, served_models
from tests.support.waiting import until

from hemostat.engines.messages import RankReport
from hemostat.ipc.messages import SampledCount, SampledCounts, encode
from hemostat.metrics import names
from hemostat_calibration.reasoning import Markers, Thinking


async def test_what_relays_and_the_scorer_count_is_one_figure(tmp_path: Path) -> None:
    async with control(tmp_path) as plane:
        writer = await connect_relay(plane, tmp_path, 1, relay_stats())
        writer.write(
            encode(SampledCounts([SampledCount("chat structured greedy", "skipped", "invalid", 1.0, 0.0, 40)]))
        )
        await until(lambda: plane.pipeline.coverage.report()["requests"] == 1.0)
        record, capture = scored(tokens=60, kind="chat text greedy")
        plane.pipeline.update(record, capture)
        plane.pipeline.endings.scored(capture)
        result = status_json(plane)["coverage"]
        assert result["scored_share"] == {"tokens": 0.6, "requests": 0.5}
        samples = values(plane.pipeline.samples())
        assert samples[names.SAMPLED_TOKENS, "scored", ""] == 60
        assert samples[names.SAMPLED_TOKENS, "skipped", "invalid"] == 40
        assert samples[names.KIND_SAMPLED_TOKENS, "chat structured greedy", "skipped"] == 40
        writer.close()


async def test_a_part_of_an_output_is_in_no_figure_but_those_by_place(tmp_path: Path) -> None:
    """Not by kind, not in the alarm, and nothing is learned from or judged by it: it is a biased sample."""
    async with control(tmp_path, settings(records={"path": str(tmp_path / "records")})) as plane:
        plane.monitor.served = served_models(pair("m", info=INFO))
        before = status_json(plane)
        record, capture = scored(tokens=8, kind="chat text greedy")
        plane.pipeline.update(replace(record, position=100, context_tokens=105), capture)
        after = status_json(plane)
        assert [place["place"] for place in after["places"]["position"]] == ["64-255"]
        changed = {key for key, value in after.items() if before[key] != value} - {"at", "shadow", "queue"}
        assert changed == {"places", "records_written", "calibration"}
        # The kind is followed from now on, with nothing known of it.
        [kind] = [kind for kind in after["calibration"]["kinds"] if kind["kind"] == "chat text greedy"]
        assert not kind["candidates"]
        plane.pipeline.update(*scored("whole", prompt=1, tokens=8, kind="chat text greedy"))
        assert status_json(plane)["raw"]["requests"] == 1


@pytest.mark.parametrize("sets", [True, False])
@pytest.mark.parametrize("full", [True, False])
async def test_requests_under_a_grammar_are_scored_where_engines_say_what_is_allowed(
    tmp_path: Path, sets: bool, full: bool
) -> None:
    """And the reference knows more than a list of ids."""
    async with control(tmp_path) as plane:
        plane.monitor.served = served_models(pair("m", info=replace(INFO, full_vocabulary=full)))
        assert not told(plane).grammars, "no plugin reports"
        plane.engines.reports.update(RankReport("boot", 0, 1, [], 512, {}, "v1", "0.32.0", sets=sets), time.monotonic())
        result = told(plane)
        assert (result.tap, result.grammars) == (True, sets and full)


async def test_thinking_is_counted_where_the_markers_of_the_model_are_known(tmp_path: Path) -> None:
    async with control(tmp_path) as plane:
        record, capture = scored(tokens=8, finish_reason="length")
        record = replace(record, thinking=Thinking(0, 8, ended=False))
        plane.monitor.served = served_models(pair("m", info=INFO))
        plane.pipeline.update(record, capture)
        assert status_json(plane)["thinking"]["arms"] == {}
        plane.monitor.served = served_models(replace(pair("m", info=INFO), markers=Markers((), ((1,),))))
        plane.pipeline.update(replace(record, conversation=b"another"), capture)
        [arm] = status_json(plane)["thinking"]["arms"].values()
        assert (arm["requests"], arm["endings"]["cut"], arm["never_ended"]["estimate"]) == (1, 1, 1.0)
