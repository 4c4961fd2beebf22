"""The general plugin: adapters of Hemostat's in vLLM. It does nothing unless HEMOSTAT_ADAPTERS is 1."""

from __future__ import annotations

import os

ENABLED = "HEMOSTAT_ADAPTERS"
"""Environment variable: 1 enables the plugin."""


def register() -> None:
    """The entry point; vLLM calls it in every process, possibly several times."""
    if os.environ.get(ENABLED) != "1":
        return
