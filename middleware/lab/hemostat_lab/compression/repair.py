"""Repair of a compressed checkpoint without overhead: the weights of its norms, its biases, and the weights that
pruning left of its linear layers are trained.

A quantized layer's error is not undone, but scaling the channels that it reads reduces its effect. Weights that pruning
left change by a product of low rank (PERP, arXiv 2312.15230), which takes less memory than training each of them, and
left a smaller divergence where both were measured (docs/lab/notes.md). Trained towards the reference's predictions
(`models.training`); the checkpoint that is written differs from COMPRESSED in the values of these tensors alone: every
other byte of its files is the same, so that it is served as before, by the same kernels.
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

from hemostat.checkpoints.texts import Text
from hemostat_lab.compression.checkpoint_writer import BuildEnvironment, build_with_work
from hemostat_lab.models.checkpoint import Checkpoint
from hemostat_lab.models.checkpoint_folders import (
    MANIFEST,
    RECIPE,
    REPAIR,
    REPORT,
    CompressError,
    folder_digest,
    required_versions,
)
from hemostat_lab.models.copies import Copy
from hemostat_lab.models.parts import Parts, json_tensor, json_value
from hemostat_lab.models.second_moments import Progress
from hemostat_lab.models.training import STEP_POSITIONS, TRIAL, Tensors, Trained, train
from hemostat_lab.models.work_folder import WorkFolder

RATES = (1e-3, 3e-4)
"""The learning rates of Adam: the first step changes a pruned layer's weights by about so much of their root mean
square."""
RANK = 16
"""The rank of the change of a pruned layer."""
PRUNED = 0.05
"""Least part of zeros of a layer that is pruned."""
_VECTOR_STEP = 10.0
"""A vector changes so many times as fast, relative to its size."""
_FACTOR_SIZE = 0.05
"""The standard deviation of the entries of the first factor at the start; the second factor is zero."""
_RUN, _RUNS, _DISTINCT = 16, 4096, 15.0
"""The test that tells pruned weights from weights rounded to a few bits. It takes the first 4,096 runs of 16 weights
in turn that are not zero; a pruned weight has at least 15.0 distinct magnitudes in a run, on average. Normal weights
have 15.5 if they were rounded to bfloat16 alone, and at most 14.8 if they were rounded to 8 or fewer bits in groups."""
_PART = "repaired"
_REPORT_KEY = "report"
"""The name of the report among the tensors of the part."""
_LEAST_SIZE = 0.01
"""The smallest root mean square that steps are relative to, for tensors of zeros such as a new bias."""
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The dtypes that vectors can have, by their names in safetensors."""
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
    """Writes a repaired copy of `compressed` to `destination`; the same bytes if the repair does not improve the fold.

    Returns the report, which is also in the folder (`REPORT`), next to the report of the compression. Does nothing if
    `destination` already is that copy. Raises HemostatError.
    """
    environment = environment or BuildEnvironment()
    tokens = hashlib.sha256()
    for text in texts:
        tokens.update(json.dumps([text.prompt.tolist(), text.output.tolist()]).encode())
    made_from = {
        "recipe": RECIPE,
        "settings": {"scheme": REPAIR, "rates": list(RATES), "trial": TRIAL, "rank": RANK, "pruned": PRUNED},
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
    """Train what is `Repairable` of COMPRESSED on `texts`, some of which decide whether it helped. Kept in `parts` when
    it is done.

    Both models are loaded whole, with dense weights. AdaptError, CompressError, WorkFolderError.
    """
    kept = parts.get(_PART)
    if kept is not None:
        tensors = {name: tensor for name, tensor in kept.items() if name != _REPORT_KEY}
        return Repaired(tensors, json_value(kept[_REPORT_KEY]))
    whole, small = (
        Copy.load(folder, device, label=label) for folder, label in ((reference, "SOURCE"), (compressed, "COMPRESSED"))
    )
    repairable = Repairable(small, pruned_weights(small, Checkpoint(compressed, "COMPRESSED")), seed)
    result = train(
        whole,
        small,
        repairable,
        texts,
        seed=seed,
        rates=rates,
        step_positions=step_positions,
        progress=lambda stage, done, total: progress(REPAIR, done, total),
    )
    del whole  # before the weights are there twice
    tensors = {} if result.tensors is None else repairable.stored(result.tensors)
    repaired = Repaired(tensors, _report(result, repairable))
    parts.put(_PART, {**repaired.tensors, _REPORT_KEY: json_tensor(repaired.report)})
    return repaired


class Repairable:
    """The parts of the compressed model that are trained, by name. Vectors are the weights of its norms and its
    biases: all parameters with one dimension. Factors of the change of pruned weights are `name|a` [rank, inputs] and
    `name|b` [outputs, rank].

    Relative changes are trained, so that a step of Adam changes small tensors little. A vector is its start + change ·
    `_VECTOR_STEP` · rms, the root mean square of its start. Weights W that are not zero become W + b a · rms /
    (`_FACTOR_SIZE` · √`RANK`), with the rms of the weights that are not zero.

    numbers: how many are trained. working_bytes: see `training.Trainable`.
    """

    def __init__(self, copy: Copy, pruned: Sequence[str] = (), seed: int = 0) -> None:
        """pruned: names of weights whose zeros stay, of `pruned_weights`. CompressError where nothing is trained."""
        self._copy = copy
        self._seed = seed
        parameter = copy.model.get_parameter
        vectors = [name for name in copy.skeleton.places if parameter(name).ndim == 1]
        if not vectors and not pruned:
            raise CompressError(
                "--repair: COMPRESSED has no norms with weights, no biases and no pruned weights: nothing to train"
            )
        self._start = {name: parameter(name).detach() for name in (*vectors, *pruned)}
        self._mask = {name: self._start[name] != 0 for name in pruned}
        self._unit = {name: _VECTOR_STEP * max(_rms(self._start[name]), _LEAST_SIZE) for name in vectors}
        for name, mask in self._mask.items():
            self._unit[name] = _rms(self._start[name][mask]) / (_FACTOR_SIZE * RANK**0.5)
        self.numbers = sum(self._start[name].numel() for name in vectors)
        self.numbers += sum(RANK * sum(mask.shape) for mask in self._mask.values())
        # A mask, what the weights are changed to, and their gradients.
        self.working_bytes = sum(
            mask.numel() * (mask.element_size() + 2 * self._start[name].element_size())
            for name, mask in self._mask.items()
        )

    def start(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(self._seed)
        result = {}
        for name, tensor in self._start.items():
            if name in self._mask:
                outputs, inputs = tensor.shape
                a = torch.randn(RANK, inputs, generator=generator) * _FACTOR_SIZE
                result[f"{name}|a"] = a.to(tensor.device)
                result[f"{name}|b"] = torch.zeros(outputs, RANK, device=tensor.device)
            else:
                result[name] = torch.zeros_like(tensor, dtype=torch.float32)
        return result

    @contextmanager
    def applied(self, tensors: Tensors) -> Iterator[None]:
        values = self._values(tensors)
        # Leaves: the final norm is passed through backwards several times, once for each part of the logits.
        leaves = {name: value.detach().requires_grad_(value.requires_grad) for name, value in values.items()}
        try:
            for name, leaf in leaves.items():
                self._put(name, leaf)
            yield
            for name, leaf in leaves.items():
                if leaf.grad is not None:
                    values[name].backward(leaf.grad)
                    leaf.grad = None
        finally:
            for name in leaves:
                self._put(name, torch.nn.Parameter(self._start[name], requires_grad=False))

    @contextmanager
    def served(self, tensors: Tensors | None) -> Iterator[None]:
        with self.applied(tensors or {}):
            yield

    def stored(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        """The parameters in the model's dtype."""
        with torch.no_grad():
            return {name: value.cpu() for name, value in self._values(tensors).items()}

    def _values(self, tensors: Tensors) -> dict[str, torch.Tensor]:
        return {name: self._value(name, tensors) for name in self._start} if tensors else {}

    def _value(self, name: str, tensors: Tensors) -> torch.Tensor:
        start = self._start[name]
        mask = self._mask.get(name)
        change = tensors[name] if mask is None else (tensors[f"{name}|b"] @ tensors[f"{name}|a"]) * mask
        return (start.float() + change * self._unit[name]).to(start.dtype)

    def _put(self, name: str, tensor: torch.Tensor) -> None:
        for module, key in self._copy.skeleton.places[name]:
            module._parameters[key] = tensor


def pruned_weights(copy: Copy, checkpoint: Checkpoint) -> list[str]:
    """Names of the weights of linear layers that are stored as they are, and of which `PRUNED` or more, not all, are
    zero. Those that were rounded to a few bits have zeros, too: they stay on their grid."""
    names = [f"{name}.weight" for name in copy.linears if not checkpoint.is_quantized(name)]
    known = [name for name in names if name in checkpoint.names and name in copy.skeleton.places]
    return [name for name in known if _is_pruned(copy.model.get_parameter(name))]


def _is_pruned(weight: torch.Tensor) -> bool:
    left = weight[weight != 0].abs()
    if not 0 < len(left) <= (1.0 - PRUNED) * weight.numel():
        return False
    runs = left[: len(left) // _RUN * _RUN].reshape(-1, _RUN)[:_RUNS].sort(-1).values
    return not len(runs) or 1.0 + float((runs.diff(dim=-1) != 0).float().sum(-1).mean()) >= _DISTINCT


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
    """Replaces values in a file in the safetensors format, whose header states the place of each tensor. Raises
    CompressError if a tensor's dtype or shape does not fit."""
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


def _report(result: Trained, repairable: Repairable) -> dict[str, Any]:
    won_back = 1.0 - result.kl / result.kl_start if result.kl_start > 0.0 else None
    return result.report() | {"won_back": won_back, "numbers": repairable.numbers}


def _rms(tensor: torch.Tensor) -> float:
    return float(tensor.float().square().mean().sqrt())
