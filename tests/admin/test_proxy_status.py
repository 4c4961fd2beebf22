"""What the relays count, told to people."""

from __future__ import annotations

import json
import math
from bisect import bisect_left

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from hemostat.admin.proxy_status import RecentRequests, endings_by_arm, proxy_status, quantile
from hemostat.ipc.messages import OVERHEAD_BUCKETS, Stats

NOTHING = Stats(counters={}, overhead_buckets=[0] * (len(OVERHEAD_BUCKETS) + 1), overhead_sum=0.0, ready=True)
RECENT = RecentRequests(60.0, 0, 0)


def of(**counters: dict[tuple[str, ...], float]) -> Stats:
    return Stats(counters=counters, overhead_buckets=NOTHING.overhead_buckets, overhead_sum=0.0, ready=True)


@given(st.lists(st.floats(0.0, 0.5), min_size=1, max_size=60), st.sampled_from([0.5, 0.9, 0.99, 1.0]))
def test_a_quantile_lies_in_the_bucket_that_is_reported(seconds: list[float], q: float) -> None:
    buckets = [0] * (len(OVERHEAD_BUCKETS) + 1)
    for second in seconds:
        buckets[bisect_left(OVERHEAD_BUCKETS, second)] += 1
    told = quantile(buckets, q)
    true = sorted(seconds)[max(math.ceil(q * len(seconds)), 1) - 1]
    edges = [0.0, *OVERHEAD_BUCKETS, math.inf]
    assert told in edges
    assert edges[edges.index(told) - 1] <= true <= told


def test_the_proxys_health() -> None:
    requests = {
        ("/v1/chat/completions", "ok"): 90.0,
        ("/v1/completions", "upstream_failed"): 2.0,
        ("/v1/models", "server_error"): 3.0,
        ("other", "client_gone"): 5.0,
    }
    told = proxy_status(of(hemostat_requests_total=requests), RECENT)
    assert (told.requests, told.generations, told.failed, told.failed_ratio) == (100, 92, 5, 0.05)
    assert told.by_outcome == {"ok": 90, "upstream_failed": 2, "server_error": 3, "client_gone": 5}
    assert told.by_route["/v1/models"] == 3
    assert told.overhead_seconds == {"p50": None, "p99": None}


def test_what_is_slower_than_every_bucket_is_json_still() -> None:
    buckets = [0] * len(OVERHEAD_BUCKETS) + [4]
    told = proxy_status(Stats(counters={}, overhead_buckets=buckets, overhead_sum=9.0, ready=True), RECENT)
    assert told.overhead_seconds["p50"] == OVERHEAD_BUCKETS[-1]
    json.dumps(msgspec.to_builtins(told), allow_nan=False)


def test_nothing_yet() -> None:
    assert endings_by_arm(NOTHING) == {}
    told = proxy_status(NOTHING, RECENT)
    assert (told.requests, told.failed_ratio, told.by_outcome) == (0, None, {})


def test_how_answers_end_by_arm() -> None:
    told = endings_by_arm(
        of(
            hemostat_responses_finished_total={
                ("treated", "stop"): 7.0,
                ("treated", "length"): 1.0,
                ("control", "stop"): 3.0,
            },
            hemostat_output_tokens_total={("treated",): 80.0},
            hemostat_repetition_loops_total={("control",): 2.0},
            hemostat_structured_outputs_total={("treated", "json", "valid"): 4.0, ("treated", "json", "cut"): 1.0},
        )
    )
    assert msgspec.to_builtins(told) == {
        "treated": {
            "finished": {"stop": 7, "length": 1},
            "output_tokens": 80,
            "loops": 0,
            "structured": {"json": {"valid": 4, "cut": 1}},
        },
        "control": {"finished": {"stop": 3}, "output_tokens": 0, "loops": 2, "structured": {}},
    }
