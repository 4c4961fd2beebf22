"""The number of adapters that fit at the engines, from the reports of their ranks. Pure.

Invariants:
- One slot is always left free: with vLLM's own operations of the CPU, rows without an adapter read the last one.
- Adapters of clients count: every one that is listed may be loaded at any time, by a request.
- A server all of whose slots were ever in use, whose operations are not known to leave other rows alone, is not used
  until it restarts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hemostat.engines.messages import RankReport

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM takes for --max-lora-rank."""


@dataclass(frozen=True, slots=True)
class Room:
    """capacity: adapters of Hemostat's that may be loaded at a time; None: not known. problem: why none may be, in one
    line; "" where some may. max_rank: of the adapters; None: not known. limit: the capacity while clients load none, as
    it is until the engine is restarted; None: not known."""

    capacity: int | None
    problem: str = ""
    max_rank: int | None = None
    limit: int | None = None


def rank_setting(rank: int) -> int:
    """The smallest --max-lora-rank that holds adapters of this rank.

    >>> rank_setting(1), rank_setting(20), rank_setting(600)
    (1, 32, 512)
    """
    return next((setting for setting in RANKS if setting >= rank), RANKS[-1])


def room(reports: Sequence[RankReport], others: int, slots: int | None = None) -> Room:
    """reports: the last one of every live rank. others: adapters of clients that the server lists. slots: --max-loras
    where no rank reports it, if known."""
    states = [report.lora for report in reports if report.lora is not None]
    if not states:
        if slots is None:
            return Room(None)
        return Room(max(1, slots - 1 - others), limit=max(1, slots - 1))
    if len(states) < len(reports):
        silent = len({report.boot_id for report in reports if report.lora is None})
        return Room(
            0,
            f"{silent} of {len(boots(reports))} engines report no adapters: start all of them with --enable-lora and "
            "HEMOSTAT_ADAPTERS=1",
        )
    max_rank = min(state.max_rank for state in states)
    fewest = min(state.slots for state in states)
    limit = fewest - 1
    capacity = limit - others
    if any(state.was_full and not state.grouped for state in states):
        return Room(
            0,
            f"all {fewest} slots for adapters were in use, so rows without an adapter may get one: restart vLLM with "
            f"--max-loras {fewest + 1}",
            max_rank,
            limit,
        )
    if capacity < 1:
        own = f" and {others} of clients" if others else ""
        problem = f"--max-loras {fewest} is too low for one adapter{own}: set --max-loras {others + 2}"
        return Room(0, problem, max_rank, limit)
    return Room(capacity, "", max_rank, limit)


def held_everywhere(reports: Sequence[RankReport], versions: frozenset[str]) -> frozenset[str]:
    """Returns the versions that are held by every rank which reports its adapters; all of them if no rank does."""
    for report in reports:
        if report.lora is not None:
            versions &= frozenset(report.adapters)
    return versions


def boots(reports: Sequence[RankReport]) -> frozenset[str]:
    """The engines that report."""
    return frozenset(report.boot_id for report in reports)


def complete(reports: Sequence[RankReport]) -> bool:
    """Every rank of every engine reports."""
    sizes = {report.boot_id: report.world_size for report in reports}
    return all(sum(report.boot_id == boot for report in reports) == size for boot, size in sizes.items())
