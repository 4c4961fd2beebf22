"""From reports on the relays' socket to the kind that a profile leaves, and to what is stored of it."""

from __future__ import annotations

import random
from pathlib import Path

from tests.support.captures import V
from tests.support.control import MODEL, connect_relay, control, profile, relay_stats, settings, status_json, told
from tests.support.waiting import until

from hemostat.control.composition import Control
from hemostat.ipc.messages import REST_KIND, OutcomeReport, OutcomeReports, encode
from hemostat.measurement.outcome_sampling import MAX_REPORTS_PER_SECOND
from hemostat.profiles.decisions import Decision, Reason

KIND = "chat json greedy"


def reports(version: str, kind: str, units: int, treated_rate: float, control_rate: float) -> OutcomeReports:
    rng = random.Random(0)
    made = []
    for _ in range(units):
        treated = rng.random() < 0.5
        bad = rng.random() < (treated_rate if treated else control_rate)
        made.append(OutcomeReport(kind, version, treated, rng.randbytes(16), b"", {"json": bad}, 20))
    return OutcomeReports(made)


def serve(plane: Control) -> str:
    """A profile that serves KIND and the rest."""
    profiles = plane.profile_manager
    profiles.set_model_pair(MODEL, V)
    for _ in range(60):
        profiles.kinds.update(KIND)
    version = profiles.operator.import_profile(profile())
    for kind in (KIND, REST_KIND):
        profiles.operator.promote(version, kind)
    return version


async def test_harm_takes_the_profile_from_its_kind_until_an_operator_releases_it(tmp_path: Path) -> None:
    made = settings(calibration={"mode": "auto"}, store={"url": f"sqlite:///{tmp_path}/h.db"})
    async with control(tmp_path, made) as plane:
        version = serve(plane)
        relay = await connect_relay(plane, tmp_path, 1, relay_stats())
        relay.write(encode(reports(version, KIND, 700, 0.95, 0.5)) + encode(reports(version, REST_KIND, 100, 0.5, 0.5)))
        await until(lambda: len(status_json(plane)["outcomes"]["kinds"]) == 2)
        await plane.writer.write()  # the numbers of both trials
        plane.do_periodic()
        serving = plane.profile_manager.serving
        assert serving.version_by_kind == {REST_KIND: version}
        assert serving.kinds[KIND].held
        counts = plane.profile_manager.events.counts
        assert counts[Decision.ROLL_BACK, Reason.OUTCOMES] == 1
        shown = {kind["kind"]: kind for kind in status_json(plane)["outcomes"]["kinds"]}
        assert shown[KIND]["harmed"]["interval"][0] > 0.05
        assert shown[REST_KIND]["harmed"] is None
        assert shown[REST_KIND]["units"] == 100
        relay.close()
    async with control(tmp_path, made) as again:
        again.profile_manager.set_model_pair(MODEL, V)
        again.do_periodic()
        shown = {kind["kind"]: kind for kind in status_json(again)["outcomes"]["kinds"]}
        assert shown[KIND]["harmed"]["version"] == version
        assert shown[REST_KIND]["units"] == 100
        again.profile_manager.operator.release(KIND)
        again.do_periodic()
        assert {kind["kind"]: kind["harmed"] for kind in status_json(again)["outcomes"]["kinds"]}[KIND] is None


async def test_the_part_that_relays_report_follows_from_the_requests_of_all(tmp_path: Path) -> None:
    """What a relay had answered before it connected is not known to be recent: it does not count."""
    reference = {"backend": "vllm", "url": "http://127.0.0.1:1"}
    async with control(tmp_path, settings(reference=reference)) as plane:
        relays = [await connect_relay(plane, tmp_path, pid, relay_stats(1e9)) for pid in (1, 2)]
        plane.do_periodic()
        assert plane.link.requests == 0.0
        for relay in relays:
            relay.write(encode(relay_stats(1e9 + 1e6)))
        await until(lambda: plane.link.requests == 2e6)
        plane.do_periodic()
        policy = told(plane)
        fraction = policy.outcome_fraction
        assert fraction < 1.0
        assert fraction * plane.requests.per_second <= MAX_REPORTS_PER_SECOND
        assert policy.shadow_rate * plane.requests.per_second < 100.0, "of captures, too, as long as none is scored"
        for relay in relays:
            relay.close()
