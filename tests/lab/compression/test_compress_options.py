"""Options of `hemostat compress` that do not fit together are refused before anything is read or computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hemostat.cli import main
from hemostat.commands.arguments import UsageError
from hemostat_lab.commands.compress_steps import CompressOptions


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"scheme": "fp8", "calibrate": "gptq"}, "takes none or awq"),
        ({"scheme": "nvfp4", "group_size": 32}, "has groups of its own size: leave --group-size out"),
        ({"compressed": Path("other"), "calibrate": "gptq"}, "--calibrate is for --scheme"),
        ({"compressed": Path("other"), "group_size": 32}, "--group-size is for --scheme"),
    ],
)
def test_options_without_an_effect_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        CompressOptions(Path("source"), Path("out"), **given)


@pytest.mark.parametrize(
    "given",
    [
        {"scheme": "fp8"},
        {"scheme": "fp8", "calibrate": "awq"},
        {"scheme": "fp8", "repair": True},
        {"scheme": "w8a8"},
    ],
)
def test_options_that_fit(given: dict[str, Any]) -> None:
    assert CompressOptions(Path("source"), Path("out"), **given).destination == Path("out")


@pytest.mark.parametrize("name", ["source", "compressed", "plan", "records", "work"])
def test_a_destination_that_holds_what_is_read_is_refused(name: str, tmp_path: Path) -> None:
    """It would be replaced, if Hemostat made it: SOURCE would be lost."""
    (tmp_path / "link").symlink_to(tmp_path / "out")
    for path in (tmp_path / "out", tmp_path / "out" / "inside", tmp_path / "link"):
        given: dict[str, Any] = {"source": Path("source"), name: path}
        with pytest.raises(UsageError, match="name another folder for DEST"):
            CompressOptions(destination=tmp_path / "out", **given)
    CompressOptions(**{"source": Path("source"), name: tmp_path / "out-2"}, destination=tmp_path / "out")


@pytest.mark.parametrize("command", ["compress", "adapt", "doctor"])
def test_a_negative_seed_is_refused(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--seed=-1", "a", "b"]) == 2
    assert "'-1' is not a positive integer" in capsys.readouterr().err
