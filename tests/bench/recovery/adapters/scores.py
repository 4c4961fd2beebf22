"""Full-vocabulary figures of a compressed model with an adapter, on texts that are given.

Hidden states come from Hemostat's own copies of the checkpoints; logits are the output embedding times these, in
float32. They are kept by model and adapter, so that a figure that is asked for again costs nothing.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from tests.bench.recovery.engine import Written
from tests.bench.recovery.figures import Figures
from tests.bench.recovery.log import say
from tests.bench.recovery.stages import Stages
from tests.support.transform import apply_to_all

from hemostat_calibration.adapters.factors import LowRank
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_engine.transform import HeldProfile

TEXTS_AT_ONCE = 16
_ROWS = 32
"""Tokens whose logits are worked on at a time: 6 MB a row of temporaries at this vocabulary."""

Singles = npt.NDArray[np.float32]
Adapter = Mapping[str, LowRank]


class RunsTexts(Protocol):
    """What is needed of a copy of a checkpoint: see hemostat_lab.models.copies."""

    model: Any

    def adapted(self, adapter: Adapter | None) -> Any: ...


@dataclass(frozen=True, slots=True)
class Tokens:
    """Texts to score, with what names them."""

    texts: Sequence[Written]
    digest: str

    @classmethod
    def of(cls, texts: Sequence[Written]) -> Tokens:
        digest = hashlib.sha256()
        for text in texts:
            digest.update(len(text.prompt).to_bytes(4, "little") + text.prompt.tobytes() + text.output.tobytes())
        return cls(texts, digest.hexdigest()[:16])


def hidden_states(copy: RunsTexts, adapter: Adapter | None, texts: Sequence[Written], name: str) -> Singles:
    """After the final norm, where the output is predicted, float32 [T, d]; tokens in the order of the texts."""
    by_length = sorted(range(len(texts)), key=lambda i: len(texts[i].prompt) + len(texts[i].output))
    result: dict[int, Singles] = {}
    began = said = time.monotonic()
    with torch.inference_mode(), copy.adapted(adapter):
        for start in range(0, len(by_length), TEXTS_AT_ONCE):
            numbers = by_length[start : start + TEXTS_AT_ONCE]
            rows = [torch.from_numpy(np.concatenate([texts[i].prompt, texts[i].output[:-1]])).long() for i in numbers]
            # Attention is causal: what is padded behind a text does not change it.
            padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            states = copy.model.get_decoder()(input_ids=padded, use_cache=False).last_hidden_state.float().numpy()
            for i, ids, state in zip(numbers, rows, states, strict=True):
                result[i] = state[: len(ids)][-len(texts[i].output) :].copy()
            if time.monotonic() - said > 30:
                said = time.monotonic()
                say(f"{name}: {len(result)} of {len(texts)} texts run")
    say(f"{name}: {len(texts)} texts run in {time.monotonic() - began:.0f} s")
    return np.concatenate([result[i] for i in range(len(texts))])


def figures_of(
    weight: Singles,
    reference: Singles,
    models: Mapping[str, Singles],
    maps: Mapping[str, CalibrationProfile] | None = None,
) -> dict[str, Figures]:
    """By label, the distances of models from the reference. weight: output embedding [V, d]; states: [T, d] each.

    maps: contextual profiles that are applied to a model's logits, by label.
    """
    held = {label: HeldProfile(profile) for label, profile in (maps or {}).items()}
    embedding = torch.from_numpy(weight).T.contiguous()
    parts: dict[str, list[torch.Tensor]] = {label: [] for label in models}
    with torch.inference_mode():
        for start in range(0, len(reference), _ROWS):
            rows = slice(start, start + _ROWS)
            log_r = torch.log_softmax(torch.from_numpy(reference[rows]) @ embedding, -1)
            for label, states in models.items():
                z = torch.from_numpy(states[rows]) @ embedding
                if label in held:
                    apply_to_all(held[label], z)
                parts[label].append(distances(log_r, z))
    return {label: Figures(*torch.cat(part, -1).double().numpy()) for label, part in parts.items()}


def distances(log_r: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """KL(r‖c), KL(c‖r), TV and same top-1, [4, T], from log-probabilities of r and logits of c, [T, V] each."""
    log_c = torch.log_softmax(z, -1)
    r, c = log_r.exp(), log_c.exp()
    difference = log_r - log_c
    kl, reverse = torch.linalg.vecdot(r, difference), -torch.linalg.vecdot(c, difference)
    same = log_r.argmax(-1) == log_c.argmax(-1)
    return torch.stack([kl, reverse, 0.5 * (c - r).abs().sum(-1), same.float()])


def adapter_digest(adapter: Adapter | None) -> str:
    digest = hashlib.sha256()
    for name, low_rank in sorted((adapter or {}).items()):
        digest.update(name.encode() + low_rank.a.tobytes() + low_rank.b.tobytes())
    return digest.hexdigest()[:16]


class Scorer:
    """Of one pair of checkpoints; copies are only loaded when something is not kept yet."""

    def __init__(self, stages: Stages, digests: list[str], copies: Copies, weight: Singles, name: str) -> None:
        self._stages = stages
        self._digests = digests
        self.copies = copies
        self._weight = weight
        self._name = name

    def reference_states(self, tokens: Tokens) -> Singles:
        """Of the reference, float32 [T, d]."""
        name = f"{self._name}, reference"
        return self._stages.kept(
            "adapter-reference-states",
            [self._digests[0], tokens.digest],
            lambda: hidden_states(self.copies.reference, None, tokens.texts, name),
        )

    def states(self, tokens: Tokens, adapter: Adapter | None, label: str) -> Singles:
        """Of the compressed model with the adapter, float32 [T, d]."""
        return self._stages.kept(
            "adapter-states",
            [self._digests[1], tokens.digest, adapter_digest(adapter)],
            lambda: hidden_states(self.copies.compressed, adapter, tokens.texts, f"{self._name}, {label}"),
        )

    def logprobs(self, states: Singles, texts: Sequence[Written]) -> list[npt.NDArray[np.float64]]:
        """Of every text's output, float64 [T] each, nats, from the states [T, d] of all texts."""
        embedding, emitted = torch.from_numpy(self._weight).T, np.concatenate([text.output for text in texts])
        parts = []
        with torch.inference_mode():
            for start in range(0, len(states), _ROWS):
                z = torch.from_numpy(states[start : start + _ROWS]) @ embedding
                ids = torch.from_numpy(emitted[start : start + _ROWS]).long()
                parts.append(torch.log_softmax(z, -1).gather(1, ids[:, None])[:, 0])
        ends = np.cumsum([len(text.output) for text in texts])[:-1]
        return np.split(torch.cat(parts).double().numpy(), ends)

    def figures(self, tokens: Tokens, adapters: Mapping[str, Adapter | None]) -> dict[str, Figures]:
        """By label; None is the compressed model as it is."""
        keys = {label: [self._digests, tokens.digest, adapter_digest(a)] for label, a in adapters.items()}
        stage = "adapter-figures"
        missing = [label for label, key in keys.items() if not self._stages.file(stage, key).exists()]
        if missing:
            states = {label: self.states(tokens, adapters[label], label) for label in missing}
            measured = figures_of(self._weight, self.reference_states(tokens), states)
            for label, figures in measured.items():
                self._stages.kept(stage, keys[label], lambda figures=figures: figures)
        return {label: self._stages.kept(stage, key, _missing) for label, key in keys.items()}


class Copies(Protocol):
    """The two models of a pair."""

    @property
    def reference(self) -> RunsTexts: ...

    @property
    def compressed(self) -> RunsTexts: ...


def _missing() -> Figures:
    raise AssertionError("every figure has been measured")
