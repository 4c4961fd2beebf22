"""The files of a checkpoint other than its weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from hemostat_lab.models.checkpoint_folders import MANIFEST

REPORT = "hemostat-compression.json"
"""The name of the file that states how a checkpoint was compressed, and the figures of each layer."""
REPAIR = "repair"
"""The key in it of how it was repaired."""


def copy_all_but_weights(source: Path, folder: Path) -> None:
    """Tokenizer, chat template, settings."""
    for path in source.iterdir():
        if path.is_file() and path.name not in (MANIFEST, REPORT) and not _is_weights(path.name):
            shutil.copyfile(path, folder / path.name)


def write_config(folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".pt", ".pth", ".gguf", ".safetensors.index.json", ".bin.index.json"))
