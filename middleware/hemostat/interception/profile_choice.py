"""Chooses the profile that a request gets, and the arm of the comparison that it belongs to."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from hemostat.interception.assignment import in_control_arm
from hemostat.interception.client_headers import ClientOptions
from hemostat.ipc.messages import Policy, rest_of
from hemostat.metrics.reasons import Unscored
from hemostat.openai.requests import Request, Uncalibrated
from hemostat_calibration.records import Arm


class ArmReason(StrEnum):
    """The reason why a request is in its arm, if it could be judged."""

    ASSIGNED = "assigned"
    """The request was assigned at random, to the control arm or to the treated one."""
    OFF = "off"
    """The setting `calibration.mode` is off."""
    NO_PROFILE = "no_profile"
    """No profile serves."""
    UNKNOWN = "unknown"
    """The engine that the request goes to has not acknowledged the profile."""
    OPTED_OUT = "opted_out"
    """The client sent `X-Hemostat-Calibration: off`."""
    PINNED = "pinned"
    """The client named a version in X-Hemostat-Calibration."""
    OTHER_MODEL = "other_model"
    """Profiles are for another of the served models."""
    OWN_ADAPTER = "own_adapter"
    """The profile is an adapter, and the request is for another model than the one that it is for: a client's own
    adapter is never replaced."""
    REFUSED = "refused"
    """vLLM refused the request as Hemostat had changed it, and it was sent again unchanged."""
    NOT_APPLIED = "not_applied"
    """The profile is an adapter, and the response says that another model answered."""


Reason = ArmReason | Uncalibrated | Unscored
"""The values of the label `reason` of calibration requests."""


class Choice(NamedTuple):
    """A request's arm, the reason for it, and the version of its profile (None: no profile)."""

    version: str | None
    arm: Arm
    reason: Reason
    compared: str | None = None
    """The version that the treated arm gets; None for a request in no arm."""


def served_kind(policy: Policy, kind: str) -> str:
    """Returns the name under which a kind is served and compared: its own, or the name of the rest if it is not
    followed by itself.
    """
    return kind if kind in policy.kinds else rest_of(kind)


def calibrates(policy: Policy, options: ClientOptions) -> bool:
    """Returns True if a profile is chosen for a request with these options (`choose_profile`), and the choice is
    counted. If the client does not say anything about profiles, this is never so with `calibration.mode: off`.
    """
    if options.calibration is not None:
        return True
    if policy.mode == "off":
        return False
    return policy.mode == "auto" and bool(policy.serving_by_kind)


def choose_profile(
    policy: Policy,
    request: Request,
    options: ClientOptions,
    unjudged: Unscored | None,
    kind: str,
    conversation: bytes,
    engine: str,
) -> Choice:
    """Returns the choice of the profile, by what the client sent and by the engine alone, so that both arms exclude the
    same requests.

    The engine is chosen before, by the conversation and the engines' load, and the arm by a hash that is independent of
    both. A request to an engine that does not hold the profile is in no arm, whichever the hash would give: with
    control requests at all engines and treated ones at those that hold the profile, the comparison of the arms would be
    one of engines, too.

    Treated is what is judged: a request that cannot be scored gets no profile, since harm is not measured there.
    Exceptions are a version that the client names and `calibration.treat_unjudged`.

    unjudged: why the request is never scored, None if it can be. kind: full name. conversation: digest, by which
    the arm is assigned. engine: that the request goes to, "" if it is not known.
    """
    if policy.mode == "off":
        return Choice(None, Arm.NONE, ArmReason.OFF)
    if request.uncalibrated is not None:
        return Choice(None, Arm.NONE, request.uncalibrated)
    if options.calibration == "off":
        return Choice(None, Arm.NONE, ArmReason.OPTED_OUT)
    if options.calibration is not None:
        return _if_available(policy, request, engine, options.calibration, Arm.NONE, ArmReason.PINNED)
    if unjudged is not None and not policy.treat_unjudged:
        return Choice(None, Arm.NONE, unjudged)
    if request.model and policy.calibrated_models is not None and request.model not in policy.calibrated_models:
        return Choice(None, Arm.NONE, ArmReason.OTHER_MODEL)
    version = policy.serving_by_kind.get(served_kind(policy, kind))
    if version is None:
        return Choice(None, Arm.NONE, ArmReason.NO_PROFILE)
    choice = _if_available(policy, request, engine, version, Arm.TREATED, ArmReason.ASSIGNED)
    if choice.version is not None and in_control_arm(conversation, policy.control_fraction, policy.salt):
        return Choice(None, Arm.CONTROL, ArmReason.ASSIGNED, choice.version)
    return choice


def is_available(policy: Policy, engine: str, version: str) -> bool:
    """Returns True if a request to this engine may ask for the version."""
    return version in policy.held_at(engine)


def _if_available(policy: Policy, request: Request, engine: str, version: str, arm: Arm, reason: ArmReason) -> Choice:
    """Returns the version if it is available, else no profile. Only versions that the engine has acknowledged are
    requested: for any other it would silently apply identity."""
    if version in policy.adapters and request.model not in (policy.base_models or ()):
        return Choice(None, Arm.NONE, ArmReason.OWN_ADAPTER)
    if not is_available(policy, engine, version):
        return Choice(None, Arm.NONE, ArmReason.UNKNOWN)
    return Choice(version, arm, reason, version if arm is Arm.TREATED else None)
