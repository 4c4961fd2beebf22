"""An adapter that is trained further: towards the reference's predictions over the whole vocabulary.

Minimised is the mean of KL(reference‖compressed model with the adapter) over the learned tokens, by Adam from the
training-free adapter, in one pass over the texts, with averaged factors. Some texts are a fold that nothing is trained
on. It decides at which rate, and the start is kept unless the fold improves.

Cost: a token needs a forward pass of both models and a backward pass of the compressed one that gives gradients of the
factors only: about 6 floating point operations for each parameter of the model. Memory: both models with dense weights,
the factors five times in float32 (themselves, their gradient, Adam's two moments, the average), `memory_bytes`, and the
activations of one batch. Unlike the training-free adapter it does not run layer by layer.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from hemostat.models.adapters.activations import Batch, logits, make_batches
from hemostat.models.adapters.build import Built, peak_mib
from hemostat.models.adapters.copies import Adapter, Copy
from hemostat.models.adapters.errors import AdaptError
from hemostat.models.adapters.pair import CheckpointPair
from hemostat.models.adapters.parts import Parts
from hemostat.models.adapters.skeleton import set_factors
from hemostat.models.adapters.statistics import Progress
from hemostat.models.adapters.texts import Text
from hemostat_calibration.adapters.factors import LowRank
from hemostat_calibration.adapters.int8 import dequantize_rows, quantize_rows
from hemostat_calibration.profiles.adapter import adapter_layers, adapter_profile

DISTILLATION = "distillation"
"""Stage of `Progress`: tokens that were trained on, of all rates."""

RATES = (3e-4, 1e-4)
"""Of Adam; entries of factors are about 0.05. The next one is tried where the fold is worse than with the start after
`TRIAL` of the pass, or has not improved at its end."""
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
_COPIES_OF_FACTORS = 5

_PART = "distilled"

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]


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


@dataclass(frozen=True, slots=True)
class Distilled:
    """layers: what is to be served: of the last trial, or the start itself where `improved` is False.

    kl_start, kl: mean KL(reference‖·) of the fold's tokens, nats, with the start and with `layers`, both as they are
    served, from int8. fold_texts, fold_tokens: of the fold. tokens: trained on, of all trials.
    """

    layers: Adapter
    improved: bool
    kl_start: float
    kl: float
    fold_texts: int
    fold_tokens: int
    tokens: int
    trials: tuple[Trial, ...]
    seconds: float
    cpu_seconds: float
    memory_mib: float

    def report(self) -> dict[str, Any]:
        """For JSON, without the layers."""
        found = {name: getattr(self, name) for name in self.__slots__ if name not in ("layers", "trials")}
        return found | {"trials": [asdict(trial) for trial in self.trials]}


def distil(
    reference: Copy,
    compressed: Copy,
    start: Adapter,
    texts: Sequence[Text],
    *,
    seed: int = 0,
    rates: Sequence[float] = RATES,
    step_positions: int = STEP_POSITIONS,
    progress: Progress = lambda stage, done, total: None,
) -> Distilled:
    """Train `start` on the outputs' tokens of `texts`: all tokens but the first of a text that has no output or prompt.

    The fold is about `FOLD_FRACTION` of the texts by their unit, always the same ones. It improves where the mean gain
    of its texts is above one standard error. seed: of the order of the texts. step_positions: of one step of
    the optimiser. Deterministic on one machine.
    TooFewTextsError; AdaptError where the models have other vocabularies.
    """
    if reference.vocab_size != compressed.vocab_size:
        raise AdaptError(
            f"vocabulary: REFERENCE has {reference.vocab_size} tokens, COMPRESSED has {compressed.vocab_size}"
        )
    clock, processor = time.monotonic(), time.process_time()
    learn, fold = _split([text for text in texts if len(text) >= 2])
    run = _Training(reference, compressed, learn, seed, step_positions, progress)
    judged = make_batches([text.ids for text in fold], compressed.device)
    before = _fold_kl(reference, compressed, fold, judged, start)
    best, after, trials = start, before, []
    for rate in rates:
        factors, steps, tokens = run.train(start, rate, TRIAL)
        found = _fold_kl(reference, compressed, fold, judged, factors)
        complete = _mean(found) <= _mean(before)
        if complete:
            factors, more_steps, more_tokens = run.resume()
            steps, tokens = steps + more_steps, tokens + more_tokens
            found = _fold_kl(reference, compressed, fold, judged, factors)
        trials.append(Trial(rate, tokens, steps, _mean(found) if np.isfinite(found).all() else None, complete))
        if complete and _improves(before, found):
            best, after = factors, found
            break
    run.finish()
    return Distilled(
        layers=best,
        improved=best is not start,
        kl_start=_mean(before),
        kl=_mean(after),
        fold_texts=len(fold),
        fold_tokens=int(before[:, 1].sum()),
        tokens=sum(trial.tokens for trial in trials),
        trials=tuple(trials),
        seconds=time.monotonic() - clock,
        cpu_seconds=time.process_time() - processor,
        memory_mib=memory_bytes(reference, compressed, start) / (1 << 20),
    )


def distilled(
    pair: CheckpointPair,
    built: Built,
    texts: Sequence[Text],
    parts: Parts,
    seed: int = 0,
    rates: Sequence[float] = RATES,
    progress: Progress = lambda stage, done, total: None,
) -> Built:
    """`built` after `distil` on the same `texts`, with `distilled` in the report: `Distilled.report()`, or None with a
    note where there are too few texts. The profile is unchanged where the fold did not improve.

    Both models are loaded whole. The result is kept in `parts`. Raises AdaptError, WorkFolderError.
    """
    kept = parts.get(_PART)
    if kept is None:
        device = str(pair.skeleton.device)
        reference, compressed = (Copy.load(c.folder, device, label=c.label) for c in (pair.reference, pair.compressed))
        try:
            found = distil(reference, compressed, built.layers, texts, seed=seed, rates=rates, progress=progress)
        except TooFewTextsError as error:
            notes = [*built.report["notes"], f"not distilled: {error}"]
            return replace(built, report=built.report | {"distilled": None, "notes": notes})
        layers, report = found.layers, found.report()
        kept = {"report": torch.frombuffer(bytearray(json.dumps(report).encode()), dtype=torch.uint8)}
        for name, layer in layers.items():
            kept |= {f"{name}|a": torch.from_numpy(layer.a), f"{name}|b": torch.from_numpy(layer.b)}
        parts.put(_PART, kept)
    else:
        report = json.loads(kept["report"].numpy().tobytes())
        names = [name.removesuffix("|a") for name in kept if name.endswith("|a")]
        layers = {name: LowRank(kept[f"{name}|a"].numpy(), kept[f"{name}|b"].numpy()) for name in names}
    profile = built.profile
    if report["improved"]:
        method = f"distilled on {report['tokens']} tokens; start: {profile.metadata['method']}"
        profile = adapter_profile(
            model=profile.model,
            vocab_size=profile.vocab_size,
            layers=layers,
            metadata=dict(profile.metadata) | {"method": method},
        )
    changes = {
        "version": profile.version,
        "method": profile.metadata["method"],
        "distilled": report,
        "seconds": built.report["seconds"] + report["seconds"],
        "cpu_seconds": built.report["cpu_seconds"] + report["cpu_seconds"],
        "peak_mib": peak_mib(),
    }
    return Built(profile, built.report | changes, adapter_layers(profile))


def summary_line(report: Mapping[str, Any]) -> str:
    """For people, from `Distilled.report()`."""
    outcome = "improved the fold" if report["improved"] else "the start is kept"
    return (
        f"distillation: {outcome}: KL {report['kl_start']:.4f} -> {report['kl']:.4f} nats on "
        f"{report['fold_tokens']} tokens of {report['fold_texts']} texts; trained on {report['tokens']} tokens, "
        f"{report['seconds']:.0f} s, {report['cpu_seconds']:.0f} CPU-seconds, "
        f"{report['memory_mib']:.0f} MiB of models and factors"
    )


def memory_bytes(reference: Copy, compressed: Copy, layers: Adapter) -> int:
    """Of the models, the factors and the optimiser, without activations."""
    models = sum(p.numel() * p.element_size() for copy in (reference, compressed) for p in copy.model.parameters())
    factors = sum(layer.a.size + layer.b.size for layer in layers.values())
    return int(models + _COPIES_OF_FACTORS * _FLOAT32_BYTES * factors)


class _Training:
    """One pass over the texts, in two parts."""

    def __init__(
        self,
        reference: Copy,
        compressed: Copy,
        texts: Sequence[Text],
        seed: int,
        positions: int,
        progress: Progress,
    ) -> None:
        self._reference = reference
        self._compressed = compressed
        self._texts = texts
        self._progress = progress
        self._batches = make_batches([text.ids for text in texts], compressed.device, positions)
        # Batches are of texts of similar length: they come in a random order.
        np.random.default_rng(seed).shuffle(self._batches)
        self._total = sum(_tokens(texts, batch) for batch in self._batches)
        self._done = 0
        self._steps: Iterator[int] = iter(())
        self._average: Factors = {}

    def train(self, start: Adapter, rate: float, part: float) -> tuple[Adapter, int, int]:
        """From `start` for about `part` of the batches: the averaged factors, steps and tokens."""
        self._average = _tensors(start, self._compressed)
        self._steps = self._run(rate)
        self._done = 0
        return self._advance(max(1, round(part * len(self._batches))))

    def resume(self) -> tuple[Adapter, int, int]:
        """The rest of the pass: the averaged factors, and the steps and tokens of this part."""
        return self._advance(len(self._batches))

    def finish(self) -> None:
        self._steps = iter(())
        self._progress(DISTILLATION, self._total, self._total)

    def _advance(self, count: int) -> tuple[Adapter, int, int]:
        steps = tokens = 0
        for found in self._steps:
            steps, tokens = steps + 1, tokens + found
            self._done += found
            self._progress(DISTILLATION, self._done, self._total)
            if steps == count:
                break
        return _layers(self._average), steps, tokens

    def _run(self, rate: float) -> Iterator[int]:
        """One step for each time that it is advanced; the number of its tokens."""
        factors = {
            name: (a.clone().requires_grad_(True), b.clone().requires_grad_(True))
            for name, (a, b) in self._average.items()
        }
        parameters = [tensor for pair in factors.values() for tensor in pair]
        optimiser = torch.optim.Adam(parameters, lr=rate)
        for step, batch in enumerate(self._batches, 1):
            part = (step - 0.5) / len(self._batches)
            optimiser.param_groups[0]["lr"] = rate * min(part / WARM_UP, (1.0 - part) / (1.0 - WARM_UP))
            optimiser.zero_grad(set_to_none=True)
            tokens = self._gradients(batch, factors)
            optimiser.step()
            # Step t has the weight t: early steps, far from the end, count little (Lacoste-Julien, Schmidt & Bach 2012,
            # arXiv 1212.2002).
            with torch.no_grad():
                for name, pair in factors.items():
                    for mean, new in zip(self._average[name], pair, strict=True):
                        mean.lerp_(new, 2.0 / (step + 1))
            yield tokens

    def _gradients(self, batch: Batch, factors: Factors) -> int:
        """Adds those of the mean KL of the batch's tokens."""
        wanted = _wanted(self._texts, batch)
        tokens = int(wanted.sum())
        with torch.no_grad():
            targets = _last_hidden(self._reference, batch)
        dtype = self._compressed.skeleton.dtype
        set_factors(self._compressed.linears, {name: (a.to(dtype), b.to(dtype)) for name, (a, b) in factors.items()})
        try:
            hidden = _last_hidden(self._compressed, batch)
            leaf = hidden.detach().requires_grad_(True)
            for kl, _ in _divergences(self._reference, self._compressed, batch, targets, leaf, wanted):
                (kl.sum() / tokens).backward()
            assert leaf.grad is not None
            hidden.backward(leaf.grad)
        finally:
            set_factors(self._compressed.linears, {})
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
    found: list[torch.Tensor] = []

    def see(module: Any, arguments: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    handle = list(copy.skeleton.layers.values())[-1].register_forward_hook(see)
    try:
        copy.skeleton.base(input_ids=batch.ids, use_cache=False)
    finally:
        handle.remove()
    return found[0]


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
    reference: Copy, compressed: Copy, texts: Sequence[Text], batches: Sequence[Batch], layers: Adapter
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """By text, float64 [texts, 2]: sum of the KL of its tokens, nats, and their number; with the factors from int8. NaN
    where the factors are not finite."""
    if not all(np.isfinite(layer.a).all() and np.isfinite(layer.b).all() for layer in layers.values()):
        return np.full((len(texts), 2), np.nan)
    found = np.zeros((len(texts), 2))
    served = {name: _rounded(layer) for name, layer in layers.items()}
    with torch.no_grad(), compressed.adapted(served):
        for batch in batches:
            wanted = _wanted(texts, batch)
            targets, hidden = _last_hidden(reference, batch), _last_hidden(compressed, batch)
            for kl, where in _divergences(reference, compressed, batch, targets, hidden, wanted):
                text = batch.texts[int(where[0]) // batch.ids.shape[1]]
                found[text] += float(kl.double().sum()), len(kl)
    return found


def _improves(before: np.ndarray[Any, Any], after: np.ndarray[Any, Any]) -> bool:
    """Whether the gain by token is above one standard error, with texts as clusters (a ratio estimator)."""
    tokens = before[:, 1]
    gain = before[:, 0] - after[:, 0]
    mean = gain.sum() / tokens.sum()
    error = np.sqrt(np.square(gain - mean * tokens).sum()) / tokens.sum()
    return bool(np.isfinite(mean) and mean > error)


def _mean(found: np.ndarray[Any, Any]) -> float:
    return float(found[:, 0].sum() / found[:, 1].sum())


def _rounded(layer: LowRank) -> LowRank:
    return LowRank(dequantize_rows(*quantize_rows(layer.a)), dequantize_rows(*quantize_rows(layer.b)))


def _tensors(layers: Adapter, copy: Copy) -> Factors:
    """Float32, on the copy's device, as `LowRank.for_training`."""
    found = {}
    for name, layer in layers.items():
        if layer.rank:
            even = layer.for_training()
            found[name] = (torch.from_numpy(even.a).to(copy.device), torch.from_numpy(even.b).to(copy.device))
    return found


def _layers(factors: Factors) -> Mapping[str, LowRank]:
    return {
        name: LowRank(a.detach().cpu().numpy().copy(), b.detach().cpu().numpy().copy()).for_rounding()
        for name, (a, b) in factors.items()
    }
