"""A tiny pair of checkpoints for the tests of `hemostat doctor`, and its report."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hemostat.doctor import DoctorOptions, run

LINES = [
    {"prompt": "Hello, world! 1234567890"},
    {"messages": [{"role": "user", "content": "What is 2 + 2?"}]},
    {"prompt": "two spaces and a def f(x)", "max_tokens": 5},
    {"prompt": "https://example.org", "completion": " return x**2"},
    {"prompt": "tabbed: ok"},
    {"messages": [{"role": "user", "content": "And 3 + 3?"}], "completion": "6"},
    {"prompt": "Hello"},
]
CHAT_TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}<s>assistant: "


@dataclass(frozen=True)
class TinyPair:
    reference: Path
    compressed: Path
    prompts: Path
    """`LINES`"""

    def options(self, **changed: Any) -> DoctorOptions:
        small = {"tokens": 8, "batch": 2, "layer_tokens": 24, "prompts": self.prompts, "device": "cpu"} | changed
        return DoctorOptions(str(self.reference), str(self.compressed), **small)


def report_of(options: DoctorOptions, tmp_path: Path) -> dict[str, Any]:
    """The JSON report of a run that must succeed."""
    target = tmp_path / "report.json"
    assert run(replace(options, json=target)) == 0
    report: dict[str, Any] = json.loads(target.read_text())
    return report
