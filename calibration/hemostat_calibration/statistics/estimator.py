"""The contract of streaming estimators: `update`, `merge`, `get`, as in river (`river.stats`).

`tests/core/test_conformance.py` checks it for every class that follows it: equal to a batch computation of all
observations, merged in any order, inputs unchanged, constant memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Estimator(Protocol):
    """A frozen value in constant memory.

    update: one observation (its parts are the arguments) -> a new estimator that has also seen it.
    merge: another estimator of the same kind -> one that has seen what both have; associative and commutative up to
        rounding. InvalidArgumentError where the two differ in their settings.
    get: -> the estimate from the observations so far; arguments may choose a level or a range.
    """

    @property
    def update(self) -> Callable[..., Any]: ...

    @property
    def merge(self) -> Callable[[Any], Any]: ...

    @property
    def get(self) -> Callable[..., Any]: ...
