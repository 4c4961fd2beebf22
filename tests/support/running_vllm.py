"""The real vLLM server that tests share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.support.engine_admin import EngineAdmin


@dataclass(frozen=True, slots=True)
class RunningVllm:
    """A real server with the W4A16 checkpoint and Hemostat's logits processor, profiles from `profile_dir`.

    admin: what the processor reports to.
    """

    url: str
    model: str
    profile_dir: Path
    log: Path
    admin: EngineAdmin
