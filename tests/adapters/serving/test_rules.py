"""The rules of slots, the verdicts of the probes, and the shared folder: without a server."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hemostat.adapters.serving import loading, verdicts
from hemostat.adapters.serving.server import Completed
from hemostat.adapters.serving.slots import complete, held_everywhere, room
from hemostat.adapters.serving.verdicts import Moves, moves
from hemostat.engines.messages import LoraState, RankReport

A, B = "a" * 32, "b" * 32


def report(
    boot: str = "x", rank: int = 0, size: int = 1, adapters: tuple[str, ...] = (), lora: LoraState | None = None
) -> RankReport:
    return RankReport(boot, rank, size, [], 100, {}, "v1", "0.32.0", adapters=list(adapters), lora=lora)


def lora(slots: int = 2, *, grouped: bool = False, was_full: bool = False, max_rank: int = 16) -> LoraState:
    return LoraState(slots, max_rank, grouped, 0, was_full)


@pytest.mark.parametrize(
    ("reports", "others", "slots", "capacity", "problem"),
    [
        ([], 0, None, None, ""),
        ([], 0, 4, 3, ""),
        ([], 3, 2, 1, ""),
        ([report()], 0, None, None, ""),
        ([report(lora=lora(4))], 1, None, 2, ""),
        ([report(lora=lora(4)), report("y", lora=lora(3))], 0, None, 2, ""),
        ([report(lora=lora(4)), report("y")], 0, None, 0, "1 of 2 engines report no adapters"),
        ([report(lora=lora(1))], 0, None, 0, "set --max-loras 2"),
        ([report(lora=lora(2))], 1, None, 0, "set --max-loras 3"),
        ([report(lora=lora(2, was_full=True))], 0, None, 0, "restart vLLM with --max-loras 3"),
        ([report(lora=lora(2, was_full=True, grouped=True))], 0, None, 1, ""),
    ],
)
def test_a_slot_is_left_free_and_the_clients_own_adapters_count(
    reports: list[RankReport], others: int, slots: int | None, capacity: int | None, problem: str
) -> None:
    result = room(reports, others, slots)
    assert result.capacity == capacity
    assert problem in result.problem
    assert bool(problem) == bool(result.problem)


def test_the_limit_depends_on_how_the_server_was_started_not_on_what_clients_load() -> None:
    assert [room([], others, 4).limit for others in (0, 2, 3)] == [3, 3, 3]
    assert room([], 0).limit is None
    assert [room([report(lora=lora(slots))], 1).limit for slots in (4, 2, 1)] == [3, 1, 0]
    assert room([report(lora=lora(3, was_full=True))], 0).limit == 2
    assert room([report(lora=lora(4)), report("y")], 0).limit is None, "one reports no adapters"


def test_a_version_is_held_where_every_reporting_rank_holds_it() -> None:
    ranks = [report("x", 0, 2, (A, B), lora()), report("x", 1, 2, (B,), lora())]
    assert held_everywhere(ranks, frozenset({A, B})) == {B}
    assert held_everywhere([report()], frozenset({A})) == {A}, "it does not report adapters"
    assert complete(ranks)
    assert not complete(ranks[:1])


def row(tokens: list[int], shift: float = 0.0) -> Completed:
    return Completed(tokens, [-1.0 + shift] * len(tokens), [{token: -1.0 + shift, 0: -3.0} for token in tokens])


def test_rows_are_compared_up_to_their_first_different_token() -> None:
    alone = row([1, 2, 3, 4])
    assert moves([alone], [row([1, 2])]) == Moves(0.0, 0.0, 0.0, 0, 1)
    assert moves([alone], [row([1, 2], 0.25)]) == Moves(0.25, 0.25, 0.125, 0, 1)
    assert moves([alone], [row([1, 9, 9])]) == Moves(1.0, 2.0, 0.5, 1, 1), "to the least of those that are listed"
    assert moves([alone], [row([1, 2], float("nan"))]).mean == float("inf")


@pytest.mark.parametrize(
    ("noise", "beside", "passed"),
    [
        (Moves(0.0, 0.0, 0.0, 0, 8), Moves(0.0, 0.0, 0.0, 0, 8), True),
        (Moves(0.0, 0.0, 0.0, 0, 8), Moves(0.01, 0.3, 0.08, 1, 8), False),
        (Moves(0.0, 0.0, 0.0, 0, 8), Moves(0.0009, 0.02, 0.007, 1, 8), False),
        (Moves(0.02, 0.1, 0.03, 1, 8), Moves(0.03, 0.1, 0.05, 2, 8), True),
        (Moves(0.02, 0.1, 0.03, 1, 8), Moves(0.2, 1.0, 0.3, 3, 8), False),
        (Moves(0.02, 0.1, 0.03, 1, 8), Moves(0.04, 0.1, 0.09, 1, 8), False),
        (Moves(0.06, 0.3, 0.09, 1, 8), Moves(0.06, 0.3, 0.09, 1, 8), False),
    ],
)
def test_isolation_allows_what_requests_without_adapters_do_to_each_other(
    noise: Moves, beside: Moves, passed: bool
) -> None:
    assert verdicts.isolation(noise, beside).passed == passed


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.02])
def test_isolation_finds_one_row_of_four_that_gets_an_adapter(noise: float) -> None:
    """noise: mean of |Δ|. 200 draws of 8 rows of 16 tokens; an adapter moves a row's log-probabilities by 0.2."""
    drawn = np.random.default_rng(3)
    alone = [row([1] * 16) for _ in range(8)]
    passed = {"left alone": 0, "one of four moved": 0}
    for _ in range(200):
        for name, rows in (("left alone", 0), ("one of four moved", 2)):
            result = []
            for moved in range(-8, 8):
                shift = drawn.laplace(0.0, noise, 16) if noise else np.zeros(16)
                shift += drawn.laplace(0.0, 0.2, 16) * (0 <= moved < rows)
                result.append(replace(alone[0], logprobs=(-1.0 + shift).tolist()))
            passed[name] += verdicts.isolation(moves(alone, result[:8]), moves(alone, result[8:])).passed
    assert passed["left alone"] >= 199
    assert passed["one of four moved"] <= 1


@pytest.mark.parametrize("effect", [0.1, 0.3, 1.0])
@pytest.mark.parametrize("noise", [0.0, 0.05, 0.1])
def test_agreement_passes_noise_and_finds_wrong_factors(effect: float, noise: float) -> None:
    """noise: standard deviation of what each log-probability at the engine is off by. 200 draws of 250 tokens."""
    drawn = np.random.default_rng(7)
    passed = {1.0: 0, 1.3: 0, 2.0: 0, 0.0: 0, -1.0: 0}
    for _ in range(200):
        base, change = drawn.normal(-2, 1, 250), effect * drawn.standard_normal(250)
        for factor in passed:
            engine = (
                base + noise * drawn.standard_normal(250),
                base + factor * change + noise * drawn.standard_normal(250),
            )
            passed[factor] += verdicts.agreement(engine, (base, base + change)).passed
    assert passed[1.0] >= 198
    if effect >= 10.0 * noise:
        assert passed[1.3] <= 2
    if effect > noise:
        assert passed[2.0] + passed[0.0] + passed[-1.0] <= 6


def test_agreement_names_a_copy_of_another_model_and_what_is_not_finite() -> None:
    base = np.linspace(-3, -1, 250)
    verdict = verdicts.agreement((base, base), (base + 0.2, base))
    assert (verdict.passed, verdict.base_differs) == (False, True)
    assert verdicts.agreement((base, base), (base + 0.2, base + 0.2), noise=0.05).passed, "the engine's own noise"
    broken = base.copy()
    broken[3] = np.nan
    verdict = verdicts.agreement((base, broken), (base, base))
    assert (verdict.passed, verdict.base_differs) == (False, False)
    assert "not finite" in verdict.detail


FILES = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights"}


def test_a_version_s_folder_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = tmp_path / "shared"

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            loading.write(shared, A, FILES, ())
    assert not (shared / A).exists()
    loading.write(shared, A, FILES, ())
    assert {path.name: path.read_bytes() for path in (shared / A).iterdir()} == FILES
    (shared / A / "adapter_model.safetensors").write_bytes(b"half")
    loading.write(shared, A, FILES, ())
    assert (shared / A / "adapter_model.safetensors").read_bytes() == b"weights"


def test_old_folders_are_removed_and_those_in_use_stay(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    versions = [f"{n:032x}" for n in range(loading.MAX_VERSIONS + 4)]
    for n, version in enumerate(versions):
        loading.write(tmp_path, version, FILES, {versions[0]})
        os.utime(tmp_path / version, (n, n))
    left = {path.name for path in tmp_path.iterdir()}
    assert {"theirs", versions[0], versions[-1]} <= left
    assert versions[1] not in left
    assert len(left) <= loading.MAX_VERSIONS + 3
