"""A `ScoringPipeline` that only hands records to its consumers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from hemostat.scoring.pipeline import ScoringPipeline

from .control import settings


def record_pipeline(consumers: Any, served: Any, **more: Any) -> ScoringPipeline:
    """Nothing is scored or measured anew by it. served: the served models. more: of its arguments."""
    nothing: Any = None
    given: dict[str, Any] = {
        "scores": False,
        "compressed_scorer": None,
        "breakers": nothing,
        "clock": lambda: 0.0,
        "draw": lambda: 0.0,
        "on_change": lambda: None,
    }
    monitor: Any = SimpleNamespace(served=served)
    return ScoringPipeline(settings(), monitor, nothing, nothing, consumers, **given | more)
