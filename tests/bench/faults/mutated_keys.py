"""Clients send `vllm_xargs` made of the plugin's keys, changed at random: nothing is obtained, and nobody is harmed.

It runs the plugin's own code in the process of vLLM's API server, with a stand-in for the engine, so it needs vLLM's
types. The plugin measures alone, and samples every request.
"""

from __future__ import annotations

import dataclasses
import random
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from tests.bench.faults import Row

from hemostat_calibration.engine_keys import ACTING_KEYS, KEYS, MAC_KEY, is_signed, signed
from hemostat_engine import xargs

NAME = "mutated_keys"
TAKES = "3 minutes"
REQUESTS = 106_000
"""The number of requests. Some 101,000 of them are mutated; the rest have the keys of other requests unchanged."""
SEED = 44
EVERY = 100
"""The number of mutated requests between two of somebody else."""
SECONDS = 0.1
"""The simulated time between two requests, so that the plugin's rate does not end the attack."""
GROWTH_BYTES = 1 << 18

OURS, THEIRS = "a" * 32, "b" * 32
ASKED: list[dict[str, Any]] = [
    {"hemostat_tap": "theirs"},
    {"hemostat_tap": "theirs", "hemostat_tap_top": "8"},
    {"hemostat_force": [5, 3]},
    {"hemostat_kv_precision": 1},
    {"hemostat_tap": "theirs", "hemostat_tap_top": 2, "hemostat_force": [1], "hemostat_kv_precision": "1"},
]
SEEN = [signed(asked, OURS, f"salt{n}") for n, asked in enumerate(ASKED)]
"""Keys of the control process with their MAC. A client sees none of them; the attack has them nevertheless."""
ODD: list[Any] = [
    *("", "n", "x" * 65, "x" * 3000, "\x00", "\ud800", "ÿ", "1٣", "on", "off", "0" * 32, "nan", "../..", "%s{0}"),
    *(0, -1, 1, 2**63, 10**400, True, False, None, 0.5, float("nan"), float("inf"), -0.0),
    *([], [[]], [1], [-1], [True], [None], ["1"], [2**64], [1] * 500, {}, {"hemostat_tap": "n"}),
]
NAMES = [*KEYS, "HEMOSTAT_TAP", "hemostat_tap ", " hemostat_tap", "hemostat-tap", "hemostat_", "hemostat.tap", "theirs"]


def _replace(draw: random.Random, keys: dict[str, Any]) -> None:
    keys[draw.choice(NAMES)] = draw.choice(ODD)


def _drop(draw: random.Random, keys: dict[str, Any]) -> None:
    if keys:
        del keys[draw.choice(list(keys))]


def _add(draw: random.Random, keys: dict[str, Any]) -> None:
    keys.update(draw.choice(ASKED))


def _other_mac(draw: random.Random, keys: dict[str, Any]) -> None:
    keys[MAC_KEY] = draw.choice(SEEN)[MAC_KEY]


def _own_mac(draw: random.Random, keys: dict[str, Any]) -> None:
    try:
        keys[MAC_KEY] = signed(keys, THEIRS, draw.choice(["", "salt0", "x" * 40]))[MAC_KEY]
    except UnicodeEncodeError:
        return


def _changed_mac(draw: random.Random, keys: dict[str, Any]) -> None:
    mac = keys.get(MAC_KEY)
    if isinstance(mac, str) and mac:
        at = draw.randrange(len(mac))
        keys[MAC_KEY] = draw.choice(
            [mac[:at], mac[:at] + draw.choice("0af.é\x00 ") + mac[at + 1 :], mac.upper(), mac * 2]
        )


def _other_type(draw: random.Random, keys: dict[str, Any]) -> None:
    if keys:
        name = draw.choice(list(keys))
        keys[name] = draw.choice([str, repr, lambda value: [value], lambda value: {"": value}])(keys[name])


MUTATIONS: list[Callable[[random.Random, dict[str, Any]], None]] = [
    *(_replace, _replace, _drop, _add, _other_mac, _own_mac, _changed_mac, _other_type)
]


def mutated(draw: random.Random) -> dict[str, Any]:
    """Returns what a client sends in `vllm_xargs`."""
    keys = dict(draw.choice([*ASKED, *SEEN, {}]))
    for _ in range(draw.randint(1, 5)):
        draw.choice(MUTATIONS)(draw, keys)
    return keys


def acting(keys: dict[str, Any]) -> str:
    return repr([(key, keys[key]) for key in ACTING_KEYS if keys.get(key) is not None])


def is_replayed(keys: dict[str, Any]) -> bool:
    """Returns True if these are the control process's own keys and MAC, unchanged."""
    return any(keys.get(MAC_KEY) == seen[MAC_KEY] and acting(keys) == acting(seen) for seen in SEEN)


def attack(number: int, seed: int = SEED) -> Counter[str]:
    """Sends so many requests; returns what was found, by name. Names of what must not be are sentences."""
    from tests.support.async_llm import params
    from tests.support.passive_server import POLICY, TOKENS, Server, run
    from vllm.exceptions import VLLMValidationError

    from hemostat_engine.processor import LogitsProcessor

    draw, found = random.Random(seed), Counter[str]()
    policy = dataclasses.replace(POLICY, tap=True)
    server = Server(policy)

    def serve(given: Any) -> list[Any]:
        server.now += SECONDS
        server.secrets.update([OURS])
        server.sampler.heard("http://control", policy, "prefix")
        server.engine.given.clear()
        return [output.outputs for output in run(server.generate(server.engine, TOKENS, given, "cmpl-1-0"))[0]]

    plain = serve(params())
    server.recorded()
    for n in range(number):
        keys = mutated(draw)
        if n == number - number // 8:
            tracemalloc.start()  # it makes everything slow, so that it looks at the end of the attack only
        if is_replayed(keys):
            found["replayed"] += 1
            continue
        found["sent"] += 1
        try:
            given = params(keys)
        except VLLMValidationError:
            found["refused"] += 1  # by vLLM itself, before a plugin sees it
            continue
        found["the keys count as signed"] += is_signed(keys, [OURS])
        try:
            LogitsProcessor.validate_params(given)
            asked = xargs.parse(keys, signed=server.secrets.signed(keys))
            found["the plugin acts on them"] += bool(
                asked.nonce is not None or asked.top is not None or asked.forced or asked.precision
            )
        except ValueError as refused:
            found["refused"] += 1
            # The refused value, which is the client's own text, may have any words.
            named = any(f"vllm_xargs.{key} " in str(refused) for key in (*ACTING_KEYS, MAC_KEY))
            found["the refusal names an acting key"] += named
        found["the answer differs"] += serve(given) != plain
        recorded = server.recorded()
        found["sampled"] += len(recorded)
        for answer in recorded:
            (sent,) = server.engine.given
            theirs = {key: value for key, value in keys.items() if key not in (*ACTING_KEYS, MAC_KEY)}
            own = {key: value for key, value in sent.extra_args.items() if key not in theirs}
            found["a nonce is the client's"] += not answer["nonce"].startswith("prefix-")
            found["the client's keys reach the engine"] += own.keys() != {"hemostat_tap", MAC_KEY}
            found["the engine is asked for more"] += own.get("hemostat_tap") != answer["nonce"]
        if n % EVERY == 0:
            found["others"] += 1
            found["another request's answer differs"] += serve(params()) != plain
            found["another request is not sampled"] += len(server.recorded()) != 1
    found["memory grows"] += tracemalloc.get_traced_memory()[0] > GROWTH_BYTES
    tracemalloc.stop()
    found["a request was lost to an error"] += server.unscored().get("hook_error", 0) + server.queue.dropped
    return found


def harm(found: Counter[str]) -> dict[str, int]:
    """Returns what must not be and was found."""
    return {name: count for name, count in found.items() if " " in name and count}


def rows() -> Iterator[Row]:
    found = attack(REQUESTS)
    case = f"{found['sent']:,} mutated `vllm_xargs`, with MACs of other requests: requests for which the plugin acts"
    told = "; ".join(f"{name}: {count}" for name, count in harm(found).items()) or "0"
    told += f"; {found['others']} requests of others as without the attack, memory flat" if told == "0" else ""
    yield Row(case, "", told, "0", not harm(found) and found["others"] > 0 and found["sampled"] > 0)
