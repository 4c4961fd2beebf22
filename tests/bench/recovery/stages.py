"""Results that are kept under build/, so that a benchmark of hours can be stopped and resumed."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class Stages:
    """Results that are kept, by name and by what they were made from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def file(self, stage: str, made_from: Any) -> Path:
        """Where the result of a stage is kept. made_from: JSON."""
        return self.folder / cache_name(stage, made_from)

    def kept(self, stage: str, made_from: Any, make: Callable[[], T]) -> T:
        """The result of `make`, or of an earlier call with the same `made_from` (JSON)."""
        file = self.file(stage, made_from)
        if file.exists():
            with file.open("rb") as stream:
                result: T = pickle.load(stream)
            return result
        made = make()
        partial = file.with_suffix(".part")
        with partial.open("wb") as stream:
            pickle.dump(made, stream)
        partial.rename(file)
        return made


def cache_name(stage: str, made_from: Any) -> str:
    """File name of a stage that depends on `made_from` (JSON)."""
    digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:12]
    return f"{stage}-{digest}.pickle"
