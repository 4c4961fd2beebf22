"""Turns of heavy jobs: what child processes compute in the background, and what may wait.

A job of this sort takes a core for minutes: an adapter that is made or distilled, a profile that is fitted. Half of the
cores are left to what serves clients and to what scores their answers, which takes no turns: the reference and the
copies that judge adapters. By their niceness these come before the heavy jobs (10 and 12, compared with 13 and 15), and
the engine comes before all of them. A job that is killed gives its turn back, and takes one when it is started again.
The noise floor and canaries take no turns either: they compute nothing here, but ask the reference and the engines, and
are limited there by the token budget and by the share of the tokens that they may ask for.
"""

from __future__ import annotations

import os
from collections import Counter

CPU = "cpu"
"""The device whose places are cores."""


def usable_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def half_of(cores: int) -> int:
    """Returns the number of cores that background work may take of so many: half of them, at least one."""
    return max(1, cores // 2)


class Turns:
    """Owns which jobs have their turn. cores: of this machine; another device has one place.

    >>> turns = Turns(cores=2)
    >>> turns.take("adapter"), turns.take("adapter"), turns.take("profile"), turns.take("other", "cuda:0")
    (True, True, False, True)
    >>> turns.give_back("adapter")
    >>> turns.take("profile")
    True
    """

    def __init__(self, cores: int | None = None) -> None:
        """cores: None means those that this process may use."""
        self._places = half_of(usable_cores() if cores is None else cores)
        self._taken: dict[str, str] = {}
        """The device of each job that has its turn."""

    def take(self, job: str, device: str = CPU) -> bool:
        """Returns True if the job has its turn: it had it already, or a place on its device is free. Else it has to ask
        again."""
        if job not in self._taken:
            if Counter(self._taken.values())[device] >= (self._places if device == CPU else 1):
                return False
            self._taken[job] = device
        return True

    def give_back(self, job: str) -> None:
        """Ends the turn of a job; nothing happens if it has none."""
        self._taken.pop(job, None)
