"""Compressed copies of a checkpoint: folders that vLLM and transformers load."""

# torch is imported where it is used, so that checking the cache does not load it.
# ruff: noqa: PLC0415

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hemostat_lab.models.checkpoint_folders import (
    RECIPE,
    REPORT,
    CompressError,
    Progress,
    build_folder,
    cache_folder,
    cache_key,
    copy_all_but_weights,
    folder_digest,
    required_versions,
    write_config,
)
from hemostat_lab.models.work_folder import WorkFolder

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from hemostat_lab.compression.frame import Method
    from hemostat_lab.models.second_moments import Progress as StepProgress

SCHEMES = ("w4a16", "int3", "w8a8", "prune10", "prune30", "prune50")
"""The schemes that need no data; they change all linear layers except the head. `w4a16` has int4 weights, symmetric,
in groups of 64 inputs, rounded to nearest. `int3` is the same with 3 bits, written dense. `w8a8` has int8 weights with
one scale per output channel, and int8 activations scaled per token at run time. `pruneNN` sets the NN % of every
layer's weights with the smallest magnitude to zero."""


@dataclass(frozen=True, slots=True)
class BuildEnvironment:
    """The environment of a run, which has no influence on its result.

    work: the folder for finished layers; None: one in the user's cache, which is removed at the end. device: torch's
    name of the device. overwrite: replace another result of this package.
    """

    work: Path | None = None
    device: str = "cpu"
    log: Progress = lambda _: None
    step: StepProgress = lambda stage, done, total: None
    overwrite: bool = False


def compress(
    source: Path,
    destination: Path,
    scheme: str,
    progress: Progress = lambda _: None,
    *,
    overwrite: bool = False,
) -> None:
    """Write a compressed copy of the transformers checkpoint `source` to `destination`, without data.

    Does nothing when `destination` already is that copy. Raises CompressError when `scheme` is unknown, when `source`
    is no checkpoint, when `destination` has other content, or when a package is missing.
    """
    if scheme not in SCHEMES:
        raise CompressError(f"scheme {scheme} is unknown: use one of {', '.join(SCHEMES)}")

    def method() -> Method:
        from hemostat_lab.compression.methods import by_name

        return by_name(scheme)

    _build(source, destination, {"scheme": scheme}, method, (), 0, BuildEnvironment(log=progress, overwrite=overwrite))


def compress_with(
    source: Path,
    destination: Path,
    method: Method,
    texts: Sequence[npt.NDArray[np.int32]] = (),
    *,
    seed: int = 0,
    environment: BuildEnvironment | None = None,
) -> dict[str, Any]:
    """As `compress`, by any method. Returns the report, which is also in the folder (`REPORT`).

    texts: token ids, for methods that need them. seed: of the tokens for which gradients are taken.
    """
    tokens = hashlib.sha256()
    for ids in texts:
        tokens.update(len(ids).to_bytes(4, "little") + ids.astype("<i4").tobytes())
    made_from = {"settings": dict(method.settings), "seed": seed}
    if method.needs_texts:
        made_from["texts"] = tokens.hexdigest()
    _build(source, destination, made_from, lambda: method, texts, seed, environment or BuildEnvironment())
    report: dict[str, Any] = json.loads((destination / REPORT).read_text(encoding="utf-8"))
    return report


def _build(
    source: Path,
    destination: Path,
    settings: Mapping[str, Any],
    method: Callable[[], Method],
    texts: Sequence[npt.NDArray[np.int32]],
    seed: int,
    environment: BuildEnvironment,
) -> None:
    if not (source / "config.json").is_file():
        raise CompressError(f"{source} is not a transformers checkpoint: it has no config.json")
    versions = required_versions("torch", "transformers", "compressed_tensors")
    made_from = {"recipe": RECIPE, **settings, "source": folder_digest(source), **versions}

    def write(folder: Path, work: WorkFolder) -> None:
        _write(source, folder, method(), settings, texts, seed, work, environment)

    build_with_work(destination, made_from, write, environment)


def build_with_work(
    destination: Path,
    made_from: dict[str, Any],
    write: Callable[[Path, WorkFolder], None],
    environment: BuildEnvironment,
) -> None:
    """Builds the folder as `build_folder` does; `write` also gets the folder of finished work. Raises CompressError if
    it cannot be written."""

    def write_folder(folder: Path) -> None:
        key = made_from | {"destination": str(destination.absolute()), "device": environment.device}
        with WorkFolder(environment.work or cache_folder() / "compress" / cache_key(key), key, "compress") as work:
            write(folder, work)
            for note in work.notes:
                environment.log(note)
            if environment.work is None:
                # Token ids can be decoded to text: they stay on disk only if the user named a folder.
                work.remove()

    try:
        build_folder(destination, made_from, write_folder, environment.log, overwrite=environment.overwrite)
    except OSError as error:
        raise CompressError(
            f"{destination} cannot be written ({error.strerror or error}); free some space or name another folder"
        ) from None


def _write(
    source: Path,
    folder: Path,
    method: Method,
    settings: Mapping[str, Any],
    texts: Sequence[npt.NDArray[np.int32]],
    seed: int,
    work: WorkFolder,
    environment: BuildEnvironment,
) -> None:
    from hemostat_lab.compression.formats import quantization_config
    from hemostat_lab.compression.frame import Run, Source, compress_layers
    from hemostat_lab.compression.tensor_files import TensorFiles
    from hemostat_lab.models.parts import Parts

    opened = Source.open(source, environment.device)
    run = Run(opened, texts if method.needs_texts else (), Parts(work), seed, environment.step)
    done = compress_layers(run, method)
    files = TensorFiles(folder)
    for name, tensor in done.tensors():
        files.add(name, tensor)
    files.close()
    copy_all_but_weights(source, folder)
    quantization = quantization_config(done.formats, opened.dense_layers(done.formats), opened.heads())
    if quantization is not None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        write_config(folder, config | {"quantization_config": quantization})
    if "scheme" not in settings:
        report = {**settings, "bytes": files.total_bytes, "layers": done.reports}
        (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
