"""The two checkpoints' folders on this machine: what an adapter is made of, and what the copies are loaded from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from hemostat.config.schema import Adapter
from hemostat_calibration.errors import HemostatError


class FolderError(HemostatError):
    """A checkpoint is not on this machine; the text is one line that names the setting."""


@dataclass(frozen=True, slots=True)
class CheckpointFolders:
    reference: Path
    compressed: Path


def find_folders(
    settings: Adapter, reference_model: str | None, reference_folder: Path | None, root: str
) -> CheckpointFolders:
    """Returns the folders of both checkpoints. FolderError.

    reference_model: `reference.model`. reference_folder: the folder that a reference in process was loaded from, or
    that `reference.folder` names. root: the path that the upstream names for the compressed model; "" where it names
    none.
    """
    reference = find_reference(reference_model, reference_folder)
    compressed = find_compressed(settings, root)
    if reference.resolve() == compressed.resolve():
        raise FolderError(f"adapter.compressed: {compressed} is also the reference's checkpoint")
    return CheckpointFolders(reference.absolute(), compressed.absolute())


def find_reference(model: str | None, folder: Path | None) -> Path:
    """See `find_folders`."""
    named = Path(model) if model and Path(model).is_dir() else None
    reference = folder or named
    if reference is None:
        raise FolderError("reference.folder: name the folder of the uncompressed model's checkpoint on this machine")
    _check("reference.model" if reference == named else "reference.folder", reference)
    return reference


def find_compressed(settings: Adapter, root: str) -> Path:
    """See `find_folders`."""
    compressed = settings.compressed
    if compressed is None:
        if not root or not Path(root).is_dir():
            said = f"the upstream loaded it from {root}, which is no folder here" if root else "the upstream names none"
            raise FolderError(f"adapter.compressed: name the folder of the compressed model's checkpoint; {said}")
        compressed = Path(root)
    _check("adapter.compressed", compressed)
    return compressed


def _check(setting: str, folder: Path) -> None:
    try:
        if not folder.is_dir():
            raise FolderError(f"{setting}: {folder} is not a folder on this machine")
        if not any(folder.glob("*.safetensors")):
            raise FolderError(f"{setting}: {folder} holds no .safetensors file; give a checkpoint in that format")
        json.loads((folder / "config.json").read_bytes())
    except OSError as error:
        raise FolderError(f"{setting}: {error.filename or folder} cannot be read ({error.strerror})") from None
    except ValueError:
        raise FolderError(f"{setting}: {folder / 'config.json'} is not JSON") from None
