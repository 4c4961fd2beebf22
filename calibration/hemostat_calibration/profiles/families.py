"""The table of calibration families: which parameters a profile of a family holds, what they add to the logits, and by
which rules it lives.

A family is a module that registers its `FamilySpec` when it is imported; the package imports the product's families.
Profiles, files, the numpy transform, tests and decisions follow from the specification, and know no family by name.
What the engine computes in torch is in `hemostat_engine.transform`. Whoever learns a family proposes profiles by
`hemostat.profiles.proposals`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hemostat_calibration.arrays import Floats, Indices

Parameters = Mapping[str, npt.NDArray[Any]]
VOCABULARY = "V"
"""The dimension that must equal the profile's `vocab_size`."""
ANCHORS = "anchors"
"""The parameter that holds the ids whose logits a family reads, int32 [N]."""

DTYPES: Mapping[str, npt.DTypeLike] = {"F32": np.float32, "F16": np.float16, "I32": np.int32, "I8": np.int8}
"""The element types of parameters, by their safetensors names."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """An array of a family. shape: names of dimensions, one name is one size in all parameters; `VOCABULARY` is V."""

    shape: tuple[str, ...]
    dtype: str = "F32"


@dataclass(frozen=True, slots=True)
class FamilySpec:
    """One family.

    parameters: by name; those that every profile of the family has.
    named: (names of a profile's parameters) -> all parameters that a profile with these names must have; None for a
        family whose names are fixed.
    shift: (parameters, relative float64 [..., N], ids int [..., N] or None, code float64 [..., r] or None) -> unclamped
        Δz, float64 [..., N] nats. `relative` is z − max z, finite; `ids` are the columns, None when they are the whole
        vocabulary in order; `code` is the result of the function of that name.
    check: (parameters) -> what is wrong with the values, or "" if nothing is.
    code: (parameters, anchored float64 [..., N]) -> float64 [..., r]: the code of a row, from its finite logits at the
        ids of the parameter `ANCHORS`; a constant added to them changes nothing. None for a family without anchors.
    basis: (parameters) -> the matrix [V, r] whose product with a row's code is its Δz before the clamp; None for a
        family without anchors.
    changes_weights: it changes the model's weights and adds nothing to the logits, so that its gain does not follow
        from a record of the compressed model. It is judged by exact distances.
    queue_priority: candidates with a lower number are tested first.
    kl_limit: (parameters) -> the largest KL from identity that it enforces, nats; None if it enforces none.
    """

    parameters: Mapping[str, Parameter]
    shift: Callable[[Parameters, Floats, Indices | None, Floats | None], Floats]
    check: Callable[[Parameters], str]
    code: Callable[[Parameters, Floats], Floats] | None = None
    named: Callable[[Iterable[str]], Mapping[str, Parameter]] | None = None
    basis: Callable[[Parameters], npt.NDArray[np.floating]] | None = None
    changes_weights: bool = False
    queue_priority: int = 0
    kl_limit: Callable[[Parameters], float | None] = lambda _: None

    def parameters_of(self, names: Iterable[str]) -> Mapping[str, Parameter]:
        """Returns the parameters that a profile must have some of whose parameters are `names`."""
        return self.parameters if self.named is None else self.named(names)


FAMILIES: dict[str, FamilySpec] = {}
"""The families by name, which a profile names in its file."""


def register(name: str, spec: FamilySpec) -> None:
    """Adds a family to the table; a profile of it can be made and read from then on.

    >>> register("contextual", FAMILIES["contextual"])
    >>> "contextual" in FAMILIES
    True
    """
    FAMILIES[name] = spec
