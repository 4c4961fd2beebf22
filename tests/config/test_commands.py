"""The command line: usage errors, help, and `hemostat profile` against a server that answers as the admin port does."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hemostat import __version__, cli
from hemostat_calibration.profiles.profile import CalibrationProfile


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "a command is needed: serve, relay, control, init, check, profile, engines, canaries, gate, score"),
        (["serv"], "unknown command 'serv'; did you mean serve?"),
        (["diagnose"], "unknown command 'diagnose'; use one of"),
        (["serve", "--confg", "x"], "unrecognized arguments: --confg x"),
        (["serve", "--set", "shadow.rate"], "write it as KEY=VALUE"),
        (["serve", "--upstream", "http://h", "--rate", "2"], "shadow.rate: '2' does not fit"),
        (["demo", "--requests", "none"], "'none' is not a positive integer"),
        (["compress", "a", "b", "--scheme", "w2"], "invalid choice: 'w2'"),
        (["compress", "/no/such", "b", "--scheme", "w4a16"], "/no/such is not a transformers checkpoint"),
        (["profile", "show", "../x"], "is not a profile version"),
        (["profile", "import", "/no/such"], "cannot be read"),
        (["profile", "list", "--admin", "nonsense"], "--admin names its admin port"),
    ],
)
def test_usage_errors_are_one_line_with_exit_code_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("hemostat: ")
    assert words in err
    assert err.count("\n") == 1


def test_a_laboratory_that_cannot_be_loaded_takes_its_own_commands_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = importlib.metadata.EntryPoint("doctor", "hemostat_lab.no_such_module", cli.GROUP)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: [damaged])
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    assert "doctor" not in capsys.readouterr().out
    assert cli.main(["doctor"]) == 2
    assert "is not installed, or damaged; pip install" in capsys.readouterr().err


def test_help_and_version_need_neither_torch_nor_vllm() -> None:
    code = (
        "import sys; sys.modules.update(torch=None, transformers=None, vllm=None)\n"
        "from hemostat.cli import main\n"
        "for arguments in (['--help'], ['--version'], ['serve', '--help']):\n"
        "    try: main(arguments)\n"
        "    except SystemExit as end: assert end.code == 0\n"
        "import hemostat.commands.setup_check, hemostat.supervisor\n"
        "import hemostat.reference.transformers, hemostat.reference.vllm\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert f"hemostat {__version__}\n" in done.stdout
    assert "--workers" in done.stdout


class Admin(BaseHTTPRequestHandler):
    """The admin port's routes for profiles."""

    stored: bytes = b""
    version: str = "v"
    calls: list[tuple[str, str | None, bytes]]

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        type(self).calls.append((f"{self.command} {self.path}", self.headers.get("authorization"), body))
        guarded = self.command == "POST" or "/engine/" in self.path
        if guarded and self.headers.get("authorization") != "Bearer t":
            status, data = 401, json.dumps({"detail": "send the admin token"}).encode()
        elif "/engine/profiles/" in self.path:
            status, data = 200, type(self).stored
        else:
            status, data = 200, json.dumps({"version": type(self).version}).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def admin(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Admin]]:
    handler = type("Handler", (Admin,), {"calls": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setenv("HEMOSTAT_ADMIN_URL", f"http://127.0.0.1:{server.server_port}")
        yield handler
        server.shutdown()
        thread.join()


def test_profile_commands(
    admin: type[Admin], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = CalibrationProfile(
        family="temperature_bias",
        model="",
        vocab_size=8,
        parameters={"inverse_temperature": np.array(1, np.float32), "bias": np.zeros(8, np.float32)},
        clamp_nats=1.0,
        metadata={},
    )
    admin.stored = profile.to_bytes()
    version = profile.version
    file = tmp_path / "p.safetensors"

    assert cli.main(["profile", "rollback"]) == 2
    assert "send the admin token" in capsys.readouterr().err
    monkeypatch.setenv("HEMOSTAT_ADMIN__TOKEN", "t")
    assert cli.main(["profile", "list"]) == 0
    assert cli.main(["profile", "show", version]) == 0
    assert cli.main(["profile", "export", version, str(file)]) == 0
    assert file.read_bytes() == admin.stored
    assert cli.main(["profile", "import", str(file)]) == 0
    assert cli.main(["profile", "promote", version, "--yes"]) == 0
    assert cli.main(["profile", "promote", version, "--yes", "--kind", "chat text"]) == 0
    assert cli.main(["profile", "pin", version, "--yes"]) == 0
    assert cli.main(["profile", "pin", "--off"]) == 0
    assert cli.main(["profile", "rollback", "--token", "t"]) == 0
    assert cli.main(["profile", "rollback", "--kind", "chat text"]) == 0
    assert cli.main(["profile", "release"]) == 0
    assert cli.main(["profile", "mode", "off"]) == 0
    assert [(call, body) for call, _, body in admin.calls[1:]] == [
        ("GET /api/v1/profiles", b""),
        (f"GET /api/v1/profiles/{version}", b""),
        (f"GET /api/v1/engine/profiles/{version}", b""),
        ("POST /api/v1/profiles", admin.stored),
        ("POST /api/v1/profiles/promote", f'{{"version":"{version}","kind":null}}'.encode()),
        ("POST /api/v1/profiles/promote", f'{{"version":"{version}","kind":"chat text"}}'.encode()),
        ("POST /api/v1/profiles/pin", f'{{"version":"{version}","kind":null}}'.encode()),
        ("POST /api/v1/profiles/pin", b'{"version":null,"kind":null}'),
        ("POST /api/v1/profiles/rollback", b'{"kind":null}'),
        ("POST /api/v1/profiles/rollback", b'{"kind":"chat text"}'),
        ("POST /api/v1/profiles/release", b'{"kind":null}'),
        ("POST /api/v1/calibration", b'{"mode":"off"}'),
    ]
    assert {token for _, token, _ in admin.calls[1:]} == {"Bearer t"}

    admin.version = version
    for action in (["export", version[:8], str(file)], ["promote", version[:8], "--yes"], ["show", version[:8]]):
        assert cli.main(["profile", *action]) == 0
    assert [(call, body) for call, _, body in admin.calls[-4:]] == [
        (f"GET /api/v1/profiles/{version[:8]}", b""),
        (f"GET /api/v1/engine/profiles/{version}", b""),
        ("POST /api/v1/profiles/promote", f'{{"version":"{version[:8]}","kind":null}}'.encode()),
        (f"GET /api/v1/profiles/{version[:8]}", b""),
    ]

    capsys.readouterr()
    assert cli.main(["profile", "export", "0" * 32, str(tmp_path / "other")]) == 2  # not the bytes of that name
    assert not (tmp_path / "other").exists()
    file.write_bytes(b"junk")
    calls = len(admin.calls)
    assert cli.main(["profile", "import", str(file)]) == 2  # refused here, not sent
    for command in (
        ["promote", version],
        ["pin", version],
        ["pin"],
        ["pin", version, "--off"],
        ["promote", "latest"],
        ["promote", version[:7]],
    ):
        capsys.readouterr()
        assert cli.main(["profile", *command]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert len(admin.calls) == calls


@pytest.mark.parametrize(("answer", "code"), [("y", 0), ("", 2), ("no", 2)])
def test_promote_and_pin_ask_for_confirmation(
    admin: type[Admin], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], answer: str, code: int
) -> None:
    monkeypatch.setenv("HEMOSTAT_ADMIN__TOKEN", "t")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda question: answer)
    assert cli.main(["profile", "promote", "0" * 32]) == code
    assert len(admin.calls) == (code == 0)
    assert ("nothing was changed" in capsys.readouterr().err) == (code == 2)
