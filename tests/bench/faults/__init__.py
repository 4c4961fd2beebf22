"""Attacks and faults that Hemostat has to withstand, on real processes.

Every module here has

    NAME    what `bench_faults.py --only` and the table call it
    TAKES   how long it takes on two cores, in words
    rows    () -> its rows of the table
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from types import ModuleType


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    case: the attack or the fault. before: what happened before the defect was corrected, in words; "" where there was
    no defect. measured: a number, or several in words. limit: what it has to be, in words.
    """

    case: str
    before: str
    measured: float | str
    limit: str
    holds: bool


def modules() -> list[ModuleType]:
    """All modules with rows, by name."""
    names = sorted(iter_module.name for iter_module in pkgutil.iter_modules(__path__))
    loaded = (importlib.import_module(f"{__name__}.{name}") for name in names if not name.startswith("test_"))
    return [module for module in loaded if hasattr(module, "rows")]
