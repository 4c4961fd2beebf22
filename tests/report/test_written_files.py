"""A file that the user names, and that holds something else, is not replaced: by no command, in one line."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from tests.support.temperature_bias import temperature_bias

from hemostat.adapters.serving.loading import MAX_VERSIONS, write
from hemostat.cli import main
from hemostat.commands.profile import PROFILE_MARKER
from hemostat.report.written_files import other_content
from hemostat_lab.demo.options import DemoFailure, DemoOptions, check_destinations
from hemostat_lab.doctor.options import HTML_MARKER, JSON_MARKER

THESIS = "years of work"


def test_what_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "file"
    assert other_content(file, b"marker") == ""
    file.write_bytes(b"")
    assert other_content(file, b"marker") == ""
    file.write_bytes(b"{marker}")
    assert other_content(file, b"marker") == ""
    file.write_bytes(bytes(1 << 17) + b"marker")
    assert other_content(file, b"marker") == f"{file} exists and was not written by this command; name another file"
    assert other_content(Path(os.devnull), b"marker") == ""


@pytest.mark.parametrize("flag", ["--json", "--html", "--plan"])
def test_doctor(flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("reference", "compressed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    file = tmp_path / "thesis"
    file.write_text(THESIS)
    assert main(["doctor", str(tmp_path / "reference"), str(tmp_path / "compressed"), flag, str(file)]) == 2
    assert f"{flag}: {file} exists and was not written by this command" in capsys.readouterr().err
    assert file.read_text() == THESIS


def test_the_doctors_own_reports_have_their_markers() -> None:
    from hemostat.report import page

    template = Path(page.__file__).with_name("page.html.jinja").read_bytes()
    assert HTML_MARKER in template
    assert JSON_MARKER == b'"hemostat": "', "the second key of a report, which json.dumps writes like this"


def test_profile_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "thesis"
    file.write_text(THESIS)
    assert main(["profile", "export", "0" * 32, str(file), "--admin", "http://127.0.0.1:9"]) == 2
    assert "was not written by this command" in capsys.readouterr().err
    assert file.read_text() == THESIS
    assert PROFILE_MARKER in temperature_bias("m", 3, 2.0, np.zeros(3), clamp_nats=1.0).to_bytes()


def test_demo(tmp_path: Path) -> None:
    file = tmp_path / "thesis"
    file.write_text(THESIS)
    with pytest.raises(DemoFailure, match=r"--report: .* was not written by this command"):
        check_destinations(DemoOptions(report=file))
    with pytest.raises(DemoFailure, match=r"--keep: .* holds thesis, which is not of a demo"):
        check_destinations(DemoOptions(keep=tmp_path))
    file.rename(tmp_path / "records.jsonl")
    with pytest.raises(DemoFailure, match=r"--keep: .*records\.jsonl exists and was not written by this command"):
        check_destinations(DemoOptions(keep=tmp_path))
    (tmp_path / "records.jsonl").write_text('{"request_id": "demo-0-1", "prompt_token_ids": [1]}\n')
    check_destinations(DemoOptions(keep=tmp_path))


def test_the_folder_of_adapters_keeps_what_others_wrote(tmp_path: Path) -> None:
    """Names of 32 hex digits are not Hemostat's alone."""
    others = tmp_path / ("f" * 32)
    others.mkdir()
    (others / "thesis").write_text(THESIS)
    os.utime(others, (0, 0))
    for number in range(MAX_VERSIONS + 3):
        write(tmp_path, f"{number:032x}", {"adapter_config.json": b"{}"}, ())
    assert (others / "thesis").read_text() == THESIS
    assert len(list(tmp_path.iterdir())) == MAX_VERSIONS + 1
