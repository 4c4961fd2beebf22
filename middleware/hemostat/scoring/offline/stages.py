"""The stages of scoring (`ScoringStages`), with one reference for all rows and no profiles."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping

from hemostat.reference.pair import ModelPair, ReferenceState, ServedModels
from hemostat.reference.protocol import Reference, ReferenceInfo
from hemostat.scoring.limits import Breakers, TokenBudget
from hemostat.scoring.reference_call import ReferenceCall
from hemostat.scoring.routing import Router
from hemostat.scoring.stages import CandidateCompletion, EngineFeatures, ScoringStages
from hemostat_calibration.arrays import Ids
from hemostat_calibration.profiles.profile import CalibrationProfile

TemplateOf = Callable[[Ids, bytes], bytes]
"""See `PromptTemplates.assign`."""


class OfflineModels:
    """Implements `ServedModelsSource`: all rows belong to one model, and its reference is there.

    adapters: the versions of Hemostat's adapters that rows name; add the ones of a row before it is scored.
    """

    def __init__(self, reference: Reference) -> None:
        self._reference = reference
        self.served = ServedModels()
        self.adapters: set[str] = set()

    def set_pair(self, model: str, info: ReferenceInfo) -> None:
        """Sets the served name of the rows, and the identity of the reference."""
        pair = ModelPair(model, frozenset({model}), scorer=self._reference, reference=info, state=ReferenceState.READY)
        self.served = ServedModels((pair,), model)


class OfflineNeeds:
    """Implements `ScoringNeeds`: distributions only."""

    def __init__(self, models: OfflineModels) -> None:
        self._models = models

    def evaluated_profiles(self) -> tuple[CalibrationProfile, ...]:
        return ()

    def adapters(self) -> Collection[str]:
        return self._models.adapters

    def anchor_sets(self) -> Mapping[str, Ids]:
        return {}

    def needs_hidden_states(self, unit: bytes) -> bool:
        return False


def no_template(prompt: Ids, conversation: bytes) -> bytes:
    """Returns no template: it depends on the rows before, and belongs to what reads them in their order."""
    return b""


def offline_stages(
    models: OfflineModels, template_of: TemplateOf = no_template, max_scored: int | None = None
) -> ScoringStages:
    """Returns the stages. template_of: gives the cluster of alike prompts. max_scored: `shadow.max_scored_tokens`."""
    clock, budget, needs = time.monotonic, TokenBudget(0.0, 1.0), OfflineNeeds(models)
    return ScoringStages(
        Router(models, needs, Breakers(), clock),
        CandidateCompletion(None, budget, clock),
        budget,
        EngineFeatures(needs),
        ReferenceCall(needs, clock),
        template_of,
        clock,
        max_scored=max_scored,
    )
