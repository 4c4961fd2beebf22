"""Which profile a request gets, and which arm of the comparison it belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from hemostat.ipc.messages import Policy
from hemostat.openai.requests import Request, Uncalibrated
from hemostat.shadow.assignment import in_control_arm
from hemostat.shadow.client_headers import ClientOptions
from hemostat_calibration.records import Arm


class ArmReason(StrEnum):
    """Why a request is in its arm: values of the label `reason` of calibration requests, with those of Uncalibrated."""

    ASSIGNED = "assigned"
    """Assigned at random, to the control arm or to the treated one."""
    OFF = "off"
    """`calibration.mode` is off."""
    NO_PROFILE = "no_profile"
    """No profile serves."""
    UNKNOWN = "unknown"
    """The engine has not acknowledged the profile."""
    OPTED_OUT = "opted_out"
    """The client sent `X-Hemostat-Calibration: off`."""
    PINNED = "pinned"
    """The client named a version in X-Hemostat-Calibration."""
    FORCED = "forced"
    """`calibration.force` is set."""
    OWN_PARAMETERS = "own_parameters"
    """`calibration.apply: request`, and the client set temperature or logit_bias."""
    REFUSED = "refused"
    """vLLM refused the request with the profile, and it was sent again unchanged."""
    BAD_JSON = "bad_json"
    """The body is not a JSON object."""
    BODY_TOO_LARGE = "body_too_large"
    """The body is too large to be read."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A request's arm, the reason for it, and the version of its profile (None: no profile)."""

    version: str | None
    arm: Arm
    reason: ArmReason | Uncalibrated


def calibrates(policy: Policy) -> bool:
    """Whether a request without X-Hemostat headers can get a profile; never with `calibration.mode: off`."""
    if policy.mode == "off":
        return False
    return policy.forced is not None or (policy.mode == "auto" and (policy.serving is not None or bool(policy.scoped)))


def choose_profile(policy: Policy, request: Request, options: ClientOptions, route: str, request_id: str) -> Choice:
    """Choose by what the client sent alone, so that the control and the treated arm exclude the same requests."""
    if policy.mode == "off":
        return Choice(None, Arm.NONE, ArmReason.OFF)
    if request.uncalibrated is not None:
        return Choice(None, Arm.NONE, request.uncalibrated)
    if policy.apply == "request" and (request.body.has("temperature") or request.body.has("logit_bias")):
        return Choice(None, Arm.NONE, ArmReason.OWN_PARAMETERS)
    if policy.forced is not None:
        return _if_available(policy, policy.forced, Arm.NONE, ArmReason.FORCED)
    if options.calibration == "off":
        return Choice(None, Arm.NONE, ArmReason.OPTED_OUT)
    if options.calibration is not None:
        return _if_available(policy, options.calibration, Arm.NONE, ArmReason.PINNED)
    version = _serving_version(policy, {"label": options.label, "route": route, "model": request.model})
    if version is None:
        return Choice(None, Arm.NONE, ArmReason.NO_PROFILE)
    choice = _if_available(policy, version, Arm.TREATED, ArmReason.ASSIGNED)
    key = request.conversation_key or request_id.encode("utf-8", "surrogateescape")
    if choice.version is not None and in_control_arm(key, policy.control_fraction, policy.shadow_seed):
        return Choice(None, Arm.CONTROL, ArmReason.ASSIGNED)
    return choice


def _serving_version(policy: Policy, scopes: dict[str, str]) -> str | None:
    """The version of the request's scope where the engine has it, else that of the pooled profile."""
    own = policy.scoped.get(scopes.get(policy.scope, ""))
    return own if own in policy.acknowledged else policy.serving


def _if_available(policy: Policy, version: str, arm: Arm, reason: ArmReason) -> Choice:
    """Only versions that the engine has acknowledged are requested: for any other it would silently apply identity."""
    available = policy.acknowledged if policy.apply == "engine" else {policy.serving, policy.forced}
    return Choice(version, arm, reason) if version in available else Choice(None, Arm.NONE, ArmReason.UNKNOWN)
