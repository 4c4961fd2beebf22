"""Finds the checkpoint of a server's model on this machine: its folder, or a hub cache that has it."""

from __future__ import annotations

import os
from pathlib import Path

from hemostat.checkpoints.output_embedding import EmbeddingError


def find_checkpoint(folder: Path | None, root: str) -> Path:
    """Returns the folder with config.json. Raises EmbeddingError, whose text is one line.

    folder: `reference.folder`, which names the checkpoint's folder, the folder of the model in a hub cache
    (models--ORG--NAME), or the cache. If it is None, `root` is looked at. root: what the server has loaded the model
    from, a path or a hub name.
    """
    if folder is None:
        if root and os.path.isdir(root):
            return Path(root)
        shown = root or "an unnamed path"
        raise EmbeddingError(
            f"{shown}, which the server's model was loaded from, is no folder on this machine: name the folder of its "
            "checkpoint (config.json, *.safetensors), or a hub cache that has it, in reference.folder"
        )
    for place in (folder, folder / f"models--{root.replace('/', '--')}"):
        if (place / "config.json").is_file():
            return place
        try:
            snapshot = place / "snapshots" / (place / "refs" / "main").read_text(encoding="utf-8").strip()
        except (OSError, ValueError):
            continue
        if (snapshot / "config.json").is_file():
            return snapshot
    what = "is no folder" if not os.path.isdir(folder) else "has no config.json, nor is it a hub cache that has"
    raise EmbeddingError(f"reference.folder: {folder} {what} {'' if what == 'is no folder' else root}".rstrip())


def identity(folder: Path) -> str:
    """Returns a text that changes with the files' names, sizes and times, so that it shows if they have to be read
    again."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return "\n".join(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files)
