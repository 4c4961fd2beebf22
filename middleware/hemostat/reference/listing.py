"""Reads a server's list of models into its base models: which names are one model, and which adapters it has."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from hemostat.openai.model_name import is_version
from hemostat.reference.match import same_model
from hemostat.reference.pair import ModelPair
from hemostat.reference.references import References
from hemostat.reference.server import ModelCard, VllmServer

MAX_MODELS = 64
"""The largest number of base models that are followed: the first in the server's list."""


def without_own(cards: Iterable[ModelCard]) -> list[ModelCard]:
    """Returns the list without Hemostat's own adapters, which are named by a profile's version."""
    return [card for card in cards if card.parent is None or not is_version(card.id)]


async def served_pairs(
    references: References, server: VllmServer, cards: Iterable[ModelCard], before: Iterable[ModelPair] = ()
) -> list[ModelPair]:
    """Returns the server's base models in its order, each with its reference. Raises ReferenceFailure.

    A name without a reference of its own that is another name of an earlier model belongs to that one.
    before: what was known; it is kept for models that are the same.
    """
    cards, before = list(cards), list(before)
    result: list[ModelPair] = []
    for card in cards:
        if card.parent is not None or any(card.id in pair.names for pair in result) or len(result) >= MAX_MODELS:
            continue
        scorer = references.of(card.id, is_first=not result)
        known = next((pair for pair in before if card.id in pair.names), None)
        if scorer is None and (other := await _same_as(server, card, result, known)) is not None:
            result[result.index(other)] = replace(other, names=other.names | {card.id})
            continue
        pair = ModelPair(card.id, frozenset({card.id}), card.root or "", scorer=scorer)
        if known is not None and (known.name, known.root, known.scorer) == (pair.name, pair.root, scorer):
            pair = replace(known, names=pair.names)
        result.append(pair)
    return with_adapters(result, cards)


async def _same_as(
    server: VllmServer, card: ModelCard, pairs: Iterable[ModelPair], known: ModelPair | None
) -> ModelPair | None:
    """Returns the model of which the card's name is another name."""
    for pair in pairs:
        if card.root and card.root == pair.root:
            was_found = known is not None and known.name == pair.name and known.root == pair.root
            if was_found or await same_model(server, pair.name, card.id):
                return pair
    return None


def with_adapters(pairs: Iterable[ModelPair], cards: Iterable[ModelCard]) -> list[ModelPair]:
    """Returns the pairs with their adapters. Each adapter belongs to the base model that the server names as its
    parent; to the only one, where there is but one: the server may name the parent as the adapter's own files do."""
    pairs, cards = list(pairs), list(cards)
    only = len(pairs) == 1
    return [
        replace(
            pair,
            adapters=frozenset(c.id for c in cards if c.parent is not None and (only or c.parent in pair.names)),
        )
        for pair in pairs
    ]
