"""The folder of a running instance: the sockets that its processes, and a successor, connect to."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The folder of an instance. temporary: it is deleted at the end, by the last instance that uses it."""

    path: Path
    temporary: bool

    @classmethod
    def make(cls, run_dir: Path | None, inherited: dict[str, Any] | None = None) -> RunFolder:
        """Returns the folder of this instance. run_dir: the setting. inherited: `describe()` of a predecessor."""
        if run_dir is not None:
            return cls(run_dir.resolve(), temporary=False)
        if inherited is not None and inherited["temporary"]:
            return cls(Path(inherited["path"]), temporary=True)
        return cls(Path(tempfile.mkdtemp(prefix="hemostat-")), temporary=True)

    def describe(self) -> dict[str, Any]:
        return {"path": str(self.path), "temporary": self.temporary}

    @property
    def control_socket(self) -> Path:
        """The path of the control process's socket: relays of a predecessor reconnect to the new control process, where
        both speak the same protocol."""
        return self.path / "control.sock"

    @property
    def control_lock(self) -> Path:
        """The path of a file that the control process locks while it lives."""
        return self.path / "control.lock"

    def remove(self) -> None:
        if self.temporary:
            shutil.rmtree(self.path, ignore_errors=True)
        else:
            self.control_socket.unlink(missing_ok=True)
