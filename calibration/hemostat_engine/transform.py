"""Applies profiles to logits in torch, inside the engine. The numpy implementation is
`hemostat_calibration.profiles.transform`: a family that is added there is added to `FAMILIES` here.

Logits z are [N, V], float32 in both of vLLM's runners. As in numpy, entries that are not finite (-inf is a mask)
are unchanged. Nothing here waits for the device.

A contextual row costs, in addition to its N anchors: 2 A r + 2 r V floating point operations (less where the tail is
narrow), one pass over `up` (`product`; 2 or 4 bytes each number, shared by the rows of the step), three over the row's
logits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hemostat_calibration.errors import InvalidProfileError
from hemostat_calibration.profiles import transform as numpy_transform
from hemostat_calibration.profiles.adapter import ADAPTER
from hemostat_calibration.profiles.contextual import CONTEXTUAL
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_engine.product import Matrix, Product, upload

CPU = torch.device("cpu")
CHUNK_ELEMENTS = 1 << 24
"""The number of logits that are processed at a time: every temporary is below 64 MiB, for any batch size."""


@dataclass(frozen=True, slots=True)
class Parameters:
    """A profile's parameters on one device. products: those that are only used as a matrix product."""

    tensors: Mapping[str, torch.Tensor]
    products: Mapping[str, Matrix]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]


@dataclass(frozen=True, slots=True)
class Shift:
    """The change of R rows.

    delta: Δz before the clamp, float32 [R, V] in nats, finite; undefined at masked ids. masked: bool [R], rows that get
    identity because a feature is not finite. limited: bool [R], rows that the KL limit reduced. Both are None for a
    family that has neither.
    """

    delta: torch.Tensor
    masked: torch.Tensor | None = None
    limited: torch.Tensor | None = None


def _contextual(parameters: Parameters, logits: torch.Tensor, rows: torch.Tensor | None) -> Shift:
    x = centred(logits, rows, parameters["anchors"])[:, : parameters["linear"].shape[0]]
    y = torch.addmm(parameters["offset"], x, parameters["linear"])
    twice_kl = ((y @ parameters["fisher"]) * y).sum(dim=-1, keepdim=True)
    most = 2.0 * parameters["kl_limit"]
    # One feature that is not finite makes all of the row's y so. With y² finite, `up y` is within float32.
    masked = ~torch.isfinite(twice_kl + (y * y).sum(dim=-1, keepdim=True))
    y = (y * torch.sqrt(most / torch.maximum(twice_kl, most))).masked_fill_(masked, 0.0)
    return Shift(parameters.products["up"](y), masked[:, 0], ((twice_kl > most) & ~masked)[:, 0])


@dataclass(frozen=True, slots=True)
class Family:
    """The implementation of one calibration family.

    shift: (parameters, logits [N, V], rows int64 [R] or None for all) -> the change of those rows. transposed:
    parameters that are stored transposed, so that the products read memory sequentially. products: as in `Parameters`.
    """

    shift: Callable[[Parameters, torch.Tensor, torch.Tensor | None], Shift]
    transposed: frozenset[str] = frozenset()
    products: frozenset[str] = frozenset()


def _nothing(parameters: Parameters, logits: torch.Tensor, rows: torch.Tensor | None) -> Shift:
    count = len(logits) if rows is None else len(rows)
    return Shift(torch.zeros((count, logits.shape[1]), dtype=torch.float32, device=logits.device))


FAMILIES: dict[str, Family] = {
    CONTEXTUAL: Family(_contextual, frozenset({"linear"}), frozenset({"up"})),
    ADAPTER: Family(_nothing),
}


class HeldProfile:
    """A profile's parameters as tensors on the device, float32 except ids and the products (see `product`).

    The constructor allocates all of them there, so that memory that is missing is missing then and not while a request
    is decoded. It raises what PyTorch raises.

    failed: it is not applied any more, since that failed. anchors: digest of its `anchor_count` anchor ids; None for a
    family without anchors. is_probe: it changes no row: its `up` is zero, or it is an adapter.
    """

    def __init__(self, profile: CalibrationProfile, device: torch.device = CPU) -> None:
        if profile.family not in FAMILIES:
            raise InvalidProfileError(
                f"profile {profile.version} is of the family {profile.family!r}, which this engine plugin "
                "cannot apply: upgrade hemostat in vLLM's environment"
            )
        self.version = profile.version
        self.failed = False
        self.clamp_nats = profile.clamp_nats
        anchors = numpy_transform.anchors(profile)
        self.anchors = None if anchors is None else numpy_transform.anchors_digest(anchors)
        self.anchor_count = 0 if anchors is None else len(anchors)
        parameters = applied_parameters(profile)
        self._family = FAMILIES[profile.family]
        self.is_probe = profile.changes_weights or ("up" in parameters and not parameters["up"].any())
        self.parameters = Parameters(
            {
                name: upload(_array(value, name in self._family.transposed), device)
                for name, value in parameters.items()
                if name not in self._family.products
            },
            {name: Product(parameters[name]).on(device) for name in self._family.products},
        )

    def shift(self, logits: torch.Tensor, rows: torch.Tensor | None) -> Shift:
        """Returns the change of `rows` (int64 [R], on the device of `logits`; None: all), before the clamp."""
        return self._family.shift(self.parameters, logits, rows)


def applied_parameters(profile: CalibrationProfile) -> Mapping[str, npt.NDArray[Any]]:
    """Returns the parameters that are applied to logits: an adapter has none."""
    return {} if profile.changes_weights else profile.parameters


def _array(value: npt.NDArray[Any], transposed: bool) -> npt.NDArray[Any]:
    dtype = np.int64 if value.dtype.kind == "i" else np.float32
    return np.array(value.T if transposed else value, dtype=dtype, order="C")


def centred(logits: torch.Tensor, rows: torch.Tensor | None, anchors: torch.Tensor) -> torch.Tensor:
    """Returns z − mean z at the ids `anchors` [N], float32 [R, N], of `rows`. A row with a non-finite value contains
    NaN.
    """
    z = logits.index_select(1, anchors) if rows is None else logits[rows[:, None], anchors]
    z = z.float()
    return z.sub_(z.mean(dim=-1, keepdim=True))


Commit = Callable[[], None]
Run = Callable[[Callable[[], Commit]], bool]
"""A function that carries out one part of a change: it calls what computes the part, and then what that returns, which
changes the logits in place. If it returns False, the parts that follow are left out.
"""


def at_once(compute: Callable[[], Commit]) -> bool:
    compute()()
    return True


def apply_to_rows(
    profile: HeldProfile,
    logits: torch.Tensor,
    rows: Sequence[int] | None,
    counts: torch.Tensor,
    *,
    on_device: Callable[[Sequence[int]], torch.Tensor],
    run: Run = at_once,
) -> None:
    """Adds Δz in place to `logits` [N, V] (float32, float16 or bfloat16) at `rows` (distinct; None: all).

    counts: int64 [2] on the device, to which the rows that were masked and limited are added (see `Shift`). on_device:
    copies indices there. Nothing that can fail is done outside of what `run` calls.
    """
    step = _step(logits)
    for at in range(0, logits.shape[0] if rows is None else len(rows), step):
        part = slice(at, at + step)
        target, index = (logits[part], None) if rows is None else (logits, functools.partial(on_device, rows[part]))
        if not run(functools.partial(_change, profile, target, index, counts)):
            return


def apply_where(
    profile: HeldProfile,
    logits: torch.Tensor,
    chosen: Callable[[], torch.Tensor],
    counts: torch.Tensor,
    *,
    run: Run = at_once,
) -> None:
    """Applies a profile to the rows where `chosen()` (bool [N], on the device) is true, without waiting for the
    device."""
    step = _step(logits)
    for at in range(0, logits.shape[0], step):
        if not run(functools.partial(_masked_change, profile, logits, slice(at, at + step), chosen, counts)):
            return


def _change(
    profile: HeldProfile, logits: torch.Tensor, index: Callable[[], torch.Tensor] | None, counts: torch.Tensor
) -> Commit:
    rows = None if index is None else index()
    shift = profile.shift(logits, rows)
    delta = shift.delta.clamp_(-profile.clamp_nats, profile.clamp_nats)
    counted = _counted(shift, None)
    if rows is not None and logits.dtype is not torch.float32:
        delta = delta.add_(logits.index_select(0, rows)).to(logits.dtype)

    def commit() -> None:
        if rows is None:
            logits.add_(delta)
        elif logits.dtype is torch.float32:
            logits.index_add_(0, rows, delta)
        else:
            logits.index_copy_(0, rows, delta)
        if counted is not None:
            counts.add_(counted)

    return commit


def _masked_change(
    profile: HeldProfile,
    logits: torch.Tensor,
    part: slice,
    chosen: Callable[[], torch.Tensor],
    counts: torch.Tensor,
) -> Commit:
    target, mask = logits[part], chosen()[part]
    shift = profile.shift(target, None)
    # Adding -0.0 changes no bits; adding 0.0 would turn -0.0 into 0.0.
    delta = shift.delta.clamp_(-profile.clamp_nats, profile.clamp_nats).masked_fill_(~mask[:, None], -0.0)
    counted = _counted(shift, mask)

    def commit() -> None:
        target.add_(delta)
        if counted is not None:
            counts.add_(counted)

    return commit


def _counted(shift: Shift, chosen: torch.Tensor | None) -> torch.Tensor | None:
    if shift.masked is None or shift.limited is None:
        return None
    flags = torch.stack((shift.masked, shift.limited))
    return (flags if chosen is None else flags & chosen).sum(dim=-1)


def evaluate(
    profiles: tuple[HeldProfile, ...], logits: torch.Tensor, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns for the unmodified `rows` of `logits`, by profile: log E_c[e^Δz] with c = softmax(z), float32 [P, R] in
    nats, and whether the clamp binds anywhere in the row, bool [P, R]."""
    pieces = [_evaluate(profiles, logits, part) for part in rows.split(_step(logits))]
    return torch.cat([values for values, _ in pieces], dim=1), torch.cat([clamped for _, clamped in pieces], dim=1)


def _evaluate(
    profiles: tuple[HeldProfile, ...], logits: torch.Tensor, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    z = logits.index_select(0, rows).float()
    weights = (z - z.amax(dim=-1, keepdim=True)).exp_()
    total = weights.sum(dim=-1)
    normalizers, clamped = [], []
    for profile in profiles:
        delta = profile.shift(logits, rows).delta
        clamped.append(delta.abs().amax(dim=-1) > profile.clamp_nats)
        changed = delta.clamp_(-profile.clamp_nats, profile.clamp_nats).exp_().mul_(weights).sum(dim=-1)
        normalizers.append(torch.log(changed / total))
    return torch.stack(normalizers), torch.stack(clamped)


def _step(logits: torch.Tensor) -> int:
    """Returns the number of rows that are handled at a time."""
    step: int = max(1, CHUNK_ELEMENTS // logits.shape[1])
    return step
