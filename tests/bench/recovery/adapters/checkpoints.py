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
        _quantize(scheme, reference, folder, calibration[: CALIBRATION_TEXTS[scheme]])
    return Pair(scheme, reference, folder)


def _quantize(method: str, reference: Path, folder: Path, texts: Sequence[Written]) -> None:
    partial = folder.with_name(folder.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    ids = [[int(i) for i in (*text.prompt, *text.output)] for text in texts]
    (partial / "texts.json").write_text(json.dumps(ids), encoding="utf-8")
    say(f"{method}: quantizing with llmcompressor, {len(ids)} texts")
    python = _environment(folder.parent / "llmcompressor")
    with (folder.parent / f"{method}.log").open("wb") as log:
        subprocess.run(
            [python, SCRIPT, method, reference, partial, partial / "texts.json"], check=True, stdout=log, stderr=log
        )
    (partial / "texts.json").unlink()
    partial.rename(folder)


def _environment(folder: Path) -> Path:
    """The interpreter of an environment that has llmcompressor; made on first use."""
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        say(f"installing {LLMCOMPRESSOR} in {folder}")
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", LLMCOMPRESSOR], check=True)
        (folder / "ready").touch()
    return python
