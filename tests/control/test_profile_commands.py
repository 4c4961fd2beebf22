"""`hemostat profile …` against a real admin port: its output, its effects and its errors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.admin_server import ALARM_FROM, Served, profile, record, served
from tests.support.control import TOKEN
from tests.support.evidence import evidence
from tests.support.temperature_bias import temperature_bias

from hemostat import cli
from hemostat.control.composition import Control
from hemostat_calibration.adapters.factors import LowRank
from hemostat_calibration.profiles.adapter import adapter_bytes, adapter_profile
from hemostat_calibration.profiles.peft import peft_files
from hemostat_calibration.profiles.profile import CalibrationProfile

Command = Callable[..., Any]


@pytest.fixture
def instance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    async def fill(control: Control, folder: Path) -> None:
        control.profile_manager.set_model_pair("m", 60)

    with served(tmp_path, fill) as running:
        monkeypatch.setenv("HEMOSTAT_ADMIN_URL", running.url)
        monkeypatch.setenv("HEMOSTAT_ADMIN__TOKEN", TOKEN)
        yield running


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `hemostat profile` with arguments: returns its output, or with `fails` its error line."""

    def run(*arguments: object, fails: bool = False) -> Any:
        code = cli.main(["profile", *map(str, arguments)])
        out, err = capsys.readouterr()
        if not fails:
            assert (code, err) == (0, "")
            return json.loads(out) if out.startswith("{") else out.strip()
        assert (code, out, err.count("\n")) == (2, "", 1)
        return err

    return run


def proven(instance: Served, candidate: CalibrationProfile) -> None:
    """Feed records that contain the candidate's gain until it is promoted."""
    for n in range(2000):
        # From `ALARM_FROM` on they are another traffic, and gains that change look as if they depended on each other.
        like = n % ALARM_FROM
        made = replace(record(like, None), shifts=record(like, candidate).shifts)
        made = replace(made, request_id=str(n), prompt_key=n.to_bytes(4, "big"))
        instance.do(lambda control, made=made: control.profile_manager.update(evidence(made)))  # type: ignore[misc]
        if instance.do(lambda control: control.profile_manager.serving.selected) is not None:
            return
    raise AssertionError("nothing was promoted")


def test_from_a_file_to_serving_and_back_with_the_evidence(instance: Served, command: Command, tmp_path: Path) -> None:
    good, other = profile(0), profile(1)
    file = tmp_path / "good.safetensors"
    file.write_bytes(good.to_bytes())
    assert command("import", file) == good.version
    proven(instance, good)
    listed = command("list")
    (promoted,) = [event for event in listed["events"] if event["decision"] == "promote"]
    assert (promoted["version"], promoted["reason"]) == (good.version, "evidence")
    assert promoted["evidence"]["log_e_adjusted"] >= promoted["evidence"]["needed"]
    assert promoted["evidence"]["mean_gain"] > 0.0
    assert promoted["kind"] == "rest"
    assert listed["serving"] == "identity", "observe lets nothing serve"
    assert command("mode", "auto") == {"mode": "auto"}
    assert command("list")["serving"] == good.version
    shown = command("show", good.version)
    assert shown["state"] == "selected"
    assert [event["decision"] for event in shown["evidence"]] == ["mode", "promote", "import"]

    file.write_bytes(other.to_bytes())
    command("import", file)
    assert command("pin", other.version, "--yes")["pinned"] is True
    assert "unpin it first" in command("promote", good.version, "--yes", fails=True)
    assert command("pin", "--off")["pinned"] is False
    assert command("promote", good.version, "--yes", "--kind", "rest")["by_kind"] == {"rest": good.version}
    copy = tmp_path / "copy.safetensors"
    command("export", good.version, copy)
    assert copy.read_bytes() == good.to_bytes()
    assert command("rollback")["serving"] == "identity"
    decided = [event["decision"] for event in reversed(command("list")["events"])]
    assert decided == ["import", "promote", "mode", "import", "pin", "unpin", "promote", "roll_back"]


def test_an_adapter_from_a_file_and_back(instance: Served, command: Command, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = [f"model.layers.{n}.mlp.{kind}_proj" for n in range(2) for kind in ("up", "down")]
    layers = {
        name: LowRank(rng.normal(size=(2, 8)).astype(np.float32), rng.normal(size=(8, 2)).astype(np.float32))
        for name in names
    }
    made = adapter_profile(model="m", vocab_size=60, layers=layers, metadata={"method": "training-free"})
    file, copy = tmp_path / "profile.safetensors", tmp_path / "copy.safetensors"
    file.write_bytes(made.to_bytes())
    assert command("import", file) == made.version
    [listed] = command("list")["profiles"]
    assert (listed["version"], listed["family"]) == (made.version, "adapter")
    assert listed["adapter"] == {"rank": 2, "layers": 4, "bytes": adapter_bytes(made)}
    shown = command("show", made.version)
    assert shown["metadata"] == {"method": "training-free"}
    assert [event["decision"] for event in shown["evidence"]] == ["import"]
    command("export", made.version, copy)
    assert copy.read_bytes() == made.to_bytes()
    assert CalibrationProfile.from_bytes(copy.read_bytes(), made.version).version == made.version


def test_a_peft_folder_is_refused_with_the_file_that_is_meant(
    instance: Served, command: Command, tmp_path: Path
) -> None:
    layers = {"model.layers.0.mlp.up_proj": LowRank(np.ones((2, 8), np.float32), np.ones((8, 2), np.float32))}
    made = adapter_profile(model="m", vocab_size=60, layers=layers)
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name, data in peft_files(made, "base").items():
        (folder / name).write_bytes(data)
    renamed = tmp_path / "renamed.safetensors"
    renamed.write_bytes((folder / "adapter_model.safetensors").read_bytes())
    meant = f"({folder / 'profile.safetensors'})"
    assert "is a PEFT folder; a profile is one file: give the profile.safetensors" in command(
        "import", folder, fails=True
    )
    for given in (folder, folder / "adapter_model.safetensors", folder / "adapter_config.json"):
        assert meant in command("import", given, fails=True)
    assert "is a part of a PEFT adapter" in command("import", renamed, fails=True)
    assert "is a folder; " in command("import", tmp_path, fails=True)
    assert command("list")["profiles"] == []


def test_failures_are_one_line_with_the_reason(
    instance: Served, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = profile(0).to_bytes()
    bias = profile(0).parameters["bias"]
    file = tmp_path / "p.safetensors"
    for data, words in (
        (whole[:-5], "not a safetensors file"),
        (whole[:100], "truncated"),
        (whole.replace(b"temperature_bias", b"temperature_bent"), "family temperature_bent is unknown"),
        (b"", "profile of 0 bytes is truncated"),
        (temperature_bias("m", 60, 1.0, bias, 1.0).to_bytes() + b"\0", "not a safetensors file"),
        (temperature_bias("m", 59, 1.0, bias[:59], 1.0).to_bytes(), "a vocabulary of 59 ids, the model has 60"),
        (temperature_bias("n", 60, 1.0, bias, 1.0).to_bytes(), "for the model n, not for m"),
    ):
        file.write_bytes(data)
        assert words in command("import", file, fails=True)
    file.write_bytes(whole)
    nobody = "0" * 32
    assert "no such profile" in command("show", nobody, fails=True)
    assert "answered 404" in command("export", nobody, file, fails=True)
    for action in ("promote", "pin"):
        assert "there is no profile 0000" in command(action, nobody, "--yes", fails=True)
        assert "--yes" in command(action, nobody, fails=True), "nobody is there to be asked"
    assert "nothing is pinned" in command("pin", "--off", fails=True)
    assert "identity serves" in command("rollback", fails=True)
    assert "no kind 'x' is followed; followed are: rest" in command("rollback", "--kind", "x", fails=True)
    assert "nothing is held" in command("release", fails=True)
    listed = command("list")
    assert (listed["profiles"], listed["events"]) == ([], []), "nothing was changed"
    monkeypatch.setenv("HEMOSTAT_ADMIN__TOKEN", "wrong")
    assert "send the admin token" in command("rollback", fails=True)
