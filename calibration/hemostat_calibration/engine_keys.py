"""The keys of `vllm_xargs` that the engine's plugin reads, and how the control process's own requests are recognized.

There are two classes:

- **Open keys** (`OPEN_KEYS`), which any client may send. `hemostat` names the profile of the request itself. It chooses
  among the versions that the control process has handed to the engine, changes only the client's own answer, and the
  plugin fetches unknown versions at a bounded rate. Leaving it out is how a client opts out. `hemostat_shadow: "off"`
  keeps the request from being sampled, as the header `X-Hemostat-Shadow` does where it is read.
- **Acting keys** (`ACTING_KEYS`), which make the plugin do something: hand out logits and tokens, force tokens, read
  the KV cache, compute checksums of the weights. What they use is limited, so that a client could take it from others.
  The plugin acts on them only where `MAC_KEY` has their MAC under a secret of the control process, which relays get
  with the policy and engines when they report. A relay removes a client's acting keys from the requests that it
  rewrites.

The MAC covers all acting keys of the request and a number that is used once, so that keys of one request cannot be put
together with the keys of another.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Iterable, Mapping
from typing import Any

PROFILE_KEY = "hemostat"
SHADOW_KEY = "hemostat_shadow"
TAP_KEY = "hemostat_tap"
TAP_TOP_KEY = "hemostat_tap_top"
FORCE_KEY = "hemostat_force"
PRECISION_KEY = "hemostat_kv_precision"
CHECKSUMS_KEY = "hemostat_checksums"
MAC_KEY = "hemostat_mac"

OPEN_KEYS = (PROFILE_KEY, SHADOW_KEY)
ACTING_KEYS = (TAP_KEY, TAP_TOP_KEY, FORCE_KEY, PRECISION_KEY, CHECKSUMS_KEY)
KEYS = frozenset((*OPEN_KEYS, *ACTING_KEYS, MAC_KEY))

SECRET_CHARACTERS = 32
"""The length of a secret: 128 random bits, as hex digits."""
MAX_SALT = 32
_MAC_CHARACTERS = 32
_SEPARATOR = "."


def acts(xargs: Mapping[str, Any]) -> bool:
    """Returns True if a key is present that would make the plugin do something.

    >>> acts({"hemostat": "0" * 32}), acts({"hemostat_tap": "n"}), acts({"hemostat_tap": None})
    (False, True, False)
    """
    return any(xargs.get(key) is not None for key in ACTING_KEYS)


def signed(xargs: Mapping[str, Any], secret: str, salt: str) -> dict[str, Any]:
    """Returns the xargs with the MAC of their acting keys. salt: unique to the request; letters and digits.

    >>> signed({"hemostat_tap": "n"}, "0" * 32, "a")["hemostat_mac"]
    'a.aade49c6c76f944508a5d3f05b8599d1'
    """
    return {**xargs, MAC_KEY: f"{salt}{_SEPARATOR}{_mac(xargs, secret, salt)}"}


def is_signed(xargs: Mapping[str, Any], secrets: Iterable[str]) -> bool:
    """Returns True if `MAC_KEY` has the MAC of the acting keys under one of the secrets.

    >>> sent = signed({"hemostat_tap": "n"}, "s" * 32, "a")
    >>> is_signed(sent, ["s" * 32]), is_signed(sent, ["t" * 32]), is_signed(sent | {"hemostat_force": [1]}, ["s" * 32])
    (True, False, False)
    """
    given = xargs.get(MAC_KEY)
    if not isinstance(given, str) or not given.isascii() or len(given) > MAX_SALT + 1 + _MAC_CHARACTERS:
        return False
    salt, _, mac = given.partition(_SEPARATOR)
    return any(hmac.compare_digest(_mac(xargs, secret, salt), mac) for secret in secrets)


def without_acting(xargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the xargs without acting keys and without a MAC.

    >>> without_acting({"hemostat": "0", "hemostat_force": [1], "hemostat_mac": "", "theirs": 1})
    {'hemostat': '0', 'theirs': 1}
    """
    return {key: value for key, value in xargs.items() if key not in ACTING_KEYS and key != MAC_KEY}


def _mac(xargs: Mapping[str, Any], secret: str, salt: str) -> str:
    """Returns the MAC over JSON, in which a number and its text differ, as in the request."""
    acting = [[key, xargs[key]] for key in ACTING_KEYS if xargs.get(key) is not None]
    try:
        message = json.dumps([salt, acting], separators=(",", ":"))
    except (TypeError, ValueError):
        message = ""
    return hmac.new(secret.encode(), message.encode(), hashlib.sha256).hexdigest()[:_MAC_CHARACTERS]
