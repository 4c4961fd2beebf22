"""The cases of the benchmark: equal sizes are compared, and every comparison names cases that exist."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from tests.support.adapter_models import random_texts, rounded, save, tiny_model

pytest.importorskip("torch")

import torch
from safetensors.torch import load_file
from tests.bench.bench_compress import MODULES, _chosen
from tests.bench.compress import adapters, pruning
from tests.bench.compress.cases import Bench, Case
from tests.bench.compress.figures import LOGITS_FILE, Meter
from tests.bench.compress.texts import Domain, Texts, _asked
from tests.support.constant_profile import constant_profile

from hemostat_lab.models.copies import Copy


@pytest.mark.parametrize("name", list(MODULES))
def test_comparisons_are_of_cases_of_the_same_size(name: str, tmp_path: Path) -> None:
    reference = save(tiny_model(num_hidden_layers=1), tmp_path / "reference")
    cases = {case.name: case for case in MODULES[name].cases(Bench(reference, tmp_path, random_texts(2), 0))}
    for must in MODULES[name].musts():
        assert cases[must.better].size == cases[must.worse].size, must
    assert {case.of for case in cases.values()} <= {*cases, None}


@pytest.mark.parametrize("name", ["adapters", "domain", "profiles"])
def test_a_start_is_made_on_an_empty_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bench, "ours", lambda bench, method, folder: folder.mkdir())
    reference = save(tiny_model(num_hidden_layers=1), tmp_path / "reference")
    cases = {case.name: case for case in MODULES[name].cases(Bench(reference, tmp_path, random_texts(2), 0))}
    cases["W4A16 descent"].make(tmp_path / "start")
    assert (tmp_path / "start").is_dir()


@pytest.mark.parametrize("domain", list(Domain))
def test_no_prompt_to_judge_on_is_one_to_calibrate_on(domain: Domain) -> None:
    judged, learned = ({(prompt.text, prompt.topic) for prompt in _asked(heldout, domain)} for heldout in (True, False))
    assert len(judged) >= 30
    assert len(learned) >= 48
    assert {text for text, _ in judged}.isdisjoint(text for text, _ in learned)
    assert {topic for _, topic in judged}.isdisjoint(topic for _, topic in learned)


def test_what_a_chosen_case_improves_is_measured_too() -> None:
    cases = [Case(name, 0, lambda folder: None, of=of) for name, of in (("a", None), ("b", None), ("b, x", "b"))]
    assert [case.name for case in _chosen(cases, ["x"])] == ["b", "b, x"]
    assert [case.name for case in _chosen(cases, [])] == ["a", "b", "b, x"]


def test_one_kind_of_layers_is_pruned_and_the_others_stay(tmp_path: Path) -> None:
    reference = save(tiny_model(num_hidden_layers=1), tmp_path / "reference")
    cases = {case.name: case for case in pruning.cases(Bench(reference, tmp_path, random_texts(8), 0))}
    cases[pruning.QUERIES].make(tmp_path / "made")
    dense, made = (load_file(folder / "model.safetensors") for folder in (reference, tmp_path / "made"))
    assert [name for name in dense if not torch.equal(dense[name], made[name])] == [
        "model.layers.0.self_attn.q_proj.weight"
    ]
    assert not (tmp_path / "made.work").exists()


def test_a_checkpoint_is_measured_with_the_adapter_beside_it(tmp_path: Path) -> None:
    model = tiny_model(num_hidden_layers=1)
    reference = save(model, tmp_path / "reference")
    texts = random_texts(8)
    bench = Bench(reference, tmp_path / "bench", texts, 0)
    start = Case("start", 0, lambda folder: model.save_pretrained(folder, state_dict=rounded(model)))
    adapters.adapted(bench, start, 64, False, tmp_path / "adapted")
    meter = Meter(reference, Texts([], texts, np.zeros(sum(len(text.output) for text in texts), np.int64)))
    without, with_adapter = (meter.distances(folder).kl.mean() for folder in (bench.made(start), tmp_path / "adapted"))
    assert with_adapter < 0.5 * without
    before = np.ones(len(meter.distances(tmp_path / "adapted").kl))
    assert meter.recovered(before, 0.25 * before, "") == (0.75, 0.75, 0.75)


def test_a_checkpoint_is_measured_with_the_profile_beside_it(tmp_path: Path) -> None:
    """A bias on the logits of the reference itself."""
    reference, texts = save(tiny_model(num_hidden_layers=1), tmp_path / "reference"), random_texts(3)
    topics = np.zeros(sum(len(text.output) for text in texts), np.int64)
    meter = Meter(reference, Texts([], texts, topics))
    whole = Copy.load(reference)
    bias = np.linspace(-1.0, 1.0, whole.vocab_size)
    profile = constant_profile("", bias, 20.0)
    start = Case("start", 0, partial(shutil.copytree, reference))
    Bench(reference, tmp_path / "bench", texts, 0).copied(start, tmp_path / "biased", {LOGITS_FILE: profile.to_bytes()})
    wanted = []
    for text in texts:
        z = torch.from_numpy(whole.logits(text.ids))[len(text.prompt) - 1 : -1]
        log_r, log_c = z.log_softmax(-1), (z + torch.from_numpy(bias)).log_softmax(-1)
        wanted.append((log_r.exp() * (log_r - log_c)).sum(-1).numpy())
    np.testing.assert_allclose(meter.distances(tmp_path / "biased").kl, np.concatenate(wanted), rtol=0.02, atol=1e-4)
    assert np.concatenate(wanted).mean() > 0.01
