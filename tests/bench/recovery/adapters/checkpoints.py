"""The compressed checkpoints that adapters are made for: those of `hemostat compress`, and GPTQ and AWQ by
llmcompressor, which has an environment of its own below build/."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench.recovery.engine import Written
from tests.bench.recovery.log import say

from hemostat.models.reference_checkpoint import cached_checkpoints

from .texts import checkpoint_digest

LLMCOMPRESSOR = "llmcompressor==0.14.0.1"
CALIBRATION_TEXTS = {"gptq": 240, "awq": 64}
"""AWQ runs every text once for each point of its grid."""
GROUP_SIZE = 64
"""The width of SmolLM2, 576, is not a multiple of 128."""
SCRIPT = Path(__file__).with_name("llmcompressor_script.py")


@dataclass(frozen=True, slots=True)
class Pair:
    """The folders of a compressed checkpoint and of the reference that it was made from."""

    scheme: str
    reference: Path
    compressed: Path

    def digests(self) -> list[str]:
        return [checkpoint_digest(self.reference), checkpoint_digest(self.compressed)]


def pair(scheme: str, build: Path, calibration: Sequence[Written]) -> Pair:
    """scheme: one of `hemostat compress`, or "gptq" or "awq", which are calibrated on the first texts."""
    reference = cached_checkpoints("w4a16", say).reference
    if scheme not in CALIBRATION_TEXTS:
        return Pair(scheme, reference, cached_checkpoints(scheme, say).compressed)
    folder = build / f"checkpoint-{scheme}"
    if not folder.exists():
        texts = [[int(i) for i in (*text.prompt, *text.output)] for text in calibration[: CALIBRATION_TEXTS[scheme]]]
        quantize(scheme, reference, folder, texts, GROUP_SIZE, environment(build / "llmcompressor"))
    return Pair(scheme, reference, folder)


def quantize(
    method: str, reference: Path, folder: Path, texts: Sequence[Sequence[int]], group_size: int, python: Path
) -> None:
    """By `method`, "gptq" or "awq", calibrated on `texts`; its log is beside the folder. python: of `environment`."""
    partial = folder.with_name(folder.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
    say(f"{method}: quantizing with llmcompressor, {len(texts)} texts")
    command = [python, SCRIPT, method, reference, partial, partial / "texts.json", str(group_size)]
    with (folder.parent / f"{method}.log").open("wb") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log)
    (partial / "texts.json").unlink()
    partial.rename(folder)


def environment(folder: Path) -> Path:
    """The interpreter of an environment that has llmcompressor; made on first use."""
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        say(f"installing {LLMCOMPRESSOR} in {folder}")
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", LLMCOMPRESSOR], check=True)
        (folder / "ready").touch()
    return python
