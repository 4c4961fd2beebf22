"""The one table of alerts: what each is about, how severe it is, whether clients are affected, and what to do first.

Every alert of `helm/hemostat/rules/hemostat.yaml` has one row here, a problem that `problems` looks for, and a section
of `docs/runbook.md`, which begins with `clients` and `act`. Tests compare the four. The console takes all that it says
about a problem from here.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Severity = Literal["critical", "warning"]
Area = Literal[
    "vLLM", "relays", "errors", "reference", "store", "alarm", "canaries", "gate", "adapters", "profiles",
    "measurement", "configuration",
]  # fmt: skip
"""A part of the deployment, as the console's status line names it."""


class Alert(NamedTuple):
    """One alert of Prometheus, and the problem that the status shows for the same reason."""

    name: str
    severity: Severity
    area: Area
    clients: str
    """The answer to "Are clients affected?", in whole sentences."""
    advice: str
    """The first thing to do, in one sentence or two."""
    page: tuple[str, ...] = ()
    """The console's page that helps, as the parts of its path; empty: the runbook does."""
    lasting: float = 0.0
    """The number of seconds for which the problem has to be found without a pause before it is shown. It is never
    longer than the alert's `for`.
    """

    @property
    def act(self) -> str:
        """The answer to "Act now or tomorrow?"."""
        return "Act now." if self.severity == "critical" else "Act tomorrow."

    @property
    def runbook(self) -> str:
        """The address of the alert's section, relative to the address of the admin port."""
        return f"runbook#{self.name.lower()}"


NOTHING_MEASURED = "No: requests are served normally. Nothing is measured meanwhile."

ALERTS: dict[str, Alert] = {
    alert.name: alert
    for alert in (
        Alert(
            "HemostatNoRelays", "critical", "relays",
            "It is not known: either nothing is served, or relays serve without sampling and without profiles. "
            "No client is affected where the plugin measures alone.",
            "Test the data port; the supervisor's log says why relays ended. "
            "Where the plugin measures alone, run hemostat check.",
        ),
        Alert(
            "HemostatUpstreamDown", "critical", "vLLM",
            "Yes: every request that needs vLLM fails.",
            "Repair vLLM. Hemostat needs no action: it continues when vLLM answers.",
        ),
        Alert(
            "HemostatProxyErrors", "critical", "errors",
            "Yes: some of their requests fail.",
            "Read vLLM's log, and send one of the failing requests to vLLM directly.",
        ),
        Alert(
            "HemostatHemorrhage", "critical", "alarm",
            "Yes: no request fails, but answers differ from the reference's by more than you allow.",
            "Find the kind of traffic that is over the budget.", ("alarm",),
        ),
        Alert(
            "HemostatModelChanged", "warning", "alarm",
            "Perhaps: no request fails, but answers have changed. Whether they are worse is not known.",
            "Find the kind that changed, and whether a checkpoint or an engine was replaced then.", ("alarm",),
        ),
        Alert(
            "HemostatCanaryChanged", "warning", "canaries",
            "Perhaps: no request fails, but one engine computes other answers. Whether they are worse is not known.",
            "Compare the engine's checkpoint, vLLM's version and its flags with before; accept the change if it is "
            "yours.", ("engines",),
        ),
        Alert(
            "HemostatGateFailed", "warning", "gate",
            "No: no client sees the candidate.",
            "Do not roll the candidate out; the gate says which question it failed.", ("gate",),
        ),
        Alert(
            "HemostatGateUndecided", "warning", "gate",
            "No: no client sees the candidate.",
            "Read why the gate cannot decide; end it if nobody waits for it.", ("gate",),
        ),
        Alert(
            "HemostatEngineOutlier", "warning", "vLLM",
            "Perhaps: no request fails, but one engine computes other answers. Whether they are worse is not known.",
            "Compare the engine's checkpoint and flags with another engine's.", ("engines",),
        ),
        Alert(
            "HemostatEngineEjected", "warning", "vLLM",
            "No, unless the other engines cannot carry the load.",
            "Repair the engine that gets no requests.", ("engines",),
        ),
        Alert(
            "HemostatOverhead", "warning", "relays",
            "Slightly: one request in a hundred waits 10 ms or longer in Hemostat.",
            "Give the relays more CPU, or more connections to vLLM.", lasting=300.0,
        ),
        Alert(
            "HemostatRequestsRepeated", "warning", "errors",
            "Slightly: no request fails because of it, but some are generated twice and take longer.",
            "Find out what vLLM refuses: hemostat check compares shadow.top_k with its --max-logprobs.",
        ),
        Alert(
            "HemostatOutcomeHarm", "warning", "profiles",
            "Not any more: answers of this kind were worse with a profile, and it serves no profile now.",
            "Find out why the profile harmed, then release the kind.", ("kinds",),
        ),
        Alert(
            "HemostatProfileFailed", "warning", "profiles",
            "No: that engine answers without the profile.",
            "Read vLLM's log for the reason; the profile is off in that engine until vLLM restarts.",
        ),
        Alert(
            "HemostatCalibrationRolledBack", "warning", "profiles",
            "No: requests are answered without the profile.",
            "Read why it was rolled back.", ("events",),
        ),
        Alert(
            "HemostatAdaptersUnusable", "warning", "adapters",
            "No: requests are answered without the adapter.",
            "Read what the engine refuses: vLLM's flags, the load, or a probe.", ("profiles",), lasting=600.0,
        ),
        Alert(
            "HemostatReferenceDown", "warning", "reference",
            NOTHING_MEASURED,
            "Start or repair the reference. Clients are not affected.",
        ),
        Alert(
            "HemostatStoreErrors", "warning", "store",
            "No: no request needs the store. A restart before it is repaired may lose decisions and evidence.",
            "Make room for the store, or correct its permissions.",
        ),
        Alert(
            "HemostatShadowStarving", "warning", "measurement",
            NOTHING_MEASURED,
            "Find the reason for which sampled requests are not scored.", ("measurement",), lasting=300.0,
        ),
        Alert(
            "HemostatReloadFailed", "warning", "configuration",
            "No: the former configuration serves.",
            "Correct the configuration file and send SIGHUP again.",
        ),
        Alert(
            "HemostatNoiseFloorUnknown", "warning", "measurement",
            "No: requests are served normally. The budget test of the alarm waits meanwhile.",
            "Find out why a model cannot score its own tokens.",
        ),
        Alert(
            "HemostatPluginMisfit", "warning", "vLLM",
            "No: requests are served normally. Profiles, adapters and some figures may be missing for that engine.",
            "Install the plugin of Hemostat's version where that vLLM runs, and restart vLLM.", ("engines",),
        ),
        Alert(
            "HemostatShadowDrops", "warning", "measurement",
            "No: requests are served normally. Fewer of them are measured.",
            "Lower shadow.rate, or give the reference more capacity.", ("measurement",), lasting=300.0,
        ),
        Alert(
            "HemostatAdapterBuildsFail", "warning", "adapters",
            "No: requests are served as before.",
            "Read why the last build failed.", ("profiles",),
        ),
        Alert(
            "HemostatCapturesLost", "warning", "measurement",
            "No: requests are served normally. Fewer of them are measured.",
            "Give the control process more CPU, or read why it ended.", ("measurement",),
        ),
        Alert(
            "HemostatRecordsLost", "warning", "measurement",
            "No: requests are served normally. Only the file of records.path misses something.",
            "Make room on the disk of records.path, or correct its permissions.",
        ),
    )
}  # fmt: skip
"""All alerts by name, the worst first."""
