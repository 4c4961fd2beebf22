"""A contextual map that is learned on the distribution of the compressed model with an adapter, and applied on top."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
from tests.bench.recovery.engine import Written
from tests.bench.recovery.figures import Figures
from tests.bench.recovery.learning import GrowingRun, Learned
from tests.bench.recovery.stages import Stages

from hemostat.checkpoints.output_embedding import load as load_embedding
from hemostat.learner.learner_process import eligible, special_ids
from hemostat_calibration.learning.contextual.anchors import choose_anchors
from hemostat_calibration.learning.contextual.choose import ProfileLimits
from hemostat_calibration.learning.contextual.learner import ContextualLearner

from .checkpoints import Pair
from .scores import Adapter, Scorer, Singles, Tokens, adapter_digest, figures_of

ANCHORS, FEATURES, RANK, CLAMP_NATS = 1024, 576, 192, 4.0
"""As for the contextual rows of the benchmark."""
RECENT_TOKENS = 150_000


def with_states(
    texts: Sequence[Written], reference: Singles, adapted: Singles, weight: Singles, anchors: npt.NDArray[np.int32]
) -> list[Written]:
    """The texts as an engine with the adapter would have reported them: centred logits at the anchors, float16; with
    the reference's hidden states. reference, adapted: [T, d] of all texts."""
    ends = np.cumsum([len(text.output) for text in texts])[:-1]
    result = []
    for text, h_r, h_c in zip(texts, np.split(reference, ends), np.split(adapted, ends), strict=True):
        z = h_c @ weight[anchors].T
        centred = (z - z.mean(1, keepdims=True)).astype(np.float16)
        result.append(replace(text, features=centred, hidden=h_r.astype(np.float16)))
    return result


def learn_map(
    stages: Stages,
    pair: Pair,
    scorer: Scorer,
    weight: Singles,
    learning: Sequence[Written],
    adapter: Adapter | None,
    name: str,
) -> Learned:
    """What Hemostat's contextual family learns from the texts."""
    tokens = Tokens.of(learning)

    def make() -> Learned:
        embedding = load_embedding(pair.reference, len(weight))
        anchors = choose_anchors(embedding, ANCHORS, among=eligible(embedding, special_ids(pair.reference)))
        family = ContextualLearner(
            embedding,
            anchors,
            features=FEATURES,
            limits=ProfileLimits(RANK, CLAMP_NATS),
            recent_tokens=RECENT_TOKENS,
        )
        states = scorer.reference_states(tokens), scorer.states(tokens, adapter, name)
        return GrowingRun(family).learn(with_states(learning, *states, embedding, anchors), name)

    return stages.kept("adapter-map", [pair.digests(), tokens.digest, adapter_digest(adapter), CLAMP_NATS], make)


def figures_with_map(
    weight: Singles, scorer: Scorer, heldout: Tokens, adapter: Adapter | None, learned: Learned, name: str
) -> Figures | None:
    """Of the adapter with the map; None where none was proposed."""
    if learned.profile is None:
        return None
    states = {name: scorer.states(heldout, adapter, name)}
    return figures_of(weight, scorer.reference_states(heldout), states, {name: learned.profile})[name]
