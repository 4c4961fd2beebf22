"""Traffic of one domain, code or JSON: an adapter from it, one from all traffic, the compression calibrated on it, and
more bits.

`--judge code` and `--judge json` measure there; without it the same checkpoints are measured on open questions, which
the compression and an adapter without a domain are calibrated on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from hemostat.checkpoints.texts import Text

from . import adapters, quantization
from .cases import Bench, Case, Must
from .texts import Domain, calibration

NAME = "domain"
START = "W4A16 descent"
MORE_BITS = "5 bits descent"
RANK = 16
GENERAL, ALL = f"{START}, rank {RANK}", f"{START}, rank {RANK} from all"
DOMAINS = (Domain.CODE, Domain.JSON)


def cases(bench: Bench) -> Sequence[Case]:
    # Of two by one name the one that makes the checkpoint, and not a copy of it: a copy would be made of the copy.
    known = {case.name: case for case in (*adapters.cases(bench), *quantization.cases(bench))}
    start, general = known[START], known[GENERAL]
    result = [Case(START, start.size, partial(bench.copied, start)), known[MORE_BITS], general]
    result += [Case(_calibrated_on(domain), start.size, partial(_calibrated, bench, domain)) for domain in DOMAINS]
    for name, domains in (*((_adapter_from(domain), (domain,)) for domain in DOMAINS), (ALL, tuple(Domain))):
        result.append(Case(name, general.size, partial(_adapted, bench, start, domains), of=START))
    return result


def musts() -> Sequence[Must]:
    """Which is better is the question: differences are printed."""
    own = [_adapter_from(domain) for domain in DOMAINS]
    pairs = [(name, other) for name in own for other in (GENERAL, ALL)]
    pairs += [(ALL, GENERAL), *((_calibrated_on(domain), START) for domain in DOMAINS)]
    return [Must(*pair, asked=True) for pair in pairs]


def _calibrated_on(domain: Domain) -> str:
    return f"{START}, calibrated on {domain}"


def _adapter_from(domain: Domain) -> str:
    return f"{GENERAL} from {domain}"


def _texts(bench: Bench, domain: Domain) -> list[Text]:
    return calibration(bench.reference, bench.folder / "texts", len(bench.learn), bench.seed, domain)


def _calibrated(bench: Bench, domain: Domain, folder: Path) -> None:
    known = {case.name: case for case in quantization.cases(replace(bench, learn=_texts(bench, domain)))}
    known[START].make(folder)


def _adapted(bench: Bench, start: Case, domains: Sequence[Domain], folder: Path) -> None:
    """From as many texts of each domain; the number of all is that of the texts that the start was calibrated on."""
    each = len(bench.learn) // len(domains)
    learn = [text for domain in domains for text in _texts(bench, domain)[:each]]
    adapters.adapted(bench, start, RANK, False, folder, learn)
