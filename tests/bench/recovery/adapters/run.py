"""Builds adapters and measures them: rows of build/bench/recovery.json, and what else the benchmark says of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from enum import StrEnum
from itertools import groupby
from typing import Any

from tests.bench.recovery.engine import Ask, Written
from tests.bench.recovery.figures import IDENTITY, Figures, groups, row
from tests.bench.recovery.learning import first_tokens
from tests.bench.recovery.log import say
from tests.bench.recovery.stages import Stages

from hemostat_calibration.profiles.adapter import adapter_bytes, adapter_layers, max_rank

from . import shrink
from .checkpoints import Pair, pair
from .kinds import to_learn_from
from .made import LoadedCopies, Made, made
from .map_on_top import figures_with_map, learn_map
from .pareto import BASE, OTHERS, more_bytes, rounded_checkpoint
from .plan import Plan, Variant
from .scores import Scorer, Singles, Tokens
from .served import plain_answers, served
from .texts import MAX_TOKENS, PART, open_asks, token_count, write_texts

REFERENCE = "SmolLM2-135M-Instruct, bfloat16"
FIRST = "w4a16"
"""The compression of which everything is shown."""
FEWEST_TOKENS = 90
"""Of a learning text on average, prompt included: how many are written follows from it."""


class Part(StrEnum):
    """What can be measured by itself."""

    ROWS = "rows"
    """Every adapter on held-out texts."""
    BITS = "bits"
    """The same bytes spent on more bits."""
    MAP = "map"
    """A contextual map on top of an adapter."""
    SHRUNK = "shrunk"
    """A contextual map alone, shrunk where texts are far from what was learned."""
    SERVED = "served"
    """Adapters at the engine."""


class AdapterBench:
    """All compressions, one after the other. weight: the reference's output embedding, float32 [V, d]."""

    def __init__(self, stages: Stages, weight: Singles, plan: Plan) -> None:
        self.stages = stages
        self.weight = weight
        self.plan = plan

    def run(self, parts: Collection[Part] = tuple(Part), labels: Collection[str] = ()) -> dict[str, Any]:
        """rows: of the benchmark's JSON; the other parts are explained in docs/results.md.

        labels: only the adapters whose label contains one of these, for the rows and at the engine; empty: all.
        """
        rows: list[dict[str, Any]] = []
        result: dict[str, Any] = {"rows": rows}
        if Part.ROWS in parts:
            for scheme, variants in self.plan.variants.items():
                if chosen := labelled(variants, labels):
                    rows += self.compression(scheme, chosen)
            result["rank_16_at_width_4096"] = {
                "bfloat16": bytes_at_width_4096(16, 2.0),
                "int8": bytes_at_width_4096(16, 1.0),
            }
        if Part.BITS in parts and self.plan.pareto:
            result["more_bits"] = self.more_bits()
        if self.plan.best is not None:
            if Part.MAP in parts:
                rows.append(self.map_on_top(self.plan.best))
            if Part.SHRUNK in parts:
                result["shrunk_map"] = self.shrunk_map()
        if Part.SERVED in parts:
            result["served"] = {v.label: self.at_the_engine(v) for v in labelled(self.plan.served, labels)}
        return result

    # --- what is measured ---------------------------------------------------------------------------------------

    def pair(self, scheme: str) -> Pair:
        """GPTQ and AWQ are calibrated on texts to learn from, those of the checkpoint that was rounded to nearest."""
        calibration = [] if scheme == FIRST else self.texts(FIRST)[1]
        return pair(scheme, self.stages.folder, calibration)

    def texts(self, scheme: str, tokens: int | None = None) -> tuple[list[Written], list[Written]]:
        """To judge by, and to learn from, by the compressed model itself. tokens: that are learned from, prompts
        included, so that no more texts are written than that takes; None: all."""
        count = self.plan.texts[scheme]
        learning = count.learning if tokens is None else min(count.learning, -(-tokens // FEWEST_TOKENS))
        # Whole parts, as they are kept.
        total = min(count.heldout + count.learning, -(-(count.heldout + learning) // PART) * PART)
        asks = open_asks(heldout=True)[: count.heldout] + open_asks(heldout=False)[: count.learning]
        written = write_texts(self.stages, self.pair(scheme).compressed, asks[:total], scheme)
        return first_tokens(written[: count.heldout], self.plan.heldout_tokens), written[count.heldout :]

    def learning(self, scheme: str, variant: Variant) -> list[Written]:
        """What a variant is learned from. Of texts to judge by none is written that is not kept yet."""
        if not variant.mixed:
            count, wanted = self.plan.texts[scheme], max(variant.tokens, variant.distilled)
            asks = open_asks(heldout=False)[: min(count.learning, -(-wanted // FEWEST_TOKENS // PART) * PART)]
            if count.heldout % PART:  # a part holds texts of both sides
                return self.texts(scheme, wanted)[1]
            return write_texts(self.stages, self.pair(scheme).compressed, asks, scheme)
        texts = to_learn_from([ask.text for ask in open_asks(heldout=False)], self.plan.mixed)
        asks = [Ask(text, MAX_TOKENS, 1.0, 4_000_000 + n, tap=False) for n, text in enumerate(texts)]
        return write_texts(self.stages, self.pair(scheme).compressed, asks, f"{scheme}-mixed")

    def scorer(self, it: Pair) -> Scorer:
        return Scorer(self.stages, it.digests(), LoadedCopies(it), self.weight, it.scheme)

    def made(self, it: Pair, learning: Sequence[Written], variant: Variant) -> Made:
        return made(self.stages, it, learning, variant)

    # --- figures ------------------------------------------------------------------------------------------------

    def compression(self, scheme: str, variants: Sequence[Variant]) -> list[dict[str, Any]]:
        """Rows of the compressed model as it is, and with every adapter."""
        heldout, learning = self.texts(scheme, max(max(v.tokens, v.distilled) for v in variants))
        it = self.pair(scheme)
        scorer, tokens = self.scorer(it), Tokens.of(heldout)
        figures: dict[str, Figures] = scorer.figures(tokens, {IDENTITY: None})
        identity = {"family": IDENTITY, "variant": "", "rank": 0, "tokens": 0}
        rows = [self._row(scheme, heldout, figures, IDENTITY, identity)]
        # Those of the same statistics together: the reference's distributions are computed once for all of them.
        for _, alike in groupby(variants, lambda variant: (variant.tokens, variant.metric, variant.distilled)):
            ones = {variant: self.made(it, learning, variant) for variant in alike}
            figures |= scorer.figures(tokens, {v.label: adapter_layers(built.profile) for v, built in ones.items()})
            for variant, built in ones.items():
                rows.append(self._row(scheme, heldout, figures, variant.label, self._fields(variant, built)))
                low, high = rows[-1]["ci95"]
                say(f"{scheme}, {variant.label}: {rows[-1]['kl_won_back']:.1%} [{low:.1%}, {high:.1%}]")
        return rows

    def more_bits(self) -> list[dict[str, Any]]:
        """The bytes of adapters spent on more bits or smaller groups, on the same tokens as the adapters' rows."""
        heldout, _ = self.texts(FIRST, 0)
        base, tokens = self.pair(FIRST), Tokens.of(heldout)
        before = self.scorer(base).figures(tokens, {IDENTITY: None})[IDENTITY]
        result = []
        for other in OTHERS:
            folder = rounded_checkpoint(base.reference, self.stages.folder, other, other.label)
            it = Pair(other.label, base.reference, folder)
            figures = {IDENTITY: before, other.label: self.scorer(it).figures(tokens, {IDENTITY: None})[IDENTITY]}
            result.append(
                {"rounding": other.label, "bytes_of_quantized": more_bytes(other)}
                | row(figures, other.label, *groups(heldout))
            )
        return result

    def map_on_top(self, variant: Variant) -> dict[str, Any]:
        """The row of an adapter with a contextual map that was learned on its distribution."""
        heldout, learning = self.texts(FIRST, 2 * self.plan.map_tokens)
        it, some = self.pair(FIRST), first_tokens(learning, self.plan.map_tokens)
        built = self.made(it, learning, variant)
        layers, scorer, tokens = adapter_layers(built.profile), self.scorer(it), Tokens.of(heldout)
        label = f"{variant.label}, map on top"
        learned = learn_map(self.stages, it, scorer, self.weight, some, layers, label)
        figures = scorer.figures(tokens, {IDENTITY: None})
        mapped = figures_with_map(self.weight, scorer, tokens, layers, learned, label)
        figures[label] = mapped or scorer.figures(tokens, {label: layers})[label]
        fields = self._fields(variant, built) | {
            "method": f"{variant.method}, map on top",
            "variant": f"{variant.method}, map on top",
            "tokens_of_map": token_count(some),
            "proposed": mapped is not None,
            "learner": learned.said,
            "seconds_of_map": learned.seconds,
        }
        return self._row(FIRST, heldout, figures, label, fields)

    def shrunk_map(self) -> dict[str, Any]:
        """A contextual profile without any adapter, shrunk where its features are far from what was learned."""
        heldout, learning = self.texts(FIRST, 2 * self.plan.map_tokens)
        it, some = self.pair(FIRST), first_tokens(learning, self.plan.map_tokens)
        scorer = self.scorer(it)
        learned = learn_map(self.stages, it, scorer, self.weight, some, None, "contextual, no adapter")
        if learned.profile is None:
            return {}
        kinds = plain_answers(self.stages, it, heldout).sampled
        return shrink.compare(self.weight, scorer, learned.profile, some, {"open": heldout, **kinds})

    def at_the_engine(self, variant: Variant) -> dict[str, Any]:
        """The adapter served by vLLM; of all but the first, only what people see."""
        it = self.pair(FIRST)
        built = self.made(it, self.learning(FIRST, variant), variant)
        heldout = self.texts(FIRST, 0)[0] if variant == self.plan.served[0] else []
        return served(self.stages, it, self.scorer(it), built.profile, heldout, variant.label)

    def _fields(self, variant: Variant, built: Made) -> dict[str, Any]:
        return {
            "family": "adapter",
            "variant": variant.method,
            "method": variant.method,
            "rank": variant.rank,
            "max_rank": max_rank(built.profile),
            "tokens": built.tokens,
            "tokens_distilled": variant.distilled,
            "distillation": built.report.get("distillation"),
            "bytes": adapter_bytes(built.profile),
            "bytes_of_quantized": adapter_bytes(built.profile) / built.report["quantized_bytes"],
            "engine_bytes_of_quantized": built.report["engine_bytes_share"],
            "reference": REFERENCE,
            "seconds": built.seconds,
            "cpu_seconds": built.cpu_seconds,
        }

    def _row(
        self, scheme: str, texts: Sequence[Written], figures: Mapping[str, Figures], label: str, fields: dict[str, Any]
    ) -> dict[str, Any]:
        said = {"compression": scheme, "promoted": False, "proposed": False, "chosen": False, "learner": {}}
        return said | fields | row(figures, label, *groups(texts))


def labelled(variants: Sequence[Variant], labels: Collection[str]) -> list[Variant]:
    """Those whose label contains one of the labels; all where there are none."""
    return [v for v in variants if not labels or any(label in v.label for label in labels)]


def bytes_at_width_4096(rank: int, bytes_a_number: float) -> float:
    """Of an adapter for all layers of a decoder of width 4,096 (4 square layers, 3 to or from 11,008), as a part of the
    bytes of its 4-bit weights in groups of 64.

    >>> round(bytes_at_width_4096(16, 2.0), 3)
    0.023
    """
    shapes = [(4096, 4096)] * 4 + [(4096, 11008)] * 3
    ours = sum(rank * (inputs + outputs) * bytes_a_number for inputs, outputs in shapes)
    return ours / sum(inputs * outputs * BASE.bits_per_weight / 8.0 for inputs, outputs in shapes)
