"""What is asked of the doctor, and what it cannot do."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hemostat_calibration.errors import HemostatError

Decoding = Literal["sampled", "greedy", "given"]
"""Whose text is scored: the compressed model's own, drawn at temperature 1 or greedily, or the prompt file's."""


class DoctorError(HemostatError):
    """The report cannot be made; one line that says what to change."""


@dataclass(frozen=True, slots=True)
class DoctorOptions:
    """`reference`, `compressed`: both a folder or hub name for transformers, or both `URL[#SERVED-NAME]` of a vLLM."""

    reference: str
    compressed: str
    prompts: Path | None = None
    """None: those that Hemostat brings."""
    decoding: Decoding = "sampled"
    tokens: int = 64
    """The most that is generated for a prompt; a line's own max_tokens may lower it."""
    max_prompts: int | None = None
    seed: int = 0
    batch: int = 16
    """Prompts that are generated for at once; also the unit that an interruption can lose."""
    device: str = "auto"
    dtype: str = "auto"
    top_k: int = 20
    """vLLM servers only: ids asked for a position."""
    layer_tokens: int = 512
    """Tokens that every layer is restored on; 0 leaves the layers out."""
    worst: int = 10
    work: Path | None = None
    json: Path | None = None
    html: Path | None = None
    show_text: bool = False

    @property
    def servers(self) -> bool:
        return is_url(self.reference)


def is_url(model: str) -> bool:
    return model.startswith(("http://", "https://"))


def check(options: DoctorOptions) -> None:
    """What can be refused before anything is loaded. Raises DoctorError."""
    if is_url(options.reference) != is_url(options.compressed):
        raise DoctorError(
            "REFERENCE and COMPRESSED must be of one kind: two folders or hub names, or two URLs of vLLM servers"
        )
    if not options.servers:
        for name, model in (("REFERENCE", options.reference), ("COMPRESSED", options.compressed)):
            folder = Path(model)
            if folder.is_dir() and not (folder / "config.json").is_file():
                raise DoctorError(f"{name}: {model} is not a transformers checkpoint: it has no config.json")
            if not folder.is_dir() and (folder.is_absolute() or model.count("/") > 1 or model.startswith(".")):
                raise DoctorError(f"{name}: there is no folder {model}")
    for flag, file in (("--json", options.json), ("--html", options.html)):
        if file is None:
            continue
        if file.is_dir() or not os.access(file.parent, os.W_OK):
            raise DoctorError(f"{flag}: {file} cannot be written; name a file in a folder that exists")
