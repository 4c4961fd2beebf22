"""Checkpoints by llmcompressor, in an environment of its own: it wants other versions of transformers and
compressed-tensors than vLLM. The scripts of this folder run there, without Hemostat."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.bench.recovery.log import say

REQUIREMENT = "llmcompressor==0.14.0.1"
ENVIRONMENT = Path(__file__).resolve().parents[3] / "build" / "bench" / "llmcompressor"
QUANTIZE, PRUNE = (Path(__file__).with_name(f"{name}.py") for name in ("quantize", "prune"))


def compress(
    script: Path, reference: Path, folder: Path, texts: Sequence[Sequence[int]], method: str, *arguments: str
) -> None:
    """Write `folder` by a script of this folder, calibrated on `texts` (token ids); its log is beside the folder."""
    python = _interpreter()
    partial, given = (folder.with_name(f"{folder.name}.{name}") for name in ("part", "json"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    given.write_text(json.dumps(texts), encoding="utf-8")
    say(f"{method}: llmcompressor, {len(texts)} texts")
    with folder.with_name(f"{folder.name}.log").open("wb") as log:
        command = [python, script, reference, partial, given, method, *arguments]
        subprocess.run(command, check=True, stdout=log, stderr=log)
    given.unlink()
    partial.rename(folder)


def _interpreter() -> Path:
    """Of the environment, which is made on first use."""
    python = ENVIRONMENT / "bin" / "python"
    if not (ENVIRONMENT / "ready").exists():
        say(f"installing {REQUIREMENT} in {ENVIRONMENT}")
        subprocess.run([sys.executable, "-m", "venv", ENVIRONMENT], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", REQUIREMENT], check=True)
        (ENVIRONMENT / "ready").touch()
    return python
