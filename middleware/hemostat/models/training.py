"""Training towards the reference's predictions over the whole vocabulary, of whatever part of a model can be trained.

Minimised is the mean of KL(reference‖compressed model) over the learned tokens, by Adam, in one pass over the texts,
with averaged tensors. Some texts are a fold that nothing is trained on. It decides at which rate, and the start is kept
unless the fold improves.

Cost: a token needs a forward pass of both models and a backward pass of the compressed one that gives gradients of what
is trained only: about 6 floating point operations for each parameter of the model. Memory: both models with dense
weights, what is trained five times in float32 (itself, its gradient, Adam's two moments, the average), and the
activations of one batch.
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

from hemostat.models.activations import Batch, forward_hooks, logits, make_batches
from hemostat.models.copies import Copy
from hemostat.models.errors import AdaptError
from hemostat.models.second_moments import Progress
from hemostat.models.texts import Text

DISTILLATION = "distillation"
"""Stage of `Progress`: tokens that were trained on, of all rates."""

TRIAL = 0.25
STEP_POSITIONS = 256
"""Of one step, padding included; a longer text is a step of its own."""
WARM_UP = 0.1
"""Part of the steps in which the rate rises from 0: Adam's first steps move every entry by the whole rate, whatever
its gradient. After them it falls, to 0 at the end of the pass."""
FOLD_FRACTION = 0.1
MIN_FOLD_TEXTS = 4
MAX_FOLD_TOKENS = 4096

_FLOAT32_BYTES = 4
_COPIES = 5

Tensors = Mapping[str, torch.Tensor]
"""Float32, by name."""


class TooFewTextsError(AdaptError):
    """No fold can be left out."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What one rate reached. kl: mean of the fold's tokens after the last step, nats; None where factors are no longer
    finite. complete: all of the pass."""

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

    def start(self) -> dict[str, torch.Tensor]:
        """Copies of the tensors from which training starts, on the model's device."""

    def applied(self, tensors: Tensors) -> AbstractContextManager[None]:
        """Inside of the context, the model computes with `tensors`, in its own dtype; gradients reach them."""

    def served(self, tensors: Tensors | None) -> AbstractContextManager[None]:
        """As `applied`, with the rounding of what is written to a file; None: with the start, as it was given."""


@dataclass(frozen=True, slots=True)
class Trained:
    """tensors: of the last trial; None where the fold did not improve: the start is kept.

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
    of its texts is above one standard error. seed: of the order of the texts. rates: of Adam; the next one is tried
    where the fold is worse than with the start after `TRIAL` of the pass, or has not improved at its end.
    step_positions: of one step of the optimiser. Deterministic on one machine.
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
    best: Tensors | None = None
    after = before
    trials = []
    for rate in rates:
        tensors, steps, tokens = run.train(rate, TRIAL)
        result = fold_kl(tensors)
        complete = _mean(result) <= _mean(before)
        if complete:
            tensors, more_steps, more_tokens = run.resume()
            steps, tokens = steps + more_steps, tokens + more_tokens
            result = fold_kl(tensors)
        trials.append(Trial(rate, tokens, steps, _mean(result) if np.isfinite(result).all() else None, complete))
        if complete and _improves(before, result):
            best, after = tensors, result
            break
    run.finish()
    return Trained(
        tensors=best,
        kl_start=_mean(before),
        kl=_mean(after),
        fold_texts=len(fold),
        fold_tokens=int(before[:, 1].sum()),
        tokens=sum(trial.tokens for trial in trials),
        trials=tuple(trials),
        seconds=time.monotonic() - clock,
        cpu_seconds=time.process_time() - processor,
        memory_mib=memory_bytes(reference, compressed, trainable.numbers) / (1 << 20),
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


def memory_bytes(reference: Copy, compressed: Copy, numbers: int) -> int:
    """Of the models, of `numbers` that are trained, and of the optimiser, without activations."""
    models = sum(p.numel() * p.element_size() for copy in (reference, compressed) for p in copy.model.parameters())
    return int(models + _COPIES * _FLOAT32_BYTES * numbers)


class _Training:
    """One pass over the texts, in two parts."""

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
        self._total = sum(_tokens(texts, batch) for batch in self._batches)
        self._done = 0
        self._steps: Iterator[int] = iter(())
        self._average: dict[str, torch.Tensor] = {}

    def train(self, rate: float, part: float) -> tuple[Tensors, int, int]:
        """From the start for about `part` of the batches: the averaged tensors, steps and tokens."""
        self._average = self._trainable.start()
        self._steps = self._run(rate)
        self._done = 0
        return self._advance(max(1, round(part * len(self._batches))))

    def resume(self) -> tuple[Tensors, int, int]:
        """The rest of the pass: the averaged tensors, and the steps and tokens of this part."""
        return self._advance(len(self._batches))

    def finish(self) -> None:
        self._steps = iter(())
        self._progress(DISTILLATION, self._total, self._total)

    def _advance(self, count: int) -> tuple[Tensors, int, int]:
        steps = tokens = 0
        for step in self._steps:
            steps, tokens = steps + 1, tokens + step
            self._done += step
            self._progress(DISTILLATION, self._done, self._total)
            if steps == count:
                break
        return {name: tensor.clone() for name, tensor in self._average.items()}, steps, tokens

    def _run(self, rate: float) -> Iterator[int]:
        """One step for each time that it is advanced; the number of its tokens."""
        tensors = {name: tensor.clone().requires_grad_(True) for name, tensor in self._average.items()}
        optimiser = torch.optim.Adam(tensors.values(), lr=rate)
        for step, batch in enumerate(self._batches, 1):
            part = (step - 0.5) / len(self._batches)
            optimiser.param_groups[0]["lr"] = rate * min(part / WARM_UP, (1.0 - part) / (1.0 - WARM_UP))
            optimiser.zero_grad(set_to_none=True)
            tokens = self._gradients(batch, tensors)
            optimiser.step()
            # Step t has the weight t: early steps, far from the end, count little (Lacoste-Julien, Schmidt & Bach 2012,
            # arXiv 1212.2002).
            with torch.no_grad():
                for name, new in tensors.items():
                    self._average[name].lerp_(new, 2.0 / (step + 1))
            yield tokens

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


def _mean(sums: np.ndarray[Any, Any]) -> float:
    return float(sums[:, 0].sum() / sums[:, 1].sum())
