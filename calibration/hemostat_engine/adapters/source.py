"""Finds an adapter by its version: in the folder, else at the admin port; refuses what does not fit this engine."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

from hemostat_calibration.errors import HemostatError, InvalidProfileError
from hemostat_calibration.profiles.adapter import ADAPTER, max_rank
from hemostat_calibration.profiles.peft import peft_files
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_engine.adapters.folder import AdapterFolder
from hemostat_engine.admin_client import FetchError
from hemostat_engine.fetching import read_profile
from hemostat_engine.peers import Peers
from hemostat_engine.retries import Allowance, Retries

log = logging.getLogger("vllm.hemostat")

MISSING_SECONDS = 10.0
"""A version that does not exist or does not fit is not looked for again for this long."""
RETRY_SECONDS = 1.0
"""The same after a failure of the admin port or of the disk."""
MAX_REMEMBERED = 1024
LOOKUPS_PER_SECOND, MAX_LOOKUPS = 2.0, 16.0
"""Clients choose the names: on average at most so many fetches a second, at most so many at once."""


@dataclass(frozen=True, slots=True)
class Engine:
    """The properties of the engine that adapters are for. With None one is not known, and vLLM itself refuses what does
    not fit.

    lora: the server was started with --enable-lora. listed: the adapters that the server lists by name.
    """

    vocab_size: int | None = None
    max_rank: int | None = None
    lora: bool | None = None
    listed: Callable[[], Collection[str]] = field(default=frozenset)


class AdapterSource:
    """Finds adapters by their version. `may_look_up` runs on the server's event loop, `find` on one other thread."""

    def __init__(
        self,
        peers: Peers,
        folder: AdapterFolder,
        profile_dir: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._peers = peers
        self._folder = folder
        self._profile_dir = profile_dir
        self._clock = clock
        self._lock = threading.Lock()
        self._not_before: OrderedDict[str, float] = OrderedDict()
        self._allowance = Allowance(LOOKUPS_PER_SECOND, MAX_LOOKUPS, clock())
        self._retries = Retries()

    def may_look_up(self, version: str) -> bool:
        """Returns True if the version may be looked up; False if it was missing a moment ago, or if too many have been
        asked for."""
        now = self._clock()
        with self._lock:
            if self._not_before.get(version, now) > now:
                return False
            return self._allowance.take(now)

    def find(self, version: str, base_model: str, engine: Engine) -> Path | None:
        """Returns the folder with the adapter's files; None, with one line in the log, if there is none that fits."""
        path = self._folder.find(version, self._clock())
        if path is not None:
            return path
        self._peers.refresh(self._clock())
        try:
            data = read_profile(version, self._profile_dir, self._peers, self._retries, self._clock())
            profile = CalibrationProfile.from_bytes(data, version)
            self._check(profile, engine)
            files = peft_files(profile, base_model)
        except FetchError as error:
            self._refuse(version, error, MISSING_SECONDS if error.status == 404 else RETRY_SECONDS)
            return None
        except HemostatError as error:
            self._refuse(version, error, MISSING_SECONDS)
            return None
        try:
            return self._folder.write(version, files, engine.listed(), self._clock())
        except OSError as error:
            self._refuse(version, error, RETRY_SECONDS)
            return None

    @staticmethod
    def _check(profile: CalibrationProfile, engine: Engine) -> None:
        if profile.family != ADAPTER:
            raise InvalidProfileError(f"it is of the family {profile.family}, not an adapter")
        if engine.vocab_size is not None and profile.vocab_size != engine.vocab_size:
            raise InvalidProfileError(
                f"it is for a vocabulary of {profile.vocab_size}, this engine's is {engine.vocab_size}"
            )
        if engine.max_rank is not None and max_rank(profile) > engine.max_rank:
            raise InvalidProfileError(f"its rank is {max_rank(profile)}: start vLLM with a higher --max-lora-rank")

    def _refuse(self, version: str, error: Exception, seconds: float) -> None:
        log.warning("adapter %s is not loaded: %s", version, error)
        with self._lock:
            self._not_before[version] = self._clock() + seconds
            self._not_before.move_to_end(version)
            while len(self._not_before) > MAX_REMEMBERED:
                self._not_before.popitem(last=False)
