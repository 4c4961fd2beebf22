"""Decides which profiles are proposed, and when: whoever learns a family asks `accepts`, and hands a profile to
`propose`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from hemostat.config.schema import Calibration
from hemostat.profiles.candidates import Proposed
from hemostat.profiles.catalogue import Catalogue
from hemostat.profiles.lifecycle import Lifecycle
from hemostat.profiles.persistence import StateWriter, stored_proposed, whole_number
from hemostat.profiles.serving import ServingState
from hemostat.profiles.trials import Trials
from hemostat.store.protocol import StateKey
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_calibration.profiles.transform import anchor_set

log = logging.getLogger("hemostat.calibration")

MIN_TOKEN_GROWTH = 2
"""A new proposal is made when this many times more tokens were learned from: each test spends some of alpha."""
MIN_TOKEN_GROWTH_UNDER_TEST = 4
"""The same while the last proposal is still in the queue: the new one would only wait for the end of its test."""
MAX_TOKENS_BETWEEN_PROPOSALS = 500_000
"""The largest number of tokens between two proposals: more are never waited for."""


class Proposals:
    """Owns the numbers of tokens that the last proposals were learned from."""

    def __init__(
        self,
        settings: Calibration,
        *,
        catalogue: Catalogue,
        serving: ServingState,
        trials: Trials,
        lifecycle: Lifecycle,
        writer: StateWriter,
        min_tokens: Mapping[str, int],
    ) -> None:
        """min_tokens: by family, the number of tokens below which nothing is proposed; a family that is not named
        decides that by itself.
        """
        self._settings = settings
        self._min_tokens = min_tokens
        self._catalogue = catalogue
        self._serving = serving
        self._trials = trials
        self._lifecycle = lifecycle
        self._writer = writer
        self._proposed_at: dict[str, int] = {}
        """The number of tokens that the last proposal was learned from, by family."""

    def restart(self) -> None:
        """Begins anew, since the model is another: the next proposals may come early.

        A profile that still serves or is tested was kept from an earlier run, which had learned more than this one will
        have for a while: only more than that is worth a test.
        """
        self._set_proposed(self._tokens_in_use())

    def restore_proposed(self, states: Mapping[StateKey, str | None]) -> None:
        """Goes on from the numbers of tokens that the last proposals of an earlier run were learned from, by family."""
        self._proposed_at = stored_proposed(states)

    def update_proposed(self) -> None:
        """Counts what serves, and what was proposed and is tested or waits, as the last proposal of its family, learned
        from the tokens that its metadata says."""
        tokens = dict(self._proposed_at)
        for family, learned in self._tokens_in_use().items():
            tokens[family] = max(learned, tokens.get(family, 0))
        self._set_proposed(tokens)

    def _tokens_in_use(self) -> dict[str, int]:
        """Returns the largest number of tokens that what serves, or was proposed and is in the queue, was learned from,
        by family."""
        result: dict[str, int] = {}
        proposed = [candidate.version for candidate in self._trials.queue if isinstance(candidate.source, Proposed)]
        for version in [*self._serving.versions, *proposed]:
            profile = self._catalogue.get(version)
            if profile is not None:
                tokens = whole_number(profile.metadata.get("tokens"))
                result[profile.family] = max(tokens, result.get(profile.family, 0))
        return result

    def _set_proposed(self, tokens: dict[str, int]) -> None:
        if tokens != self._proposed_at:
            self._proposed_at = tokens
            self._writer.write_proposed(tokens)

    # --- what learners call ----------------------------------------------------------------------------------------

    def accepts(self, family: str, tokens: int) -> bool:
        """Returns True if a profile of a family that was learned from `tokens` tokens in all would be tested now: the
        first one from `min_tokens` of the family, further ones when twice as much is known (four times, while the last
        one is tested).
        """
        return tokens >= self._min_tokens.get(family, 0) and self._serving.active and self._due(family, tokens)

    def is_testing(self, family: str) -> bool:
        """Returns True if a proposal of this family that serves nowhere yet is under test, or waits for it."""
        return self._trials.has_proposal(family)

    def propose(self, profile: CalibrationProfile, why: str, report: Mapping[str, Any]) -> bool:
        """Tests a profile, as soon as the test of the last one of its family has ended. Returns False if it is not
        accepted now.

        report: JSON-ready, shown as the event's evidence; `tokens` is the number of tokens learned from in all. Raises
        InvalidProfileError for another model's profile.
        """
        tokens = int(report["tokens"])
        if not self.accepts(profile.family, tokens):
            return False
        self._lifecycle.require_fit(profile)
        self._set_proposed(self._proposed_at | {profile.family: tokens})
        return self._lifecycle.replace_proposals(profile, why, dict(report))

    # --- the probe -------------------------------------------------------------------------------------------------

    def set_probe(self, profile: CalibrationProfile, *, restored: bool = False) -> None:
        """Sets the probe when the learner of a family with anchors begins: engines are to hold this profile, and report
        the logits of its anchors.

        restored: it goes on from what the last one had learned. Otherwise that is lost, so that where no profile of the
        family is tested or serves, the next proposal need not be learned from more.
        """
        before, self._catalogue.probe = self._catalogue.probe, profile.version
        if before is not None and before != profile.version:
            self._lifecycle.forget(before)
        self._lifecycle.hold(profile)
        selected = [self._catalogue[version] for version in self._serving.versions]
        alike = [serving for serving in selected if serving.family == profile.family]
        if not restored and not alike and not self._trials.has_proposal(profile.family):
            self._set_proposed({family: n for family, n in self._proposed_at.items() if family != profile.family})
        for serving in alike:
            if anchor_set(serving) != anchor_set(profile):
                log.warning(
                    "profile %s, which serves, reads other anchors than the learner: engines report the logits of "
                    "the profile's anchors, and the learner uses only the top ids until it is rolled back",
                    serving.version,
                )

    # --- bookkeeping -----------------------------------------------------------------------------------------------

    def _due(self, family: str, tokens: int) -> bool:
        """Returns True if enough was learned since the last proposal for another test to be worth its alpha."""
        last = self._proposed_at.get(family, 0)
        if self._trials.has_proposal(family):
            enough = MIN_TOKEN_GROWTH_UNDER_TEST * last
        elif self._serving.rolled_back:
            enough = last + self._min_tokens.get(family, self._settings.min_tokens)
        else:
            enough = MIN_TOKEN_GROWTH * last
        return tokens >= min(enough, last + MAX_TOKENS_BETWEEN_PROPOSALS)
