"""Building: what it wins, what it costs, that it goes on where it was killed, and that peft computes the same."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.adapter_models import LAYERS, VOCABULARY, TinyCheckpoints, linear_names, random_texts
from tests.support.slow import slow_unless

from hemostat.checkpoints.errors import AdaptError
from hemostat_lab.models.work_folder import WorkFolder, WorkFolderError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")

IDS = np.random.default_rng(5).integers(0, VOCABULARY, 30)


def opened(tiny: TinyCheckpoints) -> Any:
    from hemostat_lab.adapters.pair import CheckpointPair

    return CheckpointPair.open(tiny.reference, tiny.packed)


def built_of(pair: Any, parts: Any = None, texts: Any = None, **options: Any) -> Any:
    from hemostat_lab.adapters.build import BuildOptions, build

    return build(pair, texts or random_texts(), BuildOptions(**{"rank": 4, **options}), parts)


@pytest.mark.parametrize("metric", ["auto", "kfac", "full", "diagonal"])
def test_held_out_texts_are_won_back(metric: str, tiny: TinyCheckpoints) -> None:
    """By rank 32 of 256; the figures are those of two whole models."""
    from hemostat_lab.adapters.build import judged
    from hemostat_lab.adapters.distances import exact_distances
    from hemostat_lab.models.copies import Copy

    pair = opened(tiny)
    built = built_of(pair, rank=32, metric=metric)
    texts = random_texts(8, seed=9)
    built, distances = judged(pair, built, texts)
    held = built.report["held_out"]
    assert held["share"] > 0.3, held
    assert held["share_low"] <= held["share"] <= held["share_high"]
    assert held["top1_after"] >= held["top1_before"]
    assert held["prompts"] == 8
    reference, compressed = Copy.load(tiny.reference), Copy.load(tiny.packed)
    done = 0
    for text in texts:
        rows = slice(len(text.prompt) - 1, len(text) - 1)
        logits = reference.logits(text.ids)[rows]
        here = slice(done, done + len(text.output))
        done += len(text.output)
        for layers, measured in ((None, distances.before), (built.layers, distances.after)):
            expected = exact_distances(logits, compressed.logits(text.ids, layers)[rows])
            np.testing.assert_allclose(measured.kl[here], expected.kl, rtol=1e-3, atol=1e-5)
            np.testing.assert_allclose(measured.tv[here], expected.tv, rtol=1e-3, atol=1e-5)
    assert done == held["tokens"] == len(distances.units)
    assert pair.skeleton.most_loaded == 1, "never two layers in memory, and no model"


def test_report_and_profile(tiny: TinyCheckpoints) -> None:
    from hemostat_calibration.profiles.adapter import adapter_layers

    pair = opened(tiny)
    built = built_of(pair, model="served")
    report, profile = built.report, built.profile
    names = linear_names(tiny.model)
    assert list(report["layers"]) == names
    assert set(adapter_layers(profile)) == set(names)
    assert report["version"] == profile.version
    assert profile.model == "served"
    assert profile.vocab_size == VOCABULARY
    assert profile.metadata["reference"] == pair.reference.digest() == report["reference"]
    assert profile.metadata["tokens"] == str(sum(map(len, random_texts())))
    assert report["method"] == "training-free; full inputs, full outputs"
    assert all(row["rank"] == 4 and 0.0 < row["won"] < 1.0 for row in report["layers"].values())
    assert set(report["kinds"]) == {name.rpartition(".")[2] for name in names}
    per_rank = sum(m.in_features + m.out_features for m in pair.skeleton.linears.values())
    assert report["engine_bytes"] == 4 * 2 * per_rank
    assert report["bytes"] < report["engine_bytes"]
    # 4 bits and a float32 scale for each group of 128; the stored shape is not counted.
    inputs = sum(m.in_features * m.out_features for m in pair.skeleton.linears.values())
    assert report["quantized_bytes"] == inputs // 2 + inputs // 128 * 4
    again = built_of(opened(tiny), model="served")
    assert again.profile.version == profile.version, "deterministic"


def test_shared_out_ranks_keep_to_the_bytes_of_uniform_ones(tiny: TinyCheckpoints) -> None:
    uniform, shared = built_of(opened(tiny)), built_of(opened(tiny), shared_out=True)
    assert shared.report["bytes"] <= uniform.report["bytes"]
    ranks = [row["rank"] for row in shared.report["layers"].values()]
    assert max(ranks) == shared.report["max_rank"] <= 16
    assert len(set(ranks)) > 2


def test_little_memory_means_diagonal_statistics(tiny: TinyCheckpoints) -> None:
    from hemostat_lab.models.second_moments import BASE_BYTES

    base = BASE_BYTES >> 20
    assert "diagonal inputs, diagonal outputs" in built_of(opened(tiny), memory_mib=base).report["method"]
    some = built_of(opened(tiny), memory_mib=base + 14).report["method"]
    assert "full inputs" in some
    assert "diagonal" in some


def test_nothing_to_correct_is_one_line(tiny: TinyCheckpoints) -> None:
    from hemostat_lab.adapters.pair import CheckpointPair

    with pytest.raises(AdaptError, match="no linear layer of COMPRESSED differs"):
        built_of(CheckpointPair.open(tiny.reference, tiny.reference))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank is 0"),
        ({"rank": 600}, "1 to 512"),
        ({"max_rank": 2}, "max_rank is 2"),
        ({"metric": "fisher"}, "use auto, kfac, full or diagonal"),
        ({"metric": "full", "shared_out": True}, "cannot be shared out"),
    ],
)
def test_invalid_options_are_one_line(options: dict[str, Any], message: str) -> None:
    from hemostat_lab.adapters.build import BuildOptions

    with pytest.raises(AdaptError, match=message):
        BuildOptions(**options)


class Killed(BaseException):
    """The process ends here."""


class KilledFolder(WorkFolder):
    """Ends at the `left`-th write, before or after it."""

    left = 10**6
    after = False

    def put(self, name: str, data: bytes) -> None:
        KilledFolder.left -= 1
        if KilledFolder.left == 0 and not self.after:
            (self.folder / f"{name}.part.new").write_bytes(data[: len(data) // 2])
            raise Killed
        super().put(name, data)
        if KilledFolder.left == 0:
            raise Killed


@pytest.mark.parametrize(
    ("metric", "after"),
    # Each way of solving and each side of a write, once.
    slow_unless(
        {("auto", True), ("full", False)}, [(metric, at) for metric in ("auto", "full") for at in (False, True)]
    ),
)
def test_what_is_killed_at_any_write_continues(
    metric: str, after: bool, tiny: TinyCheckpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at its third write, started again and killed at its third one, and so on: the result is the same, and
    no finished layer is solved twice."""
    from hemostat_lab.adapters import build
    from hemostat_lab.adapters.build import judged
    from hemostat_lab.models.parts import Parts

    texts, held = random_texts(6), random_texts(2, seed=9)

    def run(parts: Any) -> Any:
        pair = opened(tiny)
        built = built_of(pair, parts, texts, metric=metric)
        return judged(pair, built, held, parts)[0]

    expected = run(None)
    solved = 0
    correct = build.Solver._correct

    def counted(*arguments: Any) -> Any:
        nonlocal solved
        solved += 1
        return correct(*arguments)

    monkeypatch.setattr(build.Solver, "_correct", counted)
    monkeypatch.setattr(KilledFolder, "after", after)
    result = None
    kills = 0
    while result is None:
        KilledFolder.left = 3
        try:
            with KilledFolder(tmp_path, {"a": 1}, "adapt") as work:
                result = run(Parts(work))
        except Killed:
            kills += 1
    assert kills >= LAYERS
    assert result.profile.version == expected.profile.version
    assert result.report["held_out"] == expected.report["held_out"]
    if after:
        assert solved <= 2 * len(linear_names(tiny.model))


def test_damaged_parts_are_computed_again(tiny: TinyCheckpoints, tmp_path: Path) -> None:
    from hemostat_lab.models.parts import Parts

    expected = built_of(opened(tiny)).profile.version
    for damaged in ("layer-0001", "hidden-0001", "gradient-0002", "hidden"):
        with WorkFolder(tmp_path / damaged, {}, "adapt") as work:
            put = work.put

            def stop(name: str, data: bytes, put: Any = put) -> None:
                put(name, data)
                if name == "layer-0001":
                    raise Killed

            work.put = stop  # type: ignore[method-assign]
            with pytest.raises(Killed):
                built_of(opened(tiny), Parts(work))
            work.put = put  # type: ignore[method-assign]
            for path in (tmp_path / damaged).glob(f"{damaged}*.part"):
                path.write_bytes(path.read_bytes()[:-7] + b"damaged")
            assert built_of(opened(tiny), Parts(work)).profile.version == expected
            assert bool(work.notes) == any(damaged in note for note in work.notes)


def test_full_disk_is_one_line(tiny: TinyCheckpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hemostat_lab.models.parts import Parts

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with WorkFolder(tmp_path, {}, "adapt") as work:
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(WorkFolderError, match="No space left on device"):
            built_of(opened(tiny), Parts(work))


@pytest.mark.parametrize("shared_out", [False, True])
def test_peft_computes_what_our_copy_computes(shared_out: bool, tiny: TinyCheckpoints, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from hemostat_calibration.profiles.peft import peft_files
    from hemostat_lab.models.copies import Copy

    built = built_of(opened(tiny), shared_out=shared_out)
    for name, data in peft_files(built.profile, str(tiny.rounded)).items():
        (tmp_path / name).write_bytes(data)
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny.rounded)
    model = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.inference_mode():
        theirs = model(torch.from_numpy(IDS)[None]).logits[0].numpy()
    copy = Copy.load(tiny.rounded)
    # Theirs has factors in bfloat16, ours in the checkpoint's float32.
    difference = np.abs(copy.logits(IDS, built.layers) - theirs).max()
    effect = np.abs(copy.logits(IDS) - theirs).max()
    assert difference < 0.03 * effect
