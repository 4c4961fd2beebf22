"""Which models stored evidence is about."""

from __future__ import annotations

import json

from hemostat.reference.pair import ModelPair

UNKNOWN = "{}"
"""Nothing is known of the models yet."""
WEIGHTS = "weights"


def model_identity(pair: ModelPair, weights: str = "") -> str:
    """JSON: name and vocabulary of the compressed model, the path that its server loaded it from, the digest of the
    reference, and the fingerprint of the compressed weights ("" where one is not known).

    weights: `engines.served_weights.ServedWeights`.
    """
    assert pair.reference is not None
    found = {
        WEIGHTS: weights,
        "model": pair.name,
        "vocab_size": pair.reference.vocab_size,
        "compressed": pair.root,
        "reference": pair.reference.digest,
    }
    return json.dumps(found, sort_keys=True)


def same_models(stored: str, now: str) -> bool:
    """Of two `model_identity`: whatever both know is equal. False where the stored one is damaged.

    >>> same_models('{"model": "m", "compressed": ""}', '{"model": "m", "compressed": "/models/w4a16"}')
    True
    """
    try:
        known = {name: value for name, value in json.loads(stored).items() if value}
        return all(value == known.get(name, value) for name, value in json.loads(now).items() if value)
    except (ValueError, AttributeError):
        return False


def together(stored: str | None, now: str) -> str:
    """Of two `model_identity` of the same models: what either knows.

    >>> together('{"model": "m", "weights": "1"}', '{"model": "m", "weights": ""}')
    '{"model": "m", "weights": "1"}'
    """
    known = {name: value for name, value in json.loads(stored or UNKNOWN).items() if value}
    return json.dumps({**json.loads(now), **known}, sort_keys=True)


def without_weights(identity: str) -> tuple[str, str]:
    """A `model_identity` as it is where no weights are known, and the weights.

    >>> without_weights('{"model": "m", "weights": "1"}')
    ('{"model": "m"}', '1')
    """
    found = json.loads(identity)
    weights = found.pop(WEIGHTS, "")
    return json.dumps(found, sort_keys=True), str(weights)


def with_weights(identity: str, weights: str) -> str:
    """A `model_identity` with these weights.

    >>> with_weights('{"model": "m"}', "1")
    '{"model": "m", "weights": "1"}'
    """
    return json.dumps({**json.loads(identity), WEIGHTS: weights}, sort_keys=True)
