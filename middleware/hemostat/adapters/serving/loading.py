"""Loads adapters at one engine, and unloads them. Hemostat's general plugin fetches them from the admin port, or the
engine reads them from a shared folder, which has one subfolder for each version.

A version's subfolder is complete or absent: it is written under another name and renamed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

from hemostat.adapters.serving.probing import Prober
from hemostat.adapters.serving.server import load, touch, unload
from hemostat.adapters.serving.setting import Way, explain
from hemostat.metrics import names
from hemostat.metrics.samples import Sample
from hemostat.reference.protocol import ReferenceFailure
from hemostat.reference.server import Refused, VllmServer
from hemostat_calibration.profiles.adapter import max_rank
from hemostat_calibration.profiles.peft import peft_files
from hemostat_calibration.profiles.profile import VERSION_PATTERN, CalibrationProfile

log = logging.getLogger("hemostat.adapters")

MAX_VERSIONS = 8
"""Subfolders that stay; the oldest that are not in use are removed."""
PROMPT_TOKENS = 8
"""The number of tokens of a request that has the engine load an adapter."""
LOADED, REFUSED, FAILED = "loaded", "refused", "failed"
_TEMPORARY = ".hemostat-"


class SharedFolder:
    """The folder from which engines without Hemostat's general plugin load adapters. One writes to it at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._writing = asyncio.Lock()

    async def write(self, version: str, files: Mapping[str, bytes], in_use: Collection[str]) -> Path:
        """Writes a version's files, removes what is too old, and returns the version's subfolder. Raises OSError."""
        async with self._writing:
            await asyncio.to_thread(write, self.path, version, files, in_use)
        return self.path / version


class Loader:
    """Owns the way in which adapters get to one engine, and how often they were loaded.

    folder: None where `adapter.folder` is not set. with_plugin: returns True if the engine reports its adapters, so
    that it has Hemostat's general plugin.
    """

    def __init__(self, folder: SharedFolder | None, with_plugin: Callable[[], bool]) -> None:
        self._folder = folder
        self._with_plugin = with_plugin
        self.way: Way | None = None
        """The way that the engine has taken an adapter; None before it has."""
        self._loads: Counter[str] = Counter()

    def begin_anew(self) -> None:
        """Forgets the way: the server was started again."""
        self.way = None

    async def load(
        self,
        server: VllmServer,
        prober: Prober,
        profile: CalibrationProfile,
        base: str,
        in_use: Collection[str],
    ) -> str:
        """Loads an adapter of the base model. Returns why it could not be loaded, with the fix; "" if it was.

        in_use: the versions whose subfolders stay.
        """
        try:
            prompts = await prober.prompts(base)
            await self._load(server, profile, base, prompts[0][:PROMPT_TOKENS], in_use)
        except (ReferenceFailure, OSError) as failure:
            self._loads[REFUSED if isinstance(failure, Refused) else FAILED] += 1
            return explain(failure, max_rank(profile), self.way, None if self._folder is None else self._folder.path)
        self._loads[LOADED] += 1
        log.info("adapter %s is loaded", profile.version)
        return ""

    async def _load(
        self,
        server: VllmServer,
        profile: CalibrationProfile,
        base: str,
        prompt: Sequence[int],
        in_use: Collection[str],
    ) -> None:
        version = profile.version
        if self.way is not Way.FOLDER:
            try:
                await touch(server, version, prompt)
            except Refused as refused:
                if refused.status != 404 or self._folder is None or self.way is Way.RESOLVER or self._with_plugin():
                    raise
            else:
                self.way = Way.RESOLVER
                return
        if self._folder is None:
            raise OSError("it is not set")
        path = await self._folder.write(version, peft_files(profile, base), in_use)
        try:
            await load(server, version, str(path))
        except Refused as refused:
            if "already been loaded" not in refused.detail:
                raise
        self.way = Way.FOLDER

    async def unload(self, server: VllmServer, version: str) -> bool:
        """Unloads an adapter. Returns False if the server still has it."""
        try:
            await unload(server, version)
        except ReferenceFailure as failure:
            if not (isinstance(failure, Refused) and failure.status == 404):
                log.warning("adapter %s could not be unloaded: %s", version, failure)
                return False
        log.info("adapter %s is unloaded", version)
        return True

    def samples(self) -> Iterator[Sample]:
        for result in (LOADED, REFUSED, FAILED):
            yield Sample(names.ADAPTER_LOADS, (result,), self._loads[result])


def write(folder: Path, version: str, files: Mapping[str, bytes], in_use: Collection[str]) -> None:
    """Writes a version's files, and removes what is too old. Raises OSError."""
    target, made = folder / version, folder / f"{_TEMPORARY}{version}"
    if not _has(target, files):
        for path in (made, target):  # what an earlier process left half-written, or another one changed
            if path.exists():
                shutil.rmtree(path)
        made.mkdir(parents=True)
        made.chmod(0o755)  # vLLM may run as another user
        for name, data in files.items():
            with (made / name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        made.rename(target)
    _remove_old(folder, {version, *in_use}, set(files))


def _has(target: Path, files: Mapping[str, bytes]) -> bool:
    try:
        return all((target / name).read_bytes() == data for name, data in files.items())
    except OSError:
        return False


def _remove_old(folder: Path, keep: Collection[str], names: set[str]) -> None:
    """names: the files of a version; a subfolder that holds others was not written here and stays."""
    with contextlib.suppress(OSError):  # another middleware may remove the same ones
        result = [path for path in folder.iterdir() if VERSION_PATTERN.fullmatch(path.name)]
        result.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        for path in result[MAX_VERSIONS:]:
            if path.name not in keep and {file.name for file in path.iterdir()} <= names:
                shutil.rmtree(path, ignore_errors=True)
