"""Training towards the reference's predictions over the whole vocabulary, of whatever part of a model can be trained.

Minimised is the mean of KL(reference‖compressed model) over the learned tokens, by Adam, in one pass over the texts,
with averaged tensors. Some texts are a fold that nothing is trained on. It decides at which rate, after half of the
pass at each, and the start is kept unless the fold improves.

Cost: a token needs a forward pass of both models and a backward pass of the compressed one that gives gradients of what
is trained only: about 6 floating point operations for each parameter of the model, and 2 more for each weight of layers
whose weights are trained; with two rates half of the tokens need it twice. Memory: both models with dense weights, what
is trained four times in float32 for each rate (itself, Adam's two moments, the average) and its gradient, the
`working_bytes` of `Trainable`, and the activations of one batch.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

import numpy as np
import torch

from hemostat.checkpoints.errors import AdaptError
from hemostat.checkpoints.texts import Text
from hemostat_lab.models.activations import Batch, forward_hooks, logits, make_batches
from hemostat_lab.models.copies import Copy
from hemostat_lab.models.second_moments import Progress

DISTILLATION = "distillation"
"""Stage of `Progress`: tokens that were trained on, of all rates."""

TRIAL = 0.5
"""Part of the pass after which rates are compared: after a quarter a rate that is too large may still look better."""
STEP_POSITIONS = 256
"""Of one step, padding included; a longer text is a step of its own."""
WARM_UP = 0.1
"""Part of the steps in which the rate rises from 0: Adam's first steps move every entry by the whole rate, whatever
its gradient. After them it falls, to 0 at the end of the pass."""
FOLD_FRACTION = 0.1
MIN_FOLD_TEXTS = 4
MAX_FOLD_TOKENS = 4096

_FLOAT32_BYTES = 4
_COPIES = 4
"""For each rate, besides the gradient."""

Tensors = Mapping[str, torch.Tensor]
"""Float32, by name."""


class TooFewTextsError(AdaptError):
    """No fold can be left out."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What one rate reached. kl: mean of the fold's tokens after the last step, nats; None where factors are no longer
    finite. complete: it was chosen, and did all of the pass; at most one is."""

    rate: float
    tokens: int
    steps: int
    kl: float | None
    complete: bool


class Trainable(Protocol):
    """What is trained of the compressed model."""

    @property
    def numbers(self) -> int:
        """How many numbers are trained."""

    @property
    def working_bytes(self) -> int:
        """Of changed copies of the model's own weights while it is trained, and of their gradients."""

    def start(self) -> dict[str, torch.Tensor]:
        """Copies of the tensors from which training starts, on the model's device."""

    def applied(self, tensors: Tensors) -> AbstractContextManager[None]:
        """Inside of the context, the model computes with `tensors`, in its own dtype; gradients reach them."""

    def served(self, tensors: Tensors | None) -> AbstractContextManager[None]:
        """As `applied`, with the rounding of what is written to a file; None: with the start, as it was given."""


@dataclass(frozen=True, slots=True)
class Trained:
    """tensors: of the complete trial; None where the fold did not improve: the start is kept.

    kl_start, kl: mean KL(reference‖·) of the fold's tokens, nats, with the start and with the result, both as they are
    served. fold_texts, fold_tokens: of the fold. tokens: trained on, of all trials. memory_mib: `memory_bytes`.
    """

    tensors: Tensors | None
    kl_start: float
    kl: float
    fold_texts: int
    fold_tokens: int
    tokens: int
    trials: tuple[Trial, ...]
    seconds: float
    cpu_seconds: float
    memory_mib: float

    @property
    def improved(self) -> bool:
        """Whether the fold improved."""
        return self.tensors is not None

    def report(self) -> dict[str, Any]:
        """For JSON, without the tensors."""
        numbers = {field.name: getattr(self, field.name) for field in fields(Trained) if field.name != "tensors"}
        return {"improved": self.improved, **numbers, "trials": [asdict(trial) for trial in self.trials]}


def train(
    reference: Copy,
    compressed: Copy,
    trainable: Trainable,
    texts: Sequence[Text],
    *,
    seed: int,
    rates: Sequence[float],
    step_positions: int = STEP_POSITIONS,
    progress: Progress = lambda stage, done, total: None,
) -> Trained:
    """Train on the outputs' tokens of `texts`: all tokens but the first of a text that has no output or prompt.

    The fold is about `FOLD_FRACTION` of the texts by their unit, always the same ones. It improves where the mean gain
    of its texts is above one standard error. seed: of the order of the texts. rates: of Adam; all are tried for `TRIAL`
    of the pass, and the one whose fold is best goes on, unless it is worse than with the start. step_positions: of one
    step of the optimiser. Deterministic on one machine.
    TooFewTextsError; AdaptError where the models have other vocabularies.
    """
    if reference.vocab_size != compressed.vocab_size:
        raise AdaptError(
            f"vocabulary: REFERENCE has {reference.vocab_size} tokens, COMPRESSED has {compressed.vocab_size}"
        )
    clock, processor = time.monotonic(), time.process_time()
    learn, fold = _split([text for text in texts if len(text) >= 2])
    run = _Training(reference, compressed, trainable, learn, seed, step_positions, progress)
    judged = make_batches([text.ids for text in fold], compressed.device)

    def fold_kl(tensors: Tensors | None) -> np.ndarray[Any, np.dtype[np.float64]]:
        if tensors is not None and not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            return np.full((len(fold), 2), np.nan)
        with torch.no_grad(), trainable.served(tensors):
            return _fold_kl(reference, compressed, fold, judged)

    before = fold_kl(None)
    passes = [_Pass(run, rate) for rate in rates]
    trial = max(1, round(TRIAL * run.steps))
    run.expect(trial, len(rates))
    results = []
    for tried in passes:
        tried.advance(trial)
        results.append(fold_kl(tried.average))
    best = min(range(len(rates)), key=lambda n: _mean(results[n]) if _finite(results[n]) else np.inf)
    complete = _finite(results[best]) and _mean(results[best]) <= _mean(before)
    if complete:
        passes[best].advance(run.steps)
        results[best] = fold_kl(passes[best].average)
    run.finish()
    improved = complete and _improves(before, results[best])
    return Trained(
        tensors=passes[best].average if improved else None,
        kl_start=_mean(before),
        kl=_mean(results[best] if improved else before),
        fold_texts=len(fold),
        fold_tokens=int(before[:, 1].sum()),
        tokens=sum(tried.tokens for tried in passes),
        trials=tuple(
            Trial(p.rate, p.tokens, p.steps, _mean(result) if _finite(result) else None, complete and n == best)
            for n, (p, result) in enumerate(zip(passes, results, strict=True))
        ),
        seconds=time.monotonic() - clock,
        cpu_seconds=time.process_time() - processor,
        memory_mib=memory_bytes(reference, compressed, trainable, len(rates)) / (1 << 20),
    )


def summary_line(report: Mapping[str, Any], what: str = DISTILLATION) -> str:
    """For people, from a report that begins with `Trained.report()`."""
    outcome = "improved the fold" if report["improved"] else "the start is kept"
    return (
        f"{what}: {outcome}: KL {report['kl_start']:.4f} -> {report['kl']:.4f} nats on "
        f"{report['fold_tokens']} tokens of {report['fold_texts']} texts; trained on {report['tokens']} tokens, "
        f"{report['seconds']:.0f} s, {report['cpu_seconds']:.0f} CPU-seconds, "
        f"{report['memory_mib']:.0f} MiB of models and what is trained"
    )


def memory_bytes(reference: Copy, compressed: Copy, trainable: Trainable, rates: int) -> int:
    """Of the models, of what is trained at so many rates, and of the optimiser, without activations."""
    models = sum(p.numel() * p.element_size() for copy in (reference, compressed) for p in copy.model.parameters())
    return int(models + trainable.working_bytes + (_COPIES * rates + 1) * _FLOAT32_BYTES * trainable.numbers)


class _Training:
    """The texts in batches, in one order for all rates. steps: of one pass."""

    def __init__(
        self,
        reference: Copy,
        compressed: Copy,
        trainable: Trainable,
        texts: Sequence[Text],
        seed: int,
        positions: int,
        progress: Progress,
    ) -> None:
        self._reference = reference
        self._compressed = compressed
        self._trainable = trainable
        self._texts = texts
        self._progress = progress
        self._batches = make_batches([text.ids for text in texts], compressed.device, positions)
        # Batches are of texts of similar length: they come in a random order.
        np.random.default_rng(seed).shuffle(self._batches)
        self.steps = len(self._batches)
        self._total = self._done = 0

    def expect(self, trial: int, rates: int) -> None:
        """So many steps at each rate, then the others at one: for the progress."""
        tokens = [_tokens(self._texts, batch) for batch in self._batches]
        self._total = sum(tokens) + (rates - 1) * sum(tokens[:trial])

    def start(self) -> dict[str, torch.Tensor]:
        return self._trainable.start()

    def step(self, n: int, tensors: Tensors) -> int:
        """Adds the gradients of batch `n`; the number of its tokens."""
        tokens = self._gradients(self._batches[n], tensors)
        self._done += tokens
        self._progress(DISTILLATION, self._done, self._total)
        return tokens

    def finish(self) -> None:
        self._progress(DISTILLATION, self._total, self._total)

    def _gradients(self, batch: Batch, tensors: Tensors) -> int:
        """Adds those of the mean KL of the batch's tokens."""
        wanted = _wanted(self._texts, batch)
        tokens = int(wanted.sum())
        with torch.no_grad():
            targets = _last_hidden(self._reference, batch)
        with self._trainable.applied(tensors):
            hidden = _last_hidden(self._compressed, batch)
            leaf = hidden.detach().requires_grad_(True)
            for kl, _ in _divergences(self._reference, self._compressed, batch, targets, leaf, wanted):
                (kl.sum() / tokens).backward()
            assert leaf.grad is not None
            hidden.backward(leaf.grad)
        return tokens


class _Pass:
    """One pass at one rate, in parts. average: of the tensors after each step."""

    def __init__(self, training: _Training, rate: float) -> None:
        self.rate = rate
        self.steps = self.tokens = 0
        self.average = training.start()
        self._training = training
        self._tensors = {name: tensor.clone().requires_grad_(True) for name, tensor in self.average.items()}
        self._optimiser = torch.optim.Adam(self._tensors.values(), lr=rate)

    def advance(self, steps: int) -> None:
        """Until so many steps are done."""
        while self.steps < steps:
            part = (self.steps + 0.5) / self._training.steps
            self._optimiser.param_groups[0]["lr"] = self.rate * min(part / WARM_UP, (1.0 - part) / (1.0 - WARM_UP))
            self.tokens += self._training.step(self.steps, self._tensors)
            self._optimiser.step()
            self._optimiser.zero_grad(set_to_none=True)
            self.steps += 1
            # Step t has the weight t: early steps, far from the end, count little (Lacoste-Julien, Schmidt & Bach 2012,
            # arXiv 1212.2002).
            with torch.no_grad():
                for name, new in self._tensors.items():
                    self.average[name].lerp_(new, 2.0 / (self.steps + 1))


def _split(texts: Sequence[Text]) -> tuple[list[Text], list[Text]]:
    """Texts to train on, and the fold; texts of one unit are on one side."""
    keys = sorted({text.key for text in texts}, key=lambda key: hashlib.sha256(b"fold" + key).digest())
    count = max(MIN_FOLD_TEXTS, round(FOLD_FRACTION * len(keys)))
    if len(keys) < 2 * MIN_FOLD_TEXTS:
        raise TooFewTextsError(
            f"{len(keys)} different prompts: distillation needs {2 * MIN_FOLD_TEXTS} or more, some of which decide "
            "whether it helped"
        )
    chosen = set(keys[:count])
    fold: list[Text] = []
    tokens = 0
    for text in texts:
        if text.key in chosen and tokens < MAX_FOLD_TOKENS:
            fold.append(text)
            tokens += len(text)
    return [text for text in texts if text.key not in chosen], fold


def _wanted(texts: Sequence[Text], batch: Batch) -> torch.Tensor:
    """Positions whose next token is of the output, bool [texts, positions]."""
    wanted = torch.zeros_like(batch.valid)
    for row, text in enumerate(batch.texts):
        first = len(texts[text].prompt) if len(texts[text].output) else 1
        wanted[row, max(first, 1) - 1 : len(texts[text]) - 1] = True
    return wanted


def _tokens(texts: Sequence[Text], batch: Batch) -> int:
    return int(_wanted(texts, batch).sum())


def _last_hidden(copy: Copy, batch: Batch) -> torch.Tensor:
    """What the last decoder layer returns, [texts, positions, d]."""
    result: list[torch.Tensor] = []

    def see(module: Any, arguments: Any, output: Any) -> None:
        result.append(output[0] if isinstance(output, tuple) else output)

    with forward_hooks([(list(copy.skeleton.layers.values())[-1], see)]):
        copy.skeleton.base(input_ids=batch.ids, use_cache=False)
    return result[0]


def _divergences(
    reference: Copy,
    compressed: Copy,
    batch: Batch,
    targets: torch.Tensor,
    hidden: torch.Tensor,
    wanted: torch.Tensor,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """KL(reference‖compressed) in nats, float32 [n], and where: [n] indices into the flattened batch. In parts."""
    ours, theirs = (
        logits(reference.skeleton, batch, targets, wanted),
        logits(compressed.skeleton, batch, hidden, wanted),
    )
    for (r, where), (c, _) in zip(ours, theirs, strict=True):
        log_r, log_c = torch.log_softmax(r.float(), dim=-1), torch.log_softmax(c.float(), dim=-1)
        yield torch.nn.functional.kl_div(log_c, log_r, log_target=True, reduction="none").sum(-1), where


def _fold_kl(
    reference: Copy, compressed: Copy, texts: Sequence[Text], batches: Sequence[Batch]
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """By text, float64 [texts, 2]: sum of the KL of its tokens, nats, and their number."""
    result = np.zeros((len(texts), 2))
    for batch in batches:
        wanted = _wanted(texts, batch)
        targets, hidden = _last_hidden(reference, batch), _last_hidden(compressed, batch)
        for kl, where in _divergences(reference, compressed, batch, targets, hidden, wanted):
            text = batch.texts[int(where[0]) // batch.ids.shape[1]]
            result[text] += float(kl.double().sum()), len(kl)
    return result


def _improves(before: np.ndarray[Any, Any], after: np.ndarray[Any, Any]) -> bool:
    """Whether the gain by token is above one standard error, with texts as clusters (a ratio estimator)."""
    tokens = before[:, 1]
    gain = before[:, 0] - after[:, 0]
    mean = gain.sum() / tokens.sum()
    error = np.sqrt(np.square(gain - mean * tokens).sum()) / tokens.sum()
    return bool(np.isfinite(mean) and mean > error)


def _finite(sums: np.ndarray[Any, Any]) -> bool:
    return bool(np.isfinite(sums).all())


def _mean(sums: np.ndarray[Any, Any]) -> float:
    return float(sums[:, 0].sum() / sums[:, 1].sum())
