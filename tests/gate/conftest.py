"""Prompts, and the gate as a command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from string import ascii_letters

import numpy as np
import pytest

from hemostat.cli import main


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Texts that have nothing in common, so that none is a variant of another."""
    path = tmp_path / "prompts.txt"
    random = np.random.default_rng(7)
    lines = ["".join(random.choice(list(ascii_letters), 30)) for _ in range(120)]
    path.write_text("".join(json.dumps({"prompt": line, "max_tokens": 4}) + "\n" for line in lines))
    return path


@pytest.fixture
def gate(prompts: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Asks a gate; returns the exit code and what was printed."""

    def ask(stable: str, candidate: str, *more: str) -> tuple[int, str]:
        expect = () if "--expect" in more else ("--expect", "same", "--margin", "0.05")
        code = main(["gate", "--stable", stable, "--candidate", candidate, "--prompts", str(prompts), *expect, *more])
        captured = capsys.readouterr()
        return code, captured.out or captured.err

    return ask
