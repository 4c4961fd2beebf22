"""The judge: `python -m hemostat_lab.adapters.judge_process PARENT_PID`. It holds a copy of the compressed checkpoint.

With it, it computes what the engine serves, with and without adapters, over the full vocabulary.

The reference's distribution is computed from its hidden states, where the records bring them, with its output
embedding; else a copy of the reference is loaded, too.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hemostat.adapters.live import judge_messages
from hemostat.checkpoints.output_embedding import load as load_embedding
from hemostat.config.packages import install_command
from hemostat.ipc import child_process as child
from hemostat_calibration.arrays import Floats, Ids
from hemostat_calibration.errors import HemostatError
from hemostat_calibration.profiles.adapter import adapter_layers
from hemostat_calibration.profiles.profile import IDENTITY, CalibrationProfile
from hemostat_calibration.profiles.transform import anchors, code, relative_logits

NICENESS = 12
"""Lower priority than the reference, which every record waits for; higher than what only learns."""
CHUNK_ELEMENTS = 1 << 23
"""Entries of one array of logits (32 MiB in float32): positions are taken in chunks of this size."""
MAX_HELD = 16
"""Profiles; the control process evicts earlier."""

Logits = npt.NDArray[np.float32]
Rows = Callable[[slice], Logits]
"""Logits [rows, V] of some positions."""


@dataclass(frozen=True, slots=True)
class Held:
    """The effect of a profile. layers: the layers of an adapter, else None. logits: the profile of another family,
    else None."""

    layers: Any = None
    logits: CalibrationProfile | None = None


def held(profile: CalibrationProfile) -> Held:
    if profile.changes_weights:
        return Held(layers=adapter_layers(profile))
    return Held(logits=profile)


def shift(profile: CalibrationProfile, logits: Logits) -> Floats:
    """Δz of whole rows, float64 [rows, V] in nats, from the rows' logits [rows, V]."""
    finite = np.isfinite(logits)
    ids = anchors(profile)
    said = None if ids is None else code(profile, logits[:, ids])
    raw = profile.spec.shift(profile.parameters, relative_logits(logits, finite), None, said)
    return np.where(finite, np.clip(raw, -profile.clamp_nats, profile.clamp_nats), 0.0)


class Copies:
    """Both models, as far as they are needed, and the profiles. HemostatError where a checkpoint cannot be loaded."""

    def __init__(self, start: judge_messages.Start) -> None:
        try:
            import torch  # noqa: PLC0415  slow to import, and an extra

            from hemostat.reference.exact import nonlinearity  # noqa: PLC0415
            from hemostat_lab.models.copies import Copy  # noqa: PLC0415
        except ImportError as error:
            raise HemostatError(f"{error}; adapters need: {install_command('lab')}") from error
        from hemostat.checkpoints.checkpoint_digest import checkpoint_digest  # noqa: PLC0415

        torch.set_num_threads(1)
        self._compressed = Copy.load(Path(start.compressed), start.device)
        if self._compressed.vocab_size != start.vocab_size:
            raise HemostatError(
                f"adapter.compressed: {start.compressed} has {self._compressed.vocab_size} token ids, the model that "
                f"serves has {start.vocab_size}"
            )
        self._reference: Any = None
        self._embedding: Any = None
        size = model_bytes(self._compressed.model)
        if start.hidden_size:
            weight = load_embedding(Path(start.reference), start.vocab_size)
            if weight.shape[1] != start.hidden_size:
                raise HemostatError(
                    f"reference.folder: the output embedding of {start.reference} has {weight.shape[1]} columns, the "
                    f"reference's hidden states {start.hidden_size}: it is another checkpoint"
                )
            self._embedding = torch.from_numpy(weight).to(start.device)
            size += weight.nbytes
        else:
            self._reference = Copy.load(Path(start.reference), start.device)
            size += model_bytes(self._reference.model)
        # Only of these are logits the output embedding's product with the hidden states, of any positions at a time.
        loaded = [copy for copy in (self._compressed, self._reference) if copy is not None]
        self._linear = {id(copy): not nonlinearity(copy.model) for copy in loaded}
        self._torch = torch
        self._profiles: OrderedDict[str, Held] = OrderedDict()
        self._parts: dict[str, list[bytes]] = {}
        self.ready = judge_messages.Ready(checkpoint_digest(start.reference, None), size)

    # --- profiles --------------------------------------------------------------------------------------------------

    def hold(self, message: judge_messages.Hold) -> None:
        """One that cannot be read is not held: requests for it fail."""
        parts = self._parts.setdefault(message.version, [])
        parts.append(message.part)
        if not message.last:
            return
        del self._parts[message.version]
        with contextlib.suppress(HemostatError):
            profile = CalibrationProfile.from_bytes(b"".join(parts))
            if profile.version == message.version and profile.vocab_size == self._compressed.vocab_size:
                self._profiles[profile.version] = held(profile)
        while len(self._profiles) > MAX_HELD:
            self._profiles.popitem(last=False)

    def evict(self, versions: list[str]) -> None:
        for version in versions:
            self._profiles.pop(version, None)

    def _held(self, version: str) -> Held | None:
        return Held() if version == IDENTITY else self._profiles.get(version)

    # --- requests --------------------------------------------------------------------------------------------------

    def judge(self, request: judge_messages.Judge) -> judge_messages.Judged | judge_messages.Failed:
        """Distances of every version that is held; the others are left out."""
        from hemostat_lab.adapters.distances import exact_distances  # noqa: PLC0415

        prompt, output = _ids(request.prompt), _ids(request.output)
        ids = np.concatenate([prompt, output[:-1]])
        tokens = len(output)
        if self._embedding is not None:
            hidden = np.frombuffer(request.hidden, "<f4").reshape(tokens, -1)
            reference = self._reference_rows(hidden)
        else:
            reference = self._rows(self._reference, ids, None, tokens)
        result: dict[str, list[Any]] = {}
        emitted = np.empty(tokens, np.float32)
        ways = {v: way for v in request.versions if (way := self._held(v)) is not None}
        # One forward pass for all versions that leave the weights alone.
        by_layers: dict[int, list[str]] = {}
        for version, way in ways.items():
            by_layers.setdefault(id(way.layers) if way.layers is not None else 0, []).append(version)
        for versions in by_layers.values():
            rows = self._rows(self._compressed, ids, ways[versions[0]].layers, tokens)
            for part in self._chunks(tokens):
                theirs, ours = reference(part), rows(part)
                if not np.isfinite(theirs).all():
                    return judge_messages.Failed(request.id, "the reference's logits are not finite")
                emitted[part] = log_probability(theirs, output[part])
                broken = ~np.isfinite(ours).all(axis=1)
                ours[broken] = 0.0
                for version in versions:
                    given = ways[version].logits
                    logits = ours if given is None else (ours + shift(given, ours)).astype(np.float32)
                    distances = exact_distances(theirs, logits)
                    # A distribution that does not exist is as far away as can be: leaving the record out would be a
                    # selection by the outcome.
                    distances.kl[broken], distances.tv[broken], distances.top1[broken] = np.inf, 1.0, False
                    result.setdefault(version, []).append(distances)
        return judge_messages.Judged(
            request.id,
            {
                version: judge_messages.Distances(
                    np.concatenate([part.kl for part in parts]).astype("<f8").tobytes(),
                    np.concatenate([part.tv for part in parts]).astype("<f8").tobytes(),
                    np.concatenate([part.top1 for part in parts]).astype(np.uint8).tobytes(),
                )
                for version, parts in result.items()
            },
            emitted.astype("<f4").tobytes(),
        )

    def logprobs(self, request: judge_messages.Logprobs) -> judge_messages.Scored | judge_messages.Failed:
        way = self._held(request.version)
        if way is None:
            return judge_messages.Failed(request.id, f"profile {request.version} is not held")
        ids = _ids(request.ids)
        rows = self._rows(self._compressed, ids[:-1], way.layers, len(ids) - 1)
        result = np.empty(len(ids) - 1, np.float32)
        for part in self._chunks(len(result)):
            result[part] = log_probability(rows(part), ids[1:][part])
        return judge_messages.Scored(request.id, result.astype("<f4").tobytes())

    def _chunks(self, tokens: int) -> Iterator[slice]:
        step = max(1, CHUNK_ELEMENTS // self._compressed.vocab_size)
        for start in range(0, tokens, step):
            yield slice(start, min(start + step, tokens))

    def _rows(self, copy: Any, ids: Ids, layers: Any, tokens: int) -> Rows:
        """Logits of the last `tokens` positions of `ids`."""
        if not self._linear[id(copy)]:
            logits: Logits = copy.logits(ids, layers)[-tokens:]
            return lambda part: logits[part]
        hidden = copy.hidden(ids, layers)[-tokens:]
        return lambda part: copy.head_logits(hidden[part])

    def _reference_rows(self, hidden: npt.NDArray[np.float32]) -> Rows:
        given = self._torch.tensor(hidden).to(self._embedding.device)

        def rows(part: slice) -> Logits:
            logits: Logits = (given[part] @ self._embedding.T).cpu().numpy()
            return logits

        return rows


def log_probability(logits: Logits, ids: Ids) -> Floats:
    """Returns the log-probability of one id in each row in nats, float64 [rows], from logits [rows, V]."""
    z = logits.astype(np.float64)
    z -= z.max(axis=1, keepdims=True)
    result: Floats = z[np.arange(len(z)), ids] - np.log(np.exp(z).sum(axis=1))
    return result


def model_bytes(model: Any) -> int:
    """Returns the size in bytes of the parameters and buffers, each counted once."""
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _ids(data: bytes) -> Ids:
    return np.frombuffer(data, "<i4").astype(np.int32)


def answer(copies: Copies, request: judge_messages.Request) -> judge_messages.Answer | None:
    """None for a request that has no answer."""
    match request:
        case judge_messages.Hold():
            copies.hold(request)
        case judge_messages.Evict():
            copies.evict(request.versions)
        case judge_messages.Judge() | judge_messages.Logprobs():
            try:
                return copies.judge(request) if isinstance(request, judge_messages.Judge) else copies.logprobs(request)
            except Exception as error:  # noqa: BLE001  a process boundary: whatever a model raises becomes an answer
                message = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
                return judge_messages.Failed(request.id, message)
        case judge_messages.Start():
            raise ValueError("the copies are loaded already")
    return None


def main(parent: int) -> int:
    """0 when the input ended; 1 when it could not start."""
    bodies, send = child.connect_to_parent(parent, NICENESS)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    start = judge_messages.REQUESTS.decode(next(bodies))
    try:
        if not isinstance(start, judge_messages.Start):
            raise HemostatError("the first message must be start")
        copies = Copies(start)
    except (HemostatError, MemoryError) as error:
        send(judge_messages.ANSWERS.encode(judge_messages.Refused(str(error) or type(error).__name__)))
        return 1
    send(judge_messages.ANSWERS.encode(copies.ready))
    for body in bodies:
        result = answer(copies, judge_messages.REQUESTS.decode(body))
        if result is not None:
            send(judge_messages.ANSWERS.encode(result))
    return 0


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main(int(sys.argv[1])))
