"""The folder of this machine for what outlasts a process and has no place of its own in the settings."""

from __future__ import annotations

import os
from pathlib import Path


def state_folder() -> Path:
    """Returns `$XDG_STATE_HOME/hemostat`, by default below `~/.local/state`.

    Raises RuntimeError for a user without a home folder.
    """
    state = os.environ.get("XDG_STATE_HOME") or Path("~/.local/state").expanduser()
    return Path(state) / "hemostat"
