"""The keys of what is stored: each belongs to one owner."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import hemostat

DECLARED = re.compile(r'^(?!EARLIER_)\w+ = (StateKey|BlobKey)\("([^"]+)"\)$', re.MULTILINE)
"""The keys of earlier versions, which are only read, may have a new owner meanwhile."""


def test_each_key_is_declared_once() -> None:
    files = Path(hemostat.__path__[0]).rglob("*.py")
    declared = Counter(found for file in files for found in DECLARED.findall(file.read_text()))
    assert {kind for kind, _ in declared} == {"StateKey", "BlobKey"}
    assert [key for key, count in declared.items() if count > 1] == []
