"""The wheel with the relay's hot path compiled: what it contains, and that its relay does what the sources say.

It is built once, without the C compiler's optimizations, which take most of the time and change no result.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tests.support import compiled
from tests.support.paths import ROOT
from tests.support.uv import uv

from hemostat import __version__

pytestmark = pytest.mark.timeout(900)  # compiling takes minutes on a busy machine

MIDDLEWARE = ROOT / "middleware"
RELAY = (
    "answers",
    "comparison",
    "faults",
    "head_caches",
    "hooks",
    "outcomes",
    "process.py::test_the_control_process_logs_whether_a_relay_is_compiled",
    "relay",
)
WIRE = (
    "arms",
    "comparison",
    "conversation_key",
    "engine_arms",
    "openai",
    "refusals",
    "several_models",
    "through_relay",
)
QUICK = [
    "tests/relay/upstreams/test_engines.py",
    *(f"tests/relay/test_{name}{'' if '::' in name else '.py'}" for name in RELAY),
    *(f"tests/wire/test_{name}.py" for name in WIRE),
]
"""They run 92 % of the lines of compiled modules that all tests of the slow run do, in a sixth of the time. A file that
adds few lines for its time is left to the slow run: it runs from the sources in `make test`."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        return compiled.build_wheel(tmp_path_factory.mktemp("compiled-wheel"), opt_level=0)
    except compiled.NoCompilerError as error:
        pytest.skip(str(error))
    except subprocess.CalledProcessError as error:
        pytest.fail(error.stdout + error.stderr)


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compiled")
    compiled.unpack(wheel, folder)
    return folder


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def run_tests(unpacked: Path, *arguments: str) -> None:
    """pytest with the compiled modules; it fails before the first test where one of them is not used."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider", "--durations=0", "--compiled"]
    variables = os.environ | compiled.environment(unpacked)
    ran = subprocess.run([*command, *arguments], env=variables, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]


def test_the_wheel_holds_all_of_the_default_one_and_the_compiled_modules(wheel: Path, wheelhouse: Path) -> None:
    (default,) = wheelhouse.glob("hemostat-*.whl")
    assert default.name == f"hemostat-{__version__}-py3-none-any.whl"
    assert not wheel.name.endswith("-none-any.whl")
    assert not [name for name in names(default) if name.endswith(compiled.SUFFIXES)]
    (suffix, *_) = compiled.SUFFIXES
    modules = {path.removesuffix(".py") + suffix for path in compiled.modules()}
    assert names(wheel) - names(default) == modules | {f"hemostat_compiled__mypyc{suffix}"}
    assert names(default) <= names(wheel)


def test_nothing_is_left_in_the_source_tree(wheel: Path) -> None:
    """There it would be imported instead of the source next to it, whatever that has become since."""
    assert wheel.exists()
    for folder in ("middleware", "calibration", "deploy"):
        result = [path for path in (ROOT / folder).rglob("*") if path.suffix in {".so", ".pyd", ".c"}]
        assert result == []


def test_compiled_modules_define_no_msgspec_structs() -> None:
    """mypyc drops the types of their fields: everything in a field would be decoded as it is, unchecked."""
    assert len(compiled.modules()) > 20
    bases = {
        f"{path}: {node.name}": {ast.unparse(base) for base in node.bases}
        for path in compiled.modules()
        for node in ast.walk(ast.parse((MIDDLEWARE / path).read_text()))
        if isinstance(node, ast.ClassDef)
    }
    assert {name: parents for name, parents in bases.items() if parents & {"msgspec.Struct", "Struct"}} == {}


def test_a_relay_imports_the_compiled_modules(unpacked: Path) -> None:
    code = "import json, sys, hemostat.relay.main; print(json.dumps({n: m.__file__ for n, m in sys.modules.items() if"
    code += " n.startswith('hemostat')}))"
    variables = os.environ | compiled.environment(unpacked)
    said = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True)
    files = {name: Path(file) for name, file in json.loads(said.stdout).items()}
    assert all(file.is_file() and file.is_relative_to(unpacked) for file in files.values())
    result = {name for name, file in files.items() if file.name.endswith(compiled.SUFFIXES)}
    modules = {path.removesuffix(".py").replace("/", ".") for path in compiled.modules()}
    assert result == modules | {"hemostat_compiled__mypyc"}


def test_the_relay(unpacked: Path) -> None:
    run_tests(unpacked, "-m", "not vllm", *QUICK)


@pytest.mark.slow
def test_all_of_the_relay_and_what_it_intercepts(unpacked: Path) -> None:
    run_tests(unpacked, "-m", "not vllm", "tests/relay", "tests/wire", "tests/ipc", "tests/grammar", "tests/scoring")


@pytest.mark.slow
def test_an_editable_install_is_not_compiled(tmp_path: Path) -> None:
    """Not even where the variable is set, such as by somebody who builds both."""
    compiled.check_compiler()
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    python = environment / "bin" / "python"
    uv("pip", "install", "--python", str(python), "--no-deps", "-e", str(ROOT), variables={compiled.SWITCH: "1"})
    code = "import importlib.util as u; print(u.find_spec('hemostat.relay.exchange').origin)"
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    said = subprocess.run([python, "-c", code], env=clean, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert Path(said.stdout.strip()) == MIDDLEWARE / "hemostat" / "relay" / "exchange.py"
    assert not [path for path in MIDDLEWARE.rglob("*") if path.suffix == ".so"]
