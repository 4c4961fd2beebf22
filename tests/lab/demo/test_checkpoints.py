"""The demo's reference, which is made of a GGUF file."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest

from hemostat_lab.demo.checkpoints import reference_checkpoint


def test_the_gguf_file_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = []

    class Reader(gguf.GGUFReader):  # type: ignore[misc]
        def __init__(self, path: str) -> None:
            parsed.append(path)
            super().__init__(path)

    monkeypatch.setattr(gguf, "GGUFReader", Reader)
    reference_checkpoint(tmp_path / "reference")
    assert len(parsed) == 1
    assert (tmp_path / "reference" / "model.safetensors").is_file()
    assert gguf.GGUFReader is Reader, "as before"
