"""Two vLLM servers: bounds contain the exact figures, estimates are unbiased, failures are one line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.doctor import report_of
from tests.support.fake_vllm import FakeVllm, RefusedError, render, serving
from tests.support.fake_vllm.generation import Generation
from tests.support.fake_vllm.pooling import FakePooling
from tests.support.running_vllm import RunningVllm

from hemostat.reference.hidden.probe import TEXT
from hemostat_lab.doctor import DoctorOptions, run
from hemostat_lab.doctor.options import DoctorError
from hemostat_lab.doctor.pair import Job, encode
from hemostat_lab.doctor.prompts import load
from hemostat_lab.doctor.servers import ServerPair


@pytest.fixture
def fakes() -> tuple[FakeVllm, FakeVllm]:
    return FakeVllm(model="original"), FakeVllm(model="small", noise=1.0)


@pytest.fixture
def options(fakes: tuple[FakeVllm, FakeVllm], tmp_path: Path) -> Iterator[DoctorOptions]:
    (tmp_path / "p").write_text("".join(json.dumps({"prompt": f"prompt {n}"}) + "\n" for n in range(60)))
    with ExitStack() as stack:
        urls = [stack.enter_context(serving(fake)) for fake in fakes]
        yield DoctorOptions(urls[0], f"{urls[1]}/v1#small", prompts=tmp_path / "p", tokens=16, batch=20, top_k=20)


def exact(fakes: tuple[FakeVllm, FakeVllm], job: Job, output: Any) -> tuple[Any, Any]:
    """Both models' log-probabilities, float64 [T, V]."""
    whole = [*job.prompt.tolist(), *output.tolist()]
    contexts = [whole[: len(job.prompt) + t] for t in range(len(output))]
    r, c = (np.stack([fake.logprobs(context) for context in contexts]) for fake in fakes)
    return r, c


def test_bounds_and_estimates(fakes: tuple[FakeVllm, FakeVllm], options: DoctorOptions) -> None:
    pair = ServerPair(options)
    try:
        jobs = encode(pair, load(options.prompts, None), options)
        scored = pair.score(jobs, 0, False)
    finally:
        pair.close()
    assert (pair.vocab_size, pair.max_length) == (512, 2047)
    assert pair.compressed.name.startswith("small at http://127.0.0.1:")
    estimated, true = [], []
    for job, text in zip(jobs, scored, strict=True):
        r, c = exact(fakes, job, text.output)
        p, q, rows = np.exp(r), np.exp(c), np.arange(len(text.output))
        mean = np.log((p + q) / 2)
        values = {
            "kl_rc": (p * (r - c)).sum(1),
            "kl_cr": (q * (c - r)).sum(1),
            "js": ((p * (r - mean)).sum(1) + (q * (c - mean)).sum(1)) / 2,
            "tv": abs(p - q).sum(1) / 2,
        }
        for name, value in values.items():
            assert (text.figures[name] <= value + 1e-5).all(), name
            assert (text.figures[name + "_upper"] >= value - 1e-5).all(), name
        np.testing.assert_allclose(text.figures["logp_r"], r[rows, text.output])
        np.testing.assert_allclose(text.figures["logp_c"], c[rows, text.output])
        np.testing.assert_array_equal(text.figures["same_top"], r.argmax(1) == c.argmax(1))
        estimated.append(text.figures["kl_rc_estimate"].mean())
        true.append(values["kl_rc"].mean())
    error = np.std(np.array(estimated) - true) / np.sqrt(len(true))
    assert np.mean(estimated) == pytest.approx(np.mean(true), abs=4 * error)
    assert error < 0.1 * np.mean(true)


class Copy(FakeVllm):
    """A generating server that differs a little from a pooling one, or not at all."""

    known = FakePooling(TEXT)

    @classmethod
    @lru_cache(4096)
    def after(cls, context: tuple[int, ...]) -> Any:
        """What the pooling server's model says comes after these tokens; the servers ask for the same contexts."""
        return cls.known.logprobs(list(context))[-1]

    def logprobs(self, context: list[int], adapter: str | None = None) -> Any:
        rng = np.random.default_rng(context[-3:])
        result = self.after(tuple(context[-4:])) + self.noise * rng.normal(size=self.vocab_size)
        return (result - np.log(np.exp(result).sum())).astype(np.float32).astype(np.float64)


def test_a_pooling_server_as_the_reference_gives_narrower_bounds(tmp_path: Path) -> None:
    (tmp_path / "p").write_text("".join(json.dumps({"prompt": TEXT[n : n + 40]}) + "\n" for n in range(0, 80, 10)))
    checkpoint = FakePooling(TEXT).save(tmp_path / "checkpoint")
    pooling = FakeVllm(model="original", pooling=FakePooling(TEXT))
    compressed = Copy(model="small", noise=0.5)
    with serving(pooling) as url, serving(Copy(model="original", noise=0.0)) as lists, serving(compressed) as small:
        widths = {}
        for name, reference in (("pooling", url), ("lists", lists)):
            options = DoctorOptions(
                reference, small, prompts=tmp_path / "p", tokens=8, top_k=20, reference_folder=checkpoint
            )
            pair = ServerPair(options)
            try:
                jobs = encode(pair, load(options.prompts, None), options)
                scored = pair.score(jobs, 0, False)
            finally:
                pair.close()
            for job, text in zip(jobs, scored, strict=True):
                whole = [*job.prompt.tolist(), *text.output.tolist()]
                contexts = [whole[: len(job.prompt) + t] for t in range(len(text.output))]
                r = np.stack([Copy.after(tuple(context[-4:])) for context in contexts])
                c = np.stack([compressed.logprobs(context) for context in contexts])
                kl = (np.exp(r) * (r - c)).sum(1)
                assert (text.figures["kl_rc"] <= kl + 2e-3).all()
                assert (text.figures["kl_rc_upper"] >= kl - 2e-3).all()
            width = [text.figures["kl_rc_upper"] - text.figures["kl_rc"] for text in scored]
            widths[name] = float(np.concatenate(width).mean())
        assert widths["pooling"] < 0.98 * widths["lists"]
        with pytest.raises(DoctorError, match="is no folder on this machine") as error:
            ServerPair(replace(options, reference=url, reference_folder=None))
        assert "--reference-folder" in str(error.value)
        with pytest.raises(DoctorError, match="does not generate: start vLLM there without --runner pooling"):
            ServerPair(replace(options, reference=small, compressed=url))


def test_report_marks_bounds_and_estimates(options: DoctorOptions, tmp_path: Path) -> None:
    options = replace(options, max_prompts=8, html=tmp_path / "page.html")
    report = report_of(options, tmp_path)
    assert report["full_vocabulary"] is False
    mean = [row for row in report["kl_divergence"] if row["name"] == "Mean    KLD"]
    assert [row["of"] for row in mean] == ["estimate", "at least", "at most"]
    assert mean[1]["value"] < mean[0]["value"] < mean[2]["value"]
    assert {row["of"] for row in report["kl_divergence"]} == {"estimate", "at least", "at most"}
    low, high = (curve for curve in report["trajectory"] if "TV" in curve["name"])
    assert (low["of"], high["of"]) == ("at least", "at most")
    assert all(a <= b for a, b in zip(low["survival"], high["survival"], strict=True))
    assert "do not expose their layers: name two checkpoint folders" in report["layers"]["skipped"]
    assert report["prescription"] == report["outliers"] == report["layers"]
    assert "at least" in (tmp_path / "page.html").read_text()
    # Greedy text was not sampled, so there is no unbiased estimate.
    greedy = report_of(replace(options, decoding="greedy", work=tmp_path / "w"), tmp_path)
    assert {row["of"] for row in greedy["kl_divergence"]} == {"at least", "at most"}
    assert [curve["name"] for curve in greedy["trajectory"] if curve["of"] == "exact"] == ["greedy"]


def test_requests_to_the_servers(fakes: tuple[FakeVllm, FakeVllm], options: DoctorOptions, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}]
    (tmp_path / "c").write_text(json.dumps({"messages": chat, "max_tokens": 3}))
    report_of(replace(options, prompts=tmp_path / "c"), tmp_path)
    written = next(body for body in fakes[1].requests if body.get("return_token_ids") and body["max_tokens"] == 3)
    assert written["prompt"] == render(chat)
    # The checkpoint's sampling defaults must not truncate the distribution.
    assert {name: written[name] for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")} == {
        "temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0,
    }  # fmt: skip
    scored = [body for fake in fakes for body in fake.requests if body.get("prompt_logprobs")]
    assert len(scored) == 2
    assert scored[0]["prompt"] == scored[1]["prompt"]


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda r, c: setattr(r, "max_logprobs", 5), "--max-logprobs 20, or lower --top-k"),
        (lambda r, c: setattr(c, "status", 500), "answered 500"),
        (lambda r, c: setattr(c, "model", "other"), "serves other, not small"),
        (lambda r, c: setattr(c, "max_model_len", 20), ":1: 8 tokens and --tokens 16 make 24, the models accept 19"),
    ],
)
def test_failures_are_one_line(
    fakes: tuple[FakeVllm, FakeVllm],
    options: DoctorOptions,
    break_it: Any,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # The fake does not refuse too many prompt_logprobs by itself.
    real = Generation.prompt_logprobs

    def limited(self: Generation, prompt: list[int]) -> Any:
        top_k = self.body["prompt_logprobs"]
        if top_k > self.fake.max_logprobs:
            raise RefusedError(f"Requested prompt logprobs of {top_k}, which is greater than max allowed", "x")
        return real(self, prompt)

    monkeypatch.setattr(Generation, "prompt_logprobs", limited)
    break_it(*fakes)
    with pytest.raises(DoctorError) as raised:
        run(options)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_unreachable_server(options: DoctorOptions) -> None:
    with pytest.raises(DoctorError, match=r"127\.0\.0\.1:9"):
        run(replace(options, reference="http://127.0.0.1:9"))


@pytest.mark.vllm
def test_real_server_compared_with_itself(vllm_server: RunningVllm, tmp_path: Path) -> None:
    """The same model on both sides: the lower bound is rounding only."""
    (tmp_path / "p").write_text(
        '{"messages": [{"role": "user", "content": "Name a colour."}]}\nThe capital of France is\n'
    )
    url = f"{vllm_server.url}#{vllm_server.model}"
    report = report_of(DoctorOptions(url, url, prompts=tmp_path / "p", tokens=8, top_k=50), tmp_path)
    assert report["requests"] == 2
    assert report["tokens"] > 2
    rows = {(row["name"], row["of"]): row["value"] for row in report["kl_divergence"]}
    assert 0.0 <= rows["Mean    KLD", "at least"] < 0.02
    assert rows["Mean    KLD", "at most"] > rows["Mean    KLD", "at least"]
    same = next(row for row in report["token_probability"] if row["name"] == "Same top p")
    assert same["value"] >= 80.0
    assert {row["name"] for row in report["by_class"]} & {"word start", "word continuation"}
