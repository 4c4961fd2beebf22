"""The steps that take time, in the status of a real `Control`."""

from __future__ import annotations

from pathlib import Path

from tests.support.admin_server import everything
from tests.support.control import control, settings, status_json

from hemostat.control.composition import Control

REFERENCE = {"backend": "vllm", "url": "http://127.0.0.1:1"}


def known(plane: Control) -> dict[str, bool]:
    return {step["step"]: step["known"] for step in status_json(plane)["progress"]}


async def test_steps_are_known_one_after_the_other(tmp_path: Path) -> None:
    made = settings(reference=REFERENCE, evidence={"cycle_hours": 24}, alarm={"baseline_requests": 30})
    async with control(tmp_path, made) as plane:
        steps = status_json(plane)["progress"]
        assert [step["step"] for step in steps] == ["figure", "interval", "canaries", "cycle", "alarm", "promotion"]
        assert not any(step["known"] for step in steps)
        assert all(step["what"] and step["when"] for step in steps)
        (await everything(plane, tmp_path)).close()
        assert known(plane) == {
            "figure": True,
            "interval": True,
            "canaries": False,
            "cycle": False,
            "alarm": False,
            "promotion": True,
        }


async def test_without_a_cycle_an_interval_is_of_all_traffic_at_once(tmp_path: Path) -> None:
    async with control(tmp_path, settings(reference=REFERENCE, alarm={"baseline_requests": 30})) as plane:
        (await everything(plane, tmp_path)).close()
        assert known(plane) == {
            "figure": True,
            "interval": True,
            "canaries": False,
            "alarm": True,
            "promotion": True,
        }


async def test_without_a_reference_nothing_comes(tmp_path: Path) -> None:
    async with control(tmp_path, settings()) as plane:
        assert status_json(plane)["progress"] == []
