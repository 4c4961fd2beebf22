"""One line on the background work: what runs, how far it is, and what the next decision waits for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def background(learner: Mapping[str, Any], adapter: Mapping[str, Any], next_decision: str) -> str:
    """Returns the line; "" if nothing runs and nothing is waited for.

    learner, adapter: the parts of the status with these names. next_decision: `calibration.next_decision`.
    """
    return "; ".join(filter(None, [*_running(learner, adapter), next_decision]))


def _running(learner: Mapping[str, Any], adapter: Mapping[str, Any]) -> Iterator[str]:
    engine, judge = adapter["engine"]["state"], adapter["judge"]
    if learner["state"] == "training":
        yield f"a profile is being learned ({learner['detail']})"
    if adapter["state"] == "building":
        yield f"an adapter is being made ({adapter['detail']})"
    elif (
        adapter["state"] == "collecting" and not adapter["builds"] and adapter["known_tokens"] < adapter["next_tokens"]
    ):
        yield f"texts for an adapter: {adapter['known_tokens']:,} of {adapter['next_tokens']:,} tokens"
    if engine in ("loading", "probing"):
        yield f"an adapter is being {'loaded' if engine == 'loading' else 'checked'} at the engines"
    if judge["state"] == "starting":
        yield "the copies that judge adapters are loading"
    elif judge["waiting"]:
        yield f"{judge['waiting']} answers wait for the copies that judge adapters"
