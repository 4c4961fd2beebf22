"""Simulated worlds in which the guard, the alarm, the intervals and the tests of outcomes have to keep what the docs
say.

Every module here has

    NAME    what `bench_guard.py --only` and the table call it
    TAKES   how long 1,000 lives take, in words
    rows    (lives, seed) -> its rows of the table; a life is one simulated run of what is tested

and ONLY_BY_NAME where it needs more than a processor. It calls the code that decides in production, never a copy of it.
`test_worlds.py` runs every module with 10 lives (`TEST_LIVES`, where a module has one: another number, 0 for none), the
longest in `make test-slow`.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import pkgutil
from pathlib import Path
from types import ModuleType

from tests.bench.rows import Row as Row

ROOT = Path(__file__).resolve().parents[3]
CODE = ("calibration/hemostat_calibration", "middleware/hemostat", "tests/bench/guard", "tests/support")


def digest() -> str:
    """Of the code that the rows are of."""
    hashed = hashlib.blake2b(digest_size=8)
    for path in sorted(path for folder in CODE for path in (ROOT / folder).rglob("*.py")):
        hashed.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return hashed.hexdigest()


def count_row(case: str, count: int, lives: int, share: float) -> Row:
    """A row for what may happen in at most `share` of all lives; see `most`."""
    limit = most(lives, share)
    return Row(case, f"{count} of {lives}", f"<= {limit} of {lives}", count <= limit)


def most(lives: int, share: float) -> int:
    """The largest number of lives that is compatible with a probability of `share`: the 97.5 % quantile of the binomial
    distribution. 64 of 1,000 at 5 %, 17 at 1 %."""
    total, probability = 0.0, (1.0 - share) ** lives
    for count in range(lives + 1):
        total += probability
        if total >= 0.975:
            return count
        probability *= (lives - count) / (count + 1) * share / (1.0 - share)
    return lives


def median(values: list[float]) -> float:
    """inf where half of the values or more are inf."""
    ordered = sorted(values)
    return ordered[(len(ordered) - 1) // 2] if ordered else math.nan


def modules() -> list[ModuleType]:
    """All modules with rows, by name."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    loaded = (importlib.import_module(f"{__name__}.{name}") for name in names if not name.startswith("test_"))
    return [module for module in loaded if hasattr(module, "rows")]
