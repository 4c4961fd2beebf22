"""Two checkpoints: figures compared with an independent computation, generation, layers, resuming, privacy."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.doctor import LINES, TinyPair, report_of

from hemostat_lab.doctor import checkpoints as module
from hemostat_lab.doctor import run
from hemostat_lab.doctor.options import DoctorError
from hemostat_lab.doctor.pair import Job, encode
from hemostat_lab.doctor.prompts import load

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def logprobs(folder: Path, prompt: list[int], output: list[int]) -> Any:
    """float64 [T, V], in one plain call."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *output]])).logits[0]
    return torch.log_softmax(logits[len(prompt) - 1 : -1], -1).numpy()


@pytest.fixture(scope="module")
def pair(tiny: TinyPair) -> module.CheckpointPair:
    return module.CheckpointPair(tiny.options())


@pytest.fixture(scope="module")
def jobs(tiny: TinyPair, pair: module.CheckpointPair) -> list[Job]:
    return encode(pair, load(tiny.prompts, None), tiny.options())


def outputs(pair: module.CheckpointPair, jobs: list[Job], seed: int) -> list[Any]:
    """The texts of these jobs alone, without their figures."""
    return module.scored_ids(pair.compressed_model, jobs, [seed], False, pair.end_ids())


@pytest.mark.parametrize("piece", [1 << 26, 3 * 320])
def test_every_figure_at_full_vocabulary(
    tiny: TinyPair, pair: module.CheckpointPair, jobs: list[Job], piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with several pieces of a text and chunks of the vocabulary."""
    monkeypatch.setattr(module, "MAX_PIECE_ELEMENTS", piece)
    monkeypatch.setattr(module, "MAX_CHUNK_ELEMENTS", 2 * 320 if piece < 1 << 20 else 1 << 24)
    for job, text in zip(jobs, pair.score(jobs, 0, False), strict=True):
        output = text.output.tolist()
        r, c = (logprobs(folder, job.prompt.tolist(), output) for folder in (tiny.reference, tiny.compressed))
        p, q, rows = np.exp(r), np.exp(c), np.arange(len(output))
        mean = np.log((p + q) / 2)
        expected = {
            "kl_rc": (p * (r - c)).sum(1),
            "kl_cr": (q * (c - r)).sum(1),
            "js": ((p * (r - mean)).sum(1) + (q * (c - mean)).sum(1)) / 2,
            "tv": abs(p - q).sum(1) / 2,
            "entropy_r": -(p * r).sum(1),
            "entropy_c": -(q * c).sum(1),
            "logp_r": r[rows, output],
            "logp_c": c[rows, output],
            "same_top": (r.argmax(1) == c.argmax(1)).astype(float),
        }
        for name, values in expected.items():
            np.testing.assert_allclose(text.figures[name], values, atol=2e-5, err_msg=name)
        if piece == 1 << 26 and len(job.prompt) + len(output) > 2:
            assert (text.figures["floor_kl"] < 1e-5).all()


def test_greedy_text_is_that_of_transformers(pair: module.CheckpointPair, jobs: list[Job]) -> None:
    """Prompts of several lengths in one batch: padding has no effect."""
    own = [job for job in jobs if job.output is None]
    for job, text in zip(own, pair.score(own, 0, True), strict=True):
        whole = pair.compressed_model.generate(
            torch.from_numpy(job.prompt.astype(np.int64))[None], max_new_tokens=job.tokens, do_sample=False
        )
        assert text.output.tolist() == whole[0, len(job.prompt) :].tolist()


def test_sampled_text_follows_the_model(tiny: TinyPair, pair: module.CheckpointPair) -> None:
    """A chi-square test of the first token of 4,000 samples, over the ids that are likely enough."""
    prompt = np.array(pair.tokenize_completion("Hello"), np.int32)
    draws = 4000
    written: list[int] = []
    for begin in range(0, draws, 500):
        batch = [Job(begin + n, prompt, None, 1) for n in range(500)]
        written += [int(text[0]) for text in outputs(pair, batch, 5)]
    probability = np.exp(logprobs(tiny.compressed, prompt.tolist(), [0])[0])
    likely = probability * draws >= 8
    counts = np.bincount(written, minlength=len(probability))
    expected = np.append(probability[likely], probability[~likely].sum()) * draws
    result = np.append(counts[likely], counts[~likely].sum())
    statistic = float(((result - expected) ** 2 / expected).sum())
    degrees = len(result) - 1
    assert degrees > 10
    # Wilson and Hilferty's approximation of the 99.99 % quantile.
    assert statistic < degrees * (1 - 2 / (9 * degrees) + 3.72 * (2 / (9 * degrees)) ** 0.5) ** 3


def test_generated_text_does_not_depend_on_other_prompts(pair: module.CheckpointPair, jobs: list[Job]) -> None:
    own = [job for job in jobs if job.output is None]
    in_one_batch = outputs(pair, own, 3)
    alone = [outputs(pair, [job], 3)[0] for job in own]
    assert [text.tolist() for text in in_one_batch] == [text.tolist() for text in alone]
    assert [text.tolist() for text in outputs(pair, own, 4)] != [text.tolist() for text in in_one_batch]


def test_generation_stops_at_an_end_token(pair: module.CheckpointPair, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = np.array(pair.tokenize_completion("Hello"), np.int32)
    (long,) = outputs(pair, [Job(0, prompt, None, 8)], 0)
    monkeypatch.setattr(pair, "end_ids", lambda: frozenset({int(long[2])}))
    (short,) = outputs(pair, [Job(0, prompt, None, 8)], 0)
    end = long.tolist().index(int(long[2])) + 1
    assert short.tolist() == long[:end].tolist()


def test_report(tiny: TinyPair, tmp_path: Path) -> None:
    report = report_of(tiny.options(), tmp_path)
    assert report["texts"] == {"given": 2, "sampled": 5}
    assert report["requests"] == len(LINES)
    assert report["full_vocabulary"] is True
    assert {row["of"] for row in report["kl_divergence"]} == {"exact"}
    for key in ("by_position", "by_class", "by_entropy"):
        assert sum(row["tokens"] for row in report[key]) == report["tokens"]
        assert sum(row["share_of_kld"] for row in report[key]) == pytest.approx(1.0)
    layers = report["layers"]
    restored = {row["name"]: row for row in layers["restored"]}
    # The third layer is the reference's own: there is nothing to restore; the noisier of the others matters most.
    assert set(restored) == {"layer 0", "layer 1", "every self_attn", "every mlp", "every input_layernorm",
                             "every post_attention_layernorm"}  # fmt: skip
    assert restored["layer 1"]["won_nats"] > restored["layer 0"]["won_nats"]
    assert layers["distances"][2]["alone"] < 1e-6 < layers["distances"][0]["alone"] < layers["distances"][1]["alone"]
    assert layers["distances"][2]["accumulated"] > 0.01


def test_all_layers_restored_is_the_reference(pair: module.CheckpointPair, jobs: list[Job]) -> None:
    from contextlib import ExitStack

    from hemostat_lab.doctor.causes.units import restored, units_of

    with ExitStack() as stack:
        for unit in units_of(pair.reference_model, pair.compressed_model):
            if unit.kind == "layer":
                stack.enter_context(restored(unit))
        figures = pair.score(jobs[3:4], 0, False)[0].figures
    assert figures["kl_rc"].max() == 0.0
    assert pair.score(jobs[3:4], 0, False)[0].figures["kl_rc"].max() > 0.01


def test_layers_that_do_not_correspond_are_skipped(tiny: TinyPair, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny.compressed)
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    model.save_pretrained(tmp_path / "short")
    transformers.AutoTokenizer.from_pretrained(tiny.compressed).save_pretrained(tmp_path / "short")
    report = report_of(replace(tiny.options(), compressed=str(tmp_path / "short")), tmp_path)
    assert report["layers"] == {"skipped": "REFERENCE has 3 layers, COMPRESSED has 2"}


def test_given_text_is_scored_from_its_second_token(tiny: TinyPair, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("Hello, world! 1234567890\n")
    options = replace(tiny.options(), prompts=tmp_path / "text", decoding="given", layer_tokens=0)
    report = report_of(options, tmp_path)
    ids = transformers.AutoTokenizer.from_pretrained(tiny.reference).encode("Hello, world! 1234567890")
    assert report["tokens"] == len(ids) - 1
    assert report["texts"] == {"given": 1}
    r = logprobs(tiny.reference, ids[:1], ids[1:])[np.arange(len(ids) - 1), ids[1:]]
    base = next(row for row in report["perplexity"] if row["name"] == "Mean PPL(base)")
    assert base["value"] == pytest.approx(float(np.exp(-r.mean())), rel=1e-4)
    assert report["notes"] == []


def test_report_after_interruptions_equals_an_uninterrupted_one(
    tiny: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C during the prompts, Ctrl-C during the layers, a damaged part, then a full run."""
    from hemostat_lab.doctor.causes import layers

    straight = report_of(tiny.options(), tmp_path)
    options = tiny.options(work=tmp_path / "work")
    score, restored = module.CheckpointPair.score, layers.restored

    def stops(after: int, real: Any) -> Any:
        calls = iter(range(after))

        def stopping(*args: Any) -> Any:
            if next(calls, None) is None:
                raise KeyboardInterrupt
            return real(*args)

        return stopping

    with monkeypatch.context() as patch:
        patch.setattr(module.CheckpointPair, "score", stops(2, score))
        assert run(options) == 130
    assert f"finished work is in {tmp_path / 'work'}" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(module.CheckpointPair, "score", stops(2, score))  # two batches are left
        patch.setattr(layers, "restored", stops(1, restored))
        assert run(options) == 130
    kept = sorted(path.name for path in (tmp_path / "work").glob("*.part"))
    assert kept == ["alone-0000.part", "layer-0000.part", "layer-base.part", "layer-distances.part", "layer-floor.part",
                    *(f"prompts-00000{n}.part" for n in range(4))]  # fmt: skip
    (tmp_path / "work" / kept[-1]).write_bytes(b"torn")
    assert report_of(options, tmp_path) == straight
    assert f"{kept[-1]} is damaged" in capsys.readouterr().err
    # A changed option starts over.
    assert report_of(replace(options, seed=1, layer_tokens=0), tmp_path) != straight
    assert "started over: --layer-tokens, --seed changed" in capsys.readouterr().err


def test_killed_and_resumed(tiny: TinyPair, tmp_path: Path) -> None:
    straight = report_of(tiny.options(), tmp_path)
    work = tmp_path / "work"
    command = [sys.executable, "-m", "hemostat", "doctor", str(tiny.reference), str(tiny.compressed),
               *("--prompts", str(tiny.prompts), "--tokens", "8", "--batch", "2", "--layer-tokens", "24"),
               *("--device", "cpu", "--work", str(work))]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not list(work.glob("prompts-*.part")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert report_of(tiny.options(work=work), tmp_path) == straight


def test_texts_are_written_only_with_show_text(
    tiny: TinyPair, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    secret = "Zarathustra"
    (tmp_path / "p").write_text(f"{secret} spoke\n")
    options = replace(tiny.options(), prompts=tmp_path / "p", json=tmp_path / "j", html=tmp_path / "h", layer_tokens=0)
    run(options)
    silent = capsys.readouterr()
    told = [silent.out, silent.err, options.json.read_text(), options.html.read_text()]  # type: ignore[union-attr]
    assert not any(secret in text for text in told)
    assert '"text"' not in told[2]
    # Not even as token ids, once the report is there.
    assert not list((tmp_path / "cache").rglob("*.part"))
    run(replace(options, show_text=True))
    shown = [capsys.readouterr().out, options.json.read_text(), options.html.read_text()]  # type: ignore[union-attr]
    assert all(secret in text for text in shown)
    worst = json.loads(shown[1])["worst_tokens"][0]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny.reference)
    assert worst["text"].strip() == tokenizer.decode([worst["token_id"]]).strip()


@pytest.mark.parametrize(
    ("line", "changed", "message"),
    [
        ("Hello " * 200, {}, r":1: \d+ tokens and --tokens 8 make \d+, the models accept 128; shorten the line"),
        ("H", {"decoding": "given"}, r":1: the text has 1 token; --given needs at least 2"),
        ('{"messages": [{"role": "user", "content": "x"}]}', {"decoding": "given"}, r":1: --given .* add a completion"),
    ],
)
def test_error_names_the_line_that_cannot_be_scored(
    tiny: TinyPair, pair: module.CheckpointPair, tmp_path: Path, line: str, changed: dict[str, Any], message: str
) -> None:
    (tmp_path / "p").write_text(line)
    options = replace(tiny.options(), prompts=tmp_path / "p", **changed)
    with pytest.raises(DoctorError, match=message):
        encode(pair, load(options.prompts, None), options)


def test_different_vocabularies_are_rejected(tiny: TinyPair, tmp_path: Path) -> None:
    from tokenizers import normalizers

    other = tmp_path / "other"
    config = transformers.AutoConfig.from_pretrained(tiny.reference)
    config.vocab_size += 8
    transformers.LlamaForCausalLM(config).save_pretrained(other)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny.reference)
    tokenizer.save_pretrained(other)
    with pytest.raises(DoctorError, match=r"vocabulary: REFERENCE has 320 tokens, COMPRESSED has 328"):
        run(replace(tiny.options(), compressed=str(other)))
    config.vocab_size -= 8
    transformers.LlamaForCausalLM(config).save_pretrained(other)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save_pretrained(other)
    with pytest.raises(DoctorError, match=r"vocabulary: .* different ids to the same text"):
        run(replace(tiny.options(), compressed=str(other)))


def test_masked_ids() -> None:
    """KL is infinite where c masks an id that r allows, and never NaN."""
    r = torch.tensor([[0.0, 1.0, -torch.inf], [0.0, 1.0, 2.0]])
    c = torch.tensor([[1.0, 0.0, -torch.inf], [1.0, 0.0, -torch.inf]])
    figures = module.compare(r, c, torch.tensor([0, 1]))
    p, q = (torch.softmax(logits[0, :2].double(), -1).numpy() for logits in (r, c))
    assert figures["kl_rc"][0].item() == pytest.approx((p * np.log(p / q)).sum(), abs=1e-6)
    assert figures["kl_rc"][1].item() == np.inf
    assert np.isfinite(figures["kl_cr"].numpy()).all()
    assert not any(values.isnan().any() for values in figures.values())
