"""What runs inside vLLM: `--logits-processors hemostat_engine:LogitsProcessor`.

Importing this package is cheap and changes nothing: no entry point is registered, and torch and vLLM are imported only
when the class is asked for by that flag.

    xargs.py       what a request may ask for, and how a wrong one is refused
    transform.py   profile x logits in torch; `hemostat_calibration.profiles.transform` is its oracle
    library.py     the profiles that this rank holds
    agent.py       the background thread: reports, fetches, flushes
    taps.py        log E_c[e^Δz] of tapped rows, on its way out
    core.py        what both model runners share: binding, applying, tapping
    processor.py   the thin adapters for vLLM's two interfaces
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "LogitsProcessor":
        from hemostat_engine.processor import LogitsProcessor  # noqa: PLC0415 - torch and vLLM only on demand

        return LogitsProcessor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
