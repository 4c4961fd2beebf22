"""A restart goes on in the window of what serves, from the store: a useless profile is taken back at its end."""

from __future__ import annotations

import numpy as np
from tests.support.stores import put, stored

from hemostat.store.protocol import SetState
from hemostat_calibration.guard.decisions import Action, Admission
from hemostat_calibration.guard.guard import Guard

RESTART_EVERY, WINDOW = 900, 1000


def taken_back_after(url: str, *, kept: bool) -> int | None:
    """Held-out units until a profile without effect is taken back, in a life of 4,000; None: it serves on."""
    rng = np.random.default_rng(3)
    guard = Guard(0.05, 0.25)
    guard.begin_watch("serving", "rest", width=1.0, window=WINDOW)
    for n in range(4 * WINDOW):
        if n and n % RESTART_EVERY == 0:
            put(url, SetState("tests", guard.save().decode()))
            result = stored(url).states["tests"]
            assert len(result) < 100_000
            if kept:
                guard = Guard.load(result.encode(), 0.05, 0.25)
            else:
                guard = Guard(0.05, 0.25)
                guard.begin_watch("serving", "rest", width=1.0, window=WINDOW)
        unit, client, gain = n.to_bytes(16, "little"), bytes([n % 20]), float(np.clip(rng.normal(0, 0.1), -0.9, 0.9))
        if guard.admit("serving", "rest", unit, client) is Admission.ADMITTED:
            guard.update("serving", "rest", unit, client, gain, gain, 50)
            if guard.decide("serving", "rest").action is Action.ROLL_BACK:
                return n + 1
    return None


def test_a_useless_profile_is_taken_back_at_the_end_of_its_window(url: str) -> None:
    after = taken_back_after(url, kept=True)
    assert after is not None
    assert after <= WINDOW


def test_it_would_serve_for_ever_if_windows_began_anew(url: str) -> None:
    assert taken_back_after(url, kept=False) is None
