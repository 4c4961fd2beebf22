"""Running figures against a batch computation over the same records; what is not a number is never one in JSON."""

from __future__ import annotations

import errno
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from tests.support.captures import sized_capture
from tests.support.engine_profiles import make_contextual
from tests.support.records import Truth, log_softmax, make_record
from tests.support.samples import histograms, values
from tests.support.temperature_bias import temperature_bias
from tests.support.world import V, World

from hemostat.measurement.figures import FIGURES, HEADLINE, KL_CAP
from hemostat.measurement.measurements import DECODING_KINDS, KL_EDGES, MAX_VERSIONS, Measurements, Top1
from hemostat.scoring.records_file import RecordsFile
from hemostat_calibration.divergence.gain import gain
from hemostat_calibration.divergence.per_token import calibrated, divergence
from hemostat_calibration.errors import HemostatError
from hemostat_calibration.profiles.profile import CalibrationProfile
from hemostat_calibration.record_checks import validate
from hemostat_calibration.records import Arm, RecoveredDivergence, Sampling, TokenRecord
from hemostat_calibration.statistics.streaming import student_975

WORLD = World(bias=0.6, noise=0.3)


def profile_of(seed: int = 0) -> CalibrationProfile:
    noise = 0.1 * np.random.default_rng(seed).normal(size=V)
    return temperature_bias("m", V, 1.0, noise - WORLD.bias, 1.0)


def records(n: int, profile: CalibrationProfile | None = None) -> list[TokenRecord]:
    result = []
    for seed in range(n):
        truth = WORLD.truth(seed)
        cut = 5 + seed % 30
        truth = Truth(truth.reference[:cut], truth.compressed[:cut], truth.emitted[:cut])
        sampling = Sampling(temperature=0.0 if seed % 3 == 0 else 1.0)
        result.append(make_record(truth, 20, profile=profile, sampling=sampling))
    return result


def batch(values: list[np.ndarray]) -> tuple[float, float]:
    """Mean over all tokens, and half the width of its interval over requests, from all values at once."""
    x = np.array([v.sum() for v in values])
    n = np.array([len(v) for v in values])
    mean, m = x.sum() / n.sum(), len(values)
    deviation = math.sqrt(m / (m - 1) * ((x - mean * n) ** 2).sum()) / n.sum()
    return mean, student_975(m - 1) * deviation


def test_what_was_reported_before_does_not_stay() -> None:
    unasked, asked = Measurements(), Measurements()
    for record in records(6):
        unasked.update(record, None, None)
        asked.update(record, None, None)
        told = asked.summary(None)
        told["kl_nats"] = "scribbled over"
    assert asked.summary(None) == unasked.summary(None)
    assert asked.where() == unasked.where()


def recovered(record: TokenRecord, number: int) -> TokenRecord:
    """In two requests of three the compressed model's distribution was recovered, at most positions."""
    rng = np.random.default_rng(number)
    t = record.tokens
    error = np.where(rng.random(t) < 0.8, 0.001, 1.0)
    recovered_divergence = RecoveredDivergence(
        kl_rc=rng.uniform(0.0, 1.0, t),
        kl_cr=rng.uniform(0.0, 1.0, t),
        js=rng.uniform(0.0, 0.6, t),
        tv=rng.random(t),
        entropy=np.ones(t),
        predicted=error,
        observed=error,
    )
    return validate(replace(record, recovered=recovered_divergence)) if number % 3 else record


@pytest.mark.parametrize("stage", ["raw", "calibrated"])
def test_the_summary_is_what_a_batch_computation_says(stage: str) -> None:
    profile = profile_of()
    given = [recovered(record, i) for i, record in enumerate(records(60, profile))]
    measured = Measurements()
    for record in given:
        measured.update(record, profile, None)
    version = None if stage == "raw" else profile.version
    figures = [divergence(r) if stage == "raw" else calibrated(r, profile) for r in given]
    summary = measured.summary(version)
    assert summary["requests"] == 60
    assert summary["tokens"] == sum(r.tokens for r in given) == measured.tokens
    without = []
    for name, figure in FIGURES.items():
        per_request = [np.asarray(figure.values(f), float) for f in figures]
        available = [v[np.isfinite(v)] for v in per_request if np.isfinite(v).any()]
        if not available:
            assert stage == "calibrated"
            assert name in {"js_nats_estimate", "total_variation_estimate"}
            assert summary[name]["estimate"] is None
            continue
        mean, half = batch(available)
        got = summary[name] if figure.plain else summary[name]["estimate"]
        low, high = summary["ci95"][name] if figure.plain else summary[name]["ci95"]
        v = summary["inflation"][name] if figure.plain else summary[name]["inflation"]
        half *= math.sqrt(v)
        assert got == pytest.approx(mean), name
        if (summary["no_interval"] if figure.plain else summary[name])[name if figure.plain else "no_interval"]:
            assert [low, high] == [None, None]
            without.append(name)
            continue
        # Valid at every look is wider than at one; a constant figure's interval is that of shares unseen.
        assert low <= mean <= high, name
        if half > 0.001 and v < 1.2:
            assert half < high - mean < 8 * half or high == figure.cap, name
            assert half < mean - low < 8 * half or low == figure.lo, name
    assert set(without) <= {"kl_nats_estimate", "reverse_kl_nats_estimate"}, (
        "known at some tokens of some requests only"
    )
    assert summary["kl_nats"]["bound"] == "lower"
    assert summary["kl_nats_estimate"]["bound"] == "estimate"
    assert summary["kl_nats"]["infinite_tokens"] == 0
    assert summary["kl_nats"]["estimate"] <= summary["kl_nats_upper"]["estimate"]
    shift = summary["delta_log_likelihood_nats"]["estimate"]
    assert summary["perplexity_ratio"]["estimate"] == pytest.approx(math.exp(-shift))
    squares = np.concatenate([f.delta_p**2 for f in figures])
    assert summary["delta_p_rms"] == pytest.approx(math.sqrt(np.nanmean(squares)))


@pytest.mark.parametrize("top_k", [4, 20, V])
def test_what_a_reference_would_accept_of_the_compressed_models_tokens(top_k: int) -> None:
    """Against speculative sampling itself: x ~ c is accepted with probability min(1, r(x) / c(x))."""
    truths = [WORLD.truth(seed) for seed in range(100)]
    measured = Measurements()
    for truth in truths:
        measured.update(make_record(truth, top_k), None, None)
    r, c = (
        np.exp(np.concatenate([getattr(truth, model) for truth in truths])) for model in ("reference", "compressed")
    )
    accepted = (c * np.minimum(1.0, r / c)).sum(1).mean()
    summary = measured.summary(None)
    result = summary["draft_acceptance"]
    assert result["lower"] - 1e-9 <= accepted <= result["upper"] + 1e-9
    least = summary["total_variation_upper"]["ci95"] if top_k < V else summary["ci95"]["total_variation"]
    assert result["ci95"] == [1.0 - least[1], 1.0 - summary["ci95"]["total_variation"][0]]
    assert result["ci95"][0] < result["lower"]
    assert result["upper"] < result["ci95"][1]
    assert result["bound"] == ("exact" if top_k == V else "interval")
    assert (result["upper"] - result["lower"] > 0.001) == (top_k < V)


def test_whole_vocabularies_are_exact() -> None:
    measured = Measurements()
    measured.update(make_record(WORLD.truth(0), V), None, None)
    assert measured.summary(None)["kl_nats"]["bound"] == "exact"
    assert measured.summary(None)["kl_nats_estimate"]["bound"] == "exact"


def test_calibrated_equals_raw_while_identity_serves() -> None:
    measured = Measurements()
    for record in records(5):
        measured.update(record, None, None)
    assert measured.summary("0" * 32) == measured.summary(None)
    kl = histograms(measured.samples())
    raw, after = (
        kl["hemostat_token_kl_nats", "reference_compressed", stage, "none"] for stage in ("raw", "calibrated")
    )
    assert raw.counts == after.counts


def test_won_back_is_gain_over_divergence_on_the_same_tokens() -> None:
    profile = profile_of()
    given = records(20, profile)
    measured = Measurements()
    for record in given:
        measured.update(record, profile, None)
    won = of = tokens = 0.0
    for record in given:
        values, raw = gain(record, profile), divergence(record)
        both = values.exact & np.isfinite(raw.estimate_rc)
        won, of, tokens = won + values.lower[both].sum(), of + raw.estimate_rc[both].sum(), tokens + both.sum()
    recovered = measured.recovered(profile.version)
    assert recovered is not None
    assert recovered["estimate"] == pytest.approx(won / of)
    assert 0.3 < won / of < 1.0
    gained = measured.gained(profile.version)
    assert gained is not None
    assert gained["estimate"] == pytest.approx(won / tokens)
    assert gained["ci95"] == [None, None], "20 requests refute nothing yet"
    for record in records(60, profile):
        measured.update(record, profile, None)
    low, high = measured.gained(profile.version)["ci95"]
    assert 0.0 < low < measured.gained(profile.version)["estimate"] < high
    low, high = measured.recovered(profile.version)["ci95"]
    assert 0.0 < low < measured.recovered(profile.version)["estimate"] < high <= 1.0
    assert measured.recovered(None) is None
    assert measured.gained("0" * 32) is None


def test_nothing_is_won_back_while_no_gain_is_exact() -> None:
    profile = profile_of()
    measured = Measurements()
    measured.update(make_record(WORLD.truth(0), 3, reference_k=3), profile, None)
    assert measured.recovered(profile.version) is None


def infinite(divergence_of: str) -> TokenRecord:
    """At the first of three tokens one model gives 0 to what the other thinks possible."""
    a = log_softmax(np.random.default_rng(0).normal(size=(3, 6)))
    b = a.copy()
    a[0, 5] = -np.inf
    a = log_softmax(a)
    reference, compressed = (b, a) if divergence_of == "kl_nats" else (a, b)
    return make_record(Truth(reference, compressed, np.zeros(3, int)), 6)


@pytest.mark.parametrize("name", ["kl_nats", "reverse_kl_nats"])
def test_an_infinite_token_is_counted_and_clipped_in_the_mean(name: str) -> None:
    measured = Measurements()
    measured.update(infinite(name), None, None)
    measured.update(make_record(WORLD.truth(0), 20), None, None)
    summary = measured.summary(None)
    assert summary[name]["infinite_tokens"] == 1
    assert summary[name]["clipped_share"] == pytest.approx(1 / measured.tokens)
    assert KL_CAP / measured.tokens < summary[name]["estimate"] < 10
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    label = "reference_compressed" if name == "kl_nats" else "compressed_reference"
    series = histograms(measured.samples())["hemostat_token_kl_nats", label, "raw", "none"]
    counts, total = series.counts, series.total
    assert counts[-1] == 1, "in the bucket above the last edge"
    assert sum(counts) == measured.tokens
    assert total < 100


@pytest.mark.parametrize("requests", [0, 1, 2])
def test_few_requests_are_json_too(requests: int) -> None:
    measured = Measurements()
    for record in records(requests):
        measured.update(record, profile_of(), None)
    for version in (None, profile_of().version):
        summary = measured.summary(version)
        assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    if requests == 1:
        told = measured.summary(None)
        assert told["kl_nats"]["ci95"] == told["ci95"]["top1_agreement"] == [None, None]
        assert told["kl_nats"]["effective_requests"] is told["effective_requests"]["top1_agreement"] is None


def test_figures_of_profiles_long_unseen_go() -> None:
    measured = Measurements()
    record = records(1)[0]
    many = [profile_of(seed) for seed in range(MAX_VERSIONS + 3)]
    for profile in many:
        measured.update(record, profile, None)
        measured.update(record, many[0], None)
    assert measured.summary(many[0].version)["requests"] == len(many) + 1, "seen all the time"
    assert measured.summary(many[-1].version)["requests"] == 1
    assert [measured.gained(profile.version) is None for profile in many].count(True) == 3


def test_labels_are_bounded() -> None:
    measured = Measurements()
    for n, arm in enumerate([*Arm] * 2):
        record = replace(records(1)[0], arm=arm, model=f"m{n}", label=f"l{n}", route=f"/{n}", request_id=str(n))
        measured.update(record, profile_of(), None)
    assert len(histograms(measured.samples())) == 2 * 2 * 3 + 2 * 3
    tokens = {series[1:]: value for series, value in values(measured.samples()).items() if "scored" in series[0]}
    assert set(tokens) == {(arm, decoding) for arm in ("control", "treated", "none") for decoding in DECODING_KINDS}
    assert sum(tokens.values()) == measured.tokens


def test_same_top1_is_reported_for_greedy_and_sampled_requests_apart() -> None:
    profile = profile_of()
    given = records(12, profile)
    measured = Measurements()
    for record in given:
        measured.update(record, profile, None)
    apart = measured.summary(profile.version)["top1_by_decoding"]
    counted = {
        (series[1], series[3]): value
        for series, value in values(measured.samples()).items()
        if series[0] == "hemostat_top1_agreement_tokens_total" and series[2] == "none"
    }
    for decoding, of in (("greedy", given[::3]), ("sampled", [r for n, r in enumerate(given) if n % 3])):
        tokens = sum(r.tokens for r in of)
        before = sum(divergence(r).top1_agreement.sum() for r in of)
        after = sum(calibrated(r, profile).top1_agreement.sum() for r in of)
        told = apart[decoding]
        assert told["tokens"] == tokens
        assert told["before"]["estimate"] == pytest.approx(before / tokens)
        assert told["after"]["estimate"] == pytest.approx(after / tokens)
        assert told["change"]["estimate"] == pytest.approx((after - before) / tokens)
        assert told["change"]["ci95"] == [None, None], "of 4 and 8 requests"
        assert (counted["raw", decoding], counted["calibrated", decoding]) == (before, after)
    assert apart["sampled"]["after"]["estimate"] > apart["sampled"]["before"]["estimate"]


def test_a_record_counts_in_every_figure_or_in_none() -> None:
    measured = Measurements()
    with pytest.raises(HemostatError):
        measured.update(records(1)[0], temperature_bias("m", V - 30, 1.0, np.zeros(V - 30), 1.0), None)
    assert measured.tokens == 0
    assert measured.summary(None)["requests"] == 0
    assert not any(any(series.counts) for series in histograms(measured.samples()).values())


def test_edges_are_those_of_the_dashboards() -> None:
    result = histograms(Measurements().samples())
    assert {series.edges for (name, *_), series in result.items() if name == "hemostat_token_kl_nats"} == {KL_EDGES}


def test_trajectories_are_of_the_kind_of_text_that_was_written() -> None:
    measured = Measurements()
    given = records(400)
    for record in given:
        measured.update(record, None, None)
    report = measured.survival.report()
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    greedy = sum(record.sampling.greedy for record in given)
    assert report["greedy"]["requests"] == greedy
    assert report["sampled"]["requests"] == 400 - greedy
    first = report["sampled"]["survival"][0]
    kept = [np.exp(min(r.reference_emitted[0] - r.compressed_emitted[0], 0.0)) for r in given if not r.sampling.greedy]
    assert first["tokens"] == 1
    assert first["estimate"] == pytest.approx(np.mean(kept))
    assert first["ci95"][0] < first["estimate"] < first["ci95"][1]
    agreed = np.mean([divergence(r).top1_agreement[0] for r in given if r.sampling.greedy])
    assert report["greedy"]["survival"][0]["estimate"] == pytest.approx(agreed)
    by_tv = report["total_variation"]["survival"][0]
    tv = np.mean([1.0 - divergence(r).bounds.tv.lower[0] for r in given])
    assert by_tv["upper"] == pytest.approx(tv)
    assert by_tv["lower"] <= by_tv["upper"]
    treated = Measurements()
    treated.update(replace(given[1], applied="a" * 32), None, None)
    assert treated.survival.report() == {}, "of the compressed model itself"


def test_figures_stand_apart_by_decoding() -> None:
    measured = Measurements()
    given = records(30)
    for n, record in enumerate(given):
        unknown = Sampling(temperature=math.nan)
        measured.update(replace(record, sampling=unknown) if n % 5 == 4 else record, None, None)
    report = {told["strategy"]: told for told in measured.by_decoding.report()}
    assert list(report) == ["greedy", "t1", "unknown"]
    assert sum(told["requests"] for told in report.values()) == 30
    assert report["unknown"]["drawn_from"] is None
    greedy = [record for n, record in enumerate(given) if record.sampling.greedy and n % 5 != 4]
    differ = 1.0 - np.concatenate([divergence(record).top1_agreement for record in greedy]).mean()
    drawn = report["greedy"]["drawn_from"]["total_variation"]
    assert drawn["lower"] == drawn["upper"] == pytest.approx(differ), "greedily, they differ or they do not"
    at_one = report["t1"]
    assert at_one["drawn_from"]["total_variation"]["lower"] == pytest.approx(at_one["total_variation"], abs=1e-9) or (
        at_one["drawn_from"]["total_variation"]["lower"] > at_one["total_variation"]
    ), "nothing is cut: the sharper of two lower bounds"
    assert at_one["drawn_from"]["unavailable_share"] == 0.0
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    counted = {series[-1] for series in values(measured.samples()) if series[0] == "hemostat_kl_tokens_total"}
    assert counted == set(report)


def test_excess_is_over_both_models_own_noise() -> None:
    measured = Measurements()
    for record in records(5):
        measured.update(record, None, None)
    assert measured.excess() == {}
    assert measured.noise_floor() == {}
    noise = WORLD.truth(1)
    near = make_record(Truth(noise.reference, log_softmax(noise.reference + 1e-3), noise.emitted), 20)
    far = make_record(noise, 20)
    measured.update_noise_floor("compressed", near)
    assert measured.excess() == {}, "one floor is not enough"
    measured.update_noise_floor("reference", far)
    raw, floors = measured.summary(None), measured.noise_floor()
    gauges = values(measured.samples())

    assert measured.excess().keys() == set(HEADLINE) - {"kl_nats_upper", "total_variation", "top1_agreement"}
    for name, excess in measured.excess().items():
        told, *own = (s[name]["estimate"] for s in (raw, *floors.values()))
        assert excess["floor"] == pytest.approx(sum(own) / 2), "two noisy computations in each"
        assert excess["estimate"] == pytest.approx(told - sum(own) / 2)
        assert excess["ci95"] == [None, None], "one request of each floor"
        assert ("hemostat_divergence", name, "excess", "low") not in gauges
    told = gauges["hemostat_noise_floor_nats", "reference", "reference_compressed"]
    assert told == pytest.approx(divergence(far).kl_rc.mean())


def test_arms_are_compared_by_what_clients_got() -> None:
    profile = profile_of()
    measured = Measurements()
    for n, record in enumerate(records(120, profile)):
        treated = n % 2 == 0
        measured.update(
            replace(
                record,
                sampling=Sampling(),
                arm=Arm.TREATED if treated else Arm.CONTROL,
                applied=profile.version if treated else None,
            ),
            profile,
            profile,
        )
    arms = measured.arms()
    assert arms["treated"]["requests"] == arms["control"]["requests"] == 60
    change = arms["treated_minus_control"]["total_variation"]
    assert change["estimate"] == pytest.approx(arms["treated"]["total_variation"] - arms["control"]["total_variation"])
    assert change["ci95"][0] < change["estimate"] < change["ci95"][1] < 0.0, "the profile undoes this world's bias"


# --- records.path ---------------------------------------------------------------------------------------------------


def test_records_are_lines_that_any_json_reader_takes(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    file = RecordsFile(path)
    record = infinite("kl_nats")
    file.write(sized_capture(), record, divergence(record))
    unknown = msgspec.structs.replace(sized_capture(), temperature=math.nan)
    file.write(unknown, replace(record, applied="a" * 32), divergence(record))
    file.close()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert [line["profile"] for line in lines] == ["identity", "a" * 32], "what was applied, not what was asked for"
    assert [line["temperature"] for line in lines] == [sized_capture().temperature, None]
    assert lines[0]["kl_nats"][0] is None
    assert lines[0]["kl_nats"][1:] == divergence(record).kl_rc[1:].tolist()
    assert path.stat().st_mode & 0o077 == 0, "token ids are text"
    assert file.written == 2


def test_a_full_disk_leaves_whole_lines_and_writing_continues_when_there_is_space(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("WARNING")
    now, space = 0.0, 10**6
    write = os.write

    def limited(descriptor: int, data: memoryview) -> int:
        nonlocal space
        if not space:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = write(descriptor, data[:space])
        space -= written
        return written

    monkeypatch.setattr(os, "write", limited)
    path = tmp_path / "records.jsonl"
    file = RecordsFile(path, lambda: now)
    record = infinite("kl_nats")

    def attempt() -> tuple[int, int]:
        file.write(sized_capture(), record, divergence(record))
        assert all(json.loads(line) for line in path.read_bytes().splitlines())
        return file.written, file.lost

    assert attempt() == (1, 0)
    space = 20
    assert attempt() == (1, 1)
    space = 10**6
    assert attempt() == (1, 2), "not tried again at once"
    now = 1.0
    space = 0
    assert attempt() == (1, 3)
    now = 2.0
    assert attempt() == (1, 4), "the pause is longer each time"
    now, space = 3.0, 10**6
    assert attempt() == (2, 4)
    space = 0
    attempt()
    assert [sample.value for sample in file.samples()] == [5]
    file.close()
    assert [r.message for r in caplog.records] == [
        "records.path: cannot write (No space left on device); records are lost until it can be written again",
        "records.path: written again; 4 records were lost so far",
        "records.path: cannot write (No space left on device); records are lost until it can be written again",
    ]


def test_a_device_without_space_ends_nothing() -> None:
    file = RecordsFile(Path("/dev/full"))
    for _ in range(3):
        file.write(sized_capture(), infinite("kl_nats"), divergence(infinite("kl_nats")))
    file.close()
    assert (file.written, file.lost) == (0, 3)


def test_a_records_path_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(HemostatError, match=r"records\.path: cannot write .*nowhere"):
        RecordsFile(tmp_path / "nowhere" / "r.jsonl")


def test_gains_are_of_held_out_prompts_and_figures_stand_beside_the_raw_ones_of_the_same_requests() -> None:
    measured, profile = Measurements(), profile_of()
    _, before, learned, _, judged, _ = records(6, profile)
    measured.update(before, None, None)
    measured.update(learned, profile, None, held_out=False)
    assert measured.gained(profile.version)["requests"] == 0
    measured.update(judged, profile, None)
    assert measured.gained(profile.version)["requests"] == 1
    summary = measured.summary(profile.version)
    same = Measurements()
    same.update(learned, None, None)
    same.update(judged, None, None)
    assert summary["requests"] == 2
    assert summary["raw_same_requests"]["kl_nats"] == same.summary(None)["kl_nats"]
    assert "raw_same_requests" not in measured.summary(None)


def test_divergence_adds_up_by_route_and_label() -> None:
    measured = Measurements()
    made = records(3)
    for record, label in zip(made, ("a", "b", "a"), strict=True):
        measured.update(replace(record, route="/v1/completions", label=label), None, None)
    result: dict[tuple[str, str], float] = {}
    for series, value in values(measured.samples()).items():
        if "/v1/completions" in series:
            result[series[0], series[2]] = result.get((series[0], series[2]), 0.0) + value
    nats = [divergence(record).kl_rc.sum() for record in made]
    assert result["hemostat_kl_nats_total", "a"] == pytest.approx(nats[0] + nats[2])
    assert result["hemostat_kl_nats_total", "b"] == pytest.approx(nats[1])
    assert result["hemostat_kl_tokens_total", "b"] == made[1].tokens


def test_tokens_at_which_the_effect_of_a_profile_is_unknown_do_not_count_as_different() -> None:
    """As for a profile that reads anchors, where a record has no features of them."""
    (record,) = records(1)
    before, nothing = divergence(record), np.zeros(record.tokens, np.bool_)
    blind = replace(before, top1_agreement=nothing, known=nothing, top1_known=nothing)
    top1 = Top1()
    top1.update(before, blind, b"")
    top1.update(before, before, b"")
    top1.update(before, replace(before, top1_known=nothing), b"")
    shown = top1.summary()
    assert (shown["tokens"], shown["unknown_tokens"], shown["unproven_tokens"]) == (
        2 * record.tokens,
        *[record.tokens] * 2,
    )
    assert shown["change"]["estimate"] == 0.0
    assert shown["before"]["estimate"] == shown["after"]["estimate"] > 0.0
    assert np.isnan(FIGURES["top1_agreement"].values(blind)).all()


def test_the_share_of_equal_likeliest_ids_is_of_the_tokens_where_it_is_known() -> None:
    """The counters by decoding. The contextual profile reads anchors, whose logits are in none of these records; the
    other one changes nothing."""
    measured, given = Measurements(), records(12)
    same, unknown = temperature_bias("m", V, 1.0, np.zeros(V), 1.0), make_contextual(vocab_size=V)
    for record in given[:6]:
        measured.update(record, same, None)
    for record in given[6:]:
        measured.update(record, unknown, None)
    found = values(measured.samples())
    for decoding, at in (("greedy", [0, 3]), ("sampled", [1, 2, 4, 5])):
        for stage, numbers in (("raw", [*at, *(n + 6 for n in at)]), ("calibrated", at)):
            labels = stage, "none", decoding
            agreement = np.concatenate([divergence(given[n]).top1_agreement for n in numbers])
            assert found["hemostat_top1_known_tokens_total", *labels] == len(agreement)
            assert found["hemostat_top1_agreement_tokens_total", *labels] == agreement.sum()
