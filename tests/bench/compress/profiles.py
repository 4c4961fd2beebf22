"""A contextual profile, which changes logits only, on the checkpoints of `adapters`.

Learned as by `make bench-recovery`, from live texts: of other prompts than those of the calibration, written by the
compressed checkpoint itself; with copies of both models in place of an engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from tests.bench.bench_recovery import FULL, RECENT_TOKENS, VOCABULARY
from tests.bench.recovery.engine import Ask, Written
from tests.bench.recovery.learning import GrowingRun
from tests.bench.recovery.log import say
from tests.bench.recovery.stages import Stages

from hemostat.checkpoints.output_embedding import load as load_embedding
from hemostat.checkpoints.texts import Text
from hemostat.learner.learner_process import eligible, special_ids
from hemostat_calibration.learning.contextual.anchors import choose_anchors
from hemostat_calibration.learning.contextual.choose import ProfileLimits
from hemostat_calibration.learning.contextual.learner import ContextualLearner
from hemostat_lab.models.copies import Copy

from . import adapters, pruning, quantization
from .cases import Bench, Case, Must
from .figures import LOGITS_FILE

NAME = "profiles"
STARTS = (*adapters.STARTS, adapters.FIVE_BITS)


def cases(bench: Bench) -> Sequence[Case]:
    known = {case.name: case for case in (*quantization.cases(bench), *pruning.cases(bench))}
    result = []
    for start in (known[name] for name in STARTS):
        result.append(Case(start.name, start.size, partial(bench.copied, start)))
        make = partial(_profiled, bench, start)
        result.append(Case(f"{start.name}, contextual profile", start.size, make, of=start.name, live=bench.live))
    return result


def musts() -> Sequence[Must]:
    """None: how much is the question."""
    return []


def _profiled(bench: Bench, start: Case, folder: Path) -> None:
    """The checkpoint with a profile beside it, where one is proposed."""
    base = bench.made(start)
    texts = bench.live_texts(start.name, base)
    weight = load_embedding(bench.reference, VOCABULARY)
    family = ContextualLearner(
        weight,
        choose_anchors(weight, FULL.anchors, among=eligible(weight, special_ids(bench.reference))),
        features=FULL.features,
        limits=ProfileLimits(FULL.rank, FULL.clamp_nats),
        recent_tokens=RECENT_TOKENS,
    )
    tapped = Stages(base.parent).kept(
        "tapped",
        [base.name, [text.ids.tolist() for text in texts]],
        lambda: _tapped(Copy.load(bench.reference), Copy.load(base), family, texts),
    )
    learned = GrowingRun(family).learn(tapped, "contextual")
    tokens = sum(len(text.output) for text in texts)
    say(f"{folder.name}: from {tokens} tokens of {len(texts)} texts, {learned.seconds:.0f} s: {learned.said}")
    profile = learned.profile
    bench.copied(start, folder, {} if profile is None else {LOGITS_FILE: profile.to_bytes()})


def _tapped(reference: Copy, compressed: Copy, family: ContextualLearner, texts: Sequence[Text]) -> list[Written]:
    """As an engine and the reference would have reported the texts' outputs."""
    result = []
    for text in texts:
        h_r, h_c = (copy.hidden(text.ids[:-1])[len(text.prompt) - 1 :] for copy in (reference, compressed))
        z = h_c @ family.weight[family.anchors].T
        features = (z - z.mean(1, keepdims=True)).astype(np.float16)
        ask = Ask("", len(text.output), 1.0, 0)
        result.append(Written(ask, text.prompt, text.output, "", features, hidden=h_r.astype(np.float16)))
    return result
