"""Repair of a compressed checkpoint without overhead: the weights of its norms, and its biases, are trained.

A linear layer's error is not undone, but scaling the channels that it reads reduces its effect. Trained towards the
reference's predictions (`models.training`); the checkpoint that is written differs from COMPRESSED in the values of
these tensors alone: every other byte of its files is the same, so that it is served as before, by the same kernels.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hemostat.compression.checkpoint_writer import BuildEnvironment, build_with_work
from hemostat.compression.other_files import REPAIR, REPORT
from hemostat.models.checkpoint_folders import (
    MANIFEST,
    RECIPE,
    CompressError,
    folder_digest,
    required_versions,
)
from hemostat.models.copies import Copy
from hemostat.models.parts import Parts, json_tensor, json_value
from hemostat.models.second_moments import Progress
from hemostat.models.texts import Text
from hemostat.models.training import STEP_POSITIONS, TRIAL, Tensors, Trained, train
from hemostat.models.work_folder import WorkFolder

RATES = (1e-2, 3e-3)
"""Of Adam, relative to the size of a tensor's entries: weights of norms are about 1, and some about 0.1."""
_PART = "repaired"
_REPORT_KEY = "report"
"""Beside the tensors of the part."""
_LEAST_SIZE = 0.01
"""That of a tensor of zeros, such as a new bias, for steps."""
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Of safetensors, that vectors can have."""
_HEADER_LENGTH = 8
"""Bytes before the header of a safetensors file: its length, little-endian."""


@dataclass(frozen=True, slots=True)
class Repaired:
    """tensors: what replaces COMPRESSED's, by name, in the dtype of its files; nothing where the fold did not improve.
    report: for JSON."""

    tensors: Mapping[str, torch.Tensor]
    report: Mapping[str, Any]


def write_repaired_copy(
    reference: Path,
    compressed: Path,
    destination: Path,
    texts: Sequence[Text],
    *,
    seed: int = 0,
    environment: BuildEnvironment | None = None,
) -> dict[str, Any]:
    """Write a repaired copy of `compressed` to `destination`; the same bytes where it does not improve the fold.

    Returns the report, which is also in the folder (`REPORT`), beside that of the compression. Does nothing when
    `destination` already is that copy. Raises HemostatError.
    """
    environment = environment or BuildEnvironment()
    tokens = hashlib.sha256()
    for text in texts:
        tokens.update(json.dumps([text.prompt.tolist(), text.output.tolist()]).encode())
    made_from = {
        "recipe": RECIPE,
        "settings": {"scheme": REPAIR, "rates": list(RATES), "trial": TRIAL},
        "seed": seed,
        "texts": tokens.hexdigest(),
        "source": folder_digest(reference),
        "compressed": folder_digest(compressed),
        **required_versions("torch", "transformers", "compressed_tensors"),
    }

    def write(folder: Path, work: WorkFolder) -> None:
        result = repair(
            reference, compressed, texts, Parts(work), device=environment.device, seed=seed, progress=environment.step
        )
        write_repaired(compressed, folder, result.tensors)
        earlier = folder / REPORT
        report = json.loads(earlier.read_text(encoding="utf-8")) if earlier.is_file() else {}
        earlier.write_text(json.dumps(report | {REPAIR: result.report}, indent=1) + "\n", encoding="utf-8")

    build_with_work(destination, made_from, write, environment)
    written: dict[str, Any] = json.loads((destination / REPORT).read_text(encoding="utf-8"))[REPAIR]
    return written


def repair(
    reference: Path,
    compressed: Path,
    texts: Sequence[Text],
    parts: Parts,
    *,
    device: str = "cpu",
    seed: int = 0,
    rates: Sequence[float] = RATES,
    step_positions: int = STEP_POSITIONS,
    progress: Progress = lambda stage, done, total: None,
) -> Repaired:
    """Train COMPRESSED's vectors on `texts`, some of which decide whether it helped. Kept in `parts` when it is done.

    Both models are loaded whole, with dense weights. AdaptError, WorkFolderError.
    """
    kept = parts.get(_PART)
    if kept is not None:
        tensors = {name: tensor for name, tensor in kept.items() if name != _REPORT_KEY}
        return Repaired(tensors, json_value(kept[_REPORT_KEY]))
    whole, small = (
        Copy.load(folder, device, label=label) for folder, label in ((reference, "SOURCE"), (compressed, "COMPRESSED"))
    )
    vectors = Vectors(small)
    result = train(
        whole,
        small,
        vectors,
        texts,
        seed=seed,
        rates=rates,
        step_positions=step_positions,
        progress=lambda stage, done, total: progress(REPAIR, done, total),
    )
    repaired = Repaired({} if result.tensors is None else vectors.stored(result.tensors), _report(result, vectors))
    parts.put(_PART, {**repaired.tensors, _REPORT_KEY: json_tensor(repaired.report)})
    return repaired


class Vectors:
    """The weights of a model's norms and its biases: all parameters with one dimension.

    Trained is the relative change: a tensor is its start + the trained one · the root mean square of the start, so that
    a step of Adam changes small tensors little.
    """

    def __init__(self, copy: Copy) -> None:
        self._copy = copy
        self._start = {
            name: copy.model.get_parameter(name).detach()
            for name in copy.skeleton.places
            if copy.model.get_parameter(name).ndim == 1
        }
        if not self._start:
            raise CompressError("--repair: COMPRESSED has no norms with weights and no biases: nothing to train")
        self._size = {name: max(_rms(tensor), _LEAST_SIZE) for name, tensor in self._start.items()}
        self.numbers = sum(tensor.numel() for tensor in self._start.values())

    def start(self) -> dict[str, torch.Tensor]:
        return {name: torch.zeros_like(tensor, dtype=torch.float32) for name, tensor in self._start.items()}

    @contextmanager
    def applied(self, tensors: Tensors) -> Iterator[None]:
        values = {name: self._value(name, change) for name, change in tensors.items()}
        # Leaves: the final norm is passed through backwards several times, once for each part of the logits.
        leaves = {name: value.detach().requires_grad_(value.requires_grad) for name, value in values.items()}
        try:
            for name, leaf in leaves.items():
                self._put(name, leaf)
            yield
            for name, leaf in leaves.items():
                if leaf.grad is not None:
                    values[name].backward(leaf.grad)
        finally:
            for name in leaves:
                self._put(name, torch.nn.Parameter(self._start[name], requires_grad=False))

    @contextmanager
    def served(self, tensors: Tensors | None) -> Iterator[None]:
        with self.applied(tensors or {}):
            yield

    def stored(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        """The tensors in the model's dtype."""
        return {name: self._value(name, tensor.detach()).cpu() for name, tensor in tensors.items()}

    def _value(self, name: str, change: torch.Tensor) -> torch.Tensor:
        start = self._start[name]
        return (start.float() + change * self._size[name]).to(start.dtype)

    def _put(self, name: str, tensor: torch.Tensor) -> None:
        for module, key in self._copy.skeleton.places[name]:
            module._parameters[key] = tensor


def write_repaired(compressed: Path, folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy the files of a checkpoint to `folder`, an empty one, with the values of `tensors` replaced.

    CompressError where a tensor has another shape than the stored one; what is stored keeps its dtype.
    """
    for path in sorted(compressed.iterdir()):
        if path.is_file() and path.name != MANIFEST:
            shutil.copyfile(path, folder / path.name)
            if path.suffix == ".safetensors":
                _replace_values(folder / path.name, tensors)


def _replace_values(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Of a file in the safetensors format: its header tells where each tensor is."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(_HEADER_LENGTH), "little")
        header = json.loads(file.read(length))
        for name in tensors.keys() & header.keys():
            entry = header[name]
            dtype = DTYPES.get(entry["dtype"])
            if dtype is None or list(tensors[name].shape) != entry["shape"]:
                raise CompressError(
                    f"{path.name}: {name} is {entry['dtype']} {entry['shape']}, the repaired one has the shape "
                    f"{list(tensors[name].shape)}: not replaced"
                )
            first, end = entry["data_offsets"]
            data = tensors[name].to(dtype).contiguous().view(torch.uint8).numpy().tobytes()
            assert len(data) == end - first, name
            file.seek(_HEADER_LENGTH + length + first)
            file.write(data)


def _report(trained: Trained, vectors: Vectors) -> dict[str, Any]:
    won_back = 1.0 - trained.kl / trained.kl_start if trained.kl_start > 0.0 else None
    return trained.report() | {"won_back": won_back, "numbers": vectors.numbers}


def _rms(tensor: torch.Tensor) -> float:
    return float(tensor.float().square().mean().sqrt())
