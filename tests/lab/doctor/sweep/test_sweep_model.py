"""A small model at every kind of point: what is changed, that it is put back, figures against an independent way, runs
that are interrupted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hemostat_lab.doctor import DoctorOptions, run
from hemostat_lab.doctor.options import Axis, DoctorError
from hemostat_lab.doctor.pair import encode
from hemostat_lab.doctor.prompts import load
from hemostat_lab.doctor.sweep.points import PLAIN, UNCHANGED, Change, Drawing, Point, grid

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from hemostat.checkpoints.piecewise import STATE_NAMES  # noqa: E402
from hemostat_lab.doctor.checkpoints import CheckpointPair  # noqa: E402
from hemostat_lab.doctor.sweep import measuring  # noqa: E402
from hemostat_lab.doctor.sweep.alterations import (  # noqa: E402
    check,
    decode,
    keep_n_of_4,
    linears,
    removed_rows,
    stored_share,
)


@pytest.fixture(scope="module")
def model(swept: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(swept).eval()


def fingerprint(model: Any) -> tuple[Any, ...]:
    tensors = {name: (t.data_ptr(), t.sum().item()) for name, t in model.state_dict().items()}
    return tensors, model.config.num_hidden_layers, [id(layer) for layer in model.model.layers]


def logits(model: Any, length: int = 12) -> Any:
    with torch.inference_mode():
        return model(torch.arange(2, 2 + length)[None]).logits[0]


def test_every_point_is_undone_exactly(model: Any) -> None:
    before, said = fingerprint(model), logits(model)
    for point in grid(tuple(Axis), 4):
        if point.drawing != PLAIN or (point.bits < 16 and point.group == 128):
            continue
        with measuring.applied(model, point):
            changed = not torch.equal(logits(model), said)
        assert changed or point == UNCHANGED or point.bits == 8, point.name
        assert fingerprint(model) == before, point.name
    with pytest.raises(KeyError), measuring.applied(model, Point(bits=3, change=Change.DROPPED, layers=1)):
        raise KeyError
    assert fingerprint(model) == before
    assert torch.equal(logits(model), said)


def test_sparsity_of_each_pattern(model: Any) -> None:
    with measuring.applied(model, Point(bits=4, sparsity=0.5)):
        for module in linears(model).values():
            assert (module.weight == 0).float().mean() >= 0.5
    with measuring.applied(model, Point(sparsity=0.75, pattern="n:4")):
        for module in linears(model).values():
            assert ((module.weight.unflatten(1, (-1, 4)) != 0).sum(-1) == 1).all()
    weight = torch.tensor([[1.0, -4.0, 2.0, 3.0, 0.5, 0.1, -0.2, 0.4]])
    assert keep_n_of_4(weight, 2).tolist() == [[0.0, -4.0, 0.0, 3.0, 0.5, 0.0, 0.0, pytest.approx(0.4)]]


def test_removed_heads_and_neurons_do_not_take_part(model: Any) -> None:
    """The model without the rows is the model in which their outputs are zero."""
    layer = model.model.layers[0]
    removed = removed_rows(model, 0.5)
    mlp, heads = removed["model.layers.0.mlp.down_proj"][0], removed["model.layers.0.self_attn.o_proj"][0]
    assert int(mlp.sum()) == 64
    assert int(heads.sum()) == 2 * 16
    handles = [
        module.register_forward_pre_hook(lambda m, args, mask=mask: (args[0].masked_fill(mask, 0.0),))
        for module, mask in ((layer.mlp.down_proj, mlp), (layer.self_attn.o_proj, heads))
    ]
    for name in ("1", "2", "3"):
        for end in ("mlp.down_proj", "self_attn.o_proj"):
            mask = removed[f"model.layers.{name}.{end}"][0]
            module = model.get_submodule(f"model.layers.{name}.{end}")
            handles.append(module.register_forward_pre_hook(lambda m, a, mask=mask: (a[0].masked_fill(mask, 0.0),)))
    expected = logits(model)
    for handle in handles:
        handle.remove()
    with measuring.applied(model, Point(sparsity=0.5, pattern="rows")):
        torch.testing.assert_close(logits(model), expected)


def test_layers(model: Any) -> None:
    """Layer by layer, by hand."""
    base, ids = model.model, torch.arange(2, 14)[None]

    def by_hand(layers: list[Any]) -> Any:
        with torch.inference_mode():
            hidden = base.embed_tokens(ids)
            at = torch.arange(ids.shape[1])[None]
            mask = torch.full((ids.shape[1],) * 2, -1e9).triu(1)[None, None]
            for layer in layers:
                out = layer(
                    hidden, attention_mask=mask, position_ids=at, position_embeddings=base.rotary_emb(hidden, at)
                )
                hidden = out[0] if isinstance(out, tuple) else out
            return model.lm_head(base.norm(hidden))[0]

    layers = list(base.layers)
    for change, order in ((Change.DROPPED, [0, 3]), (Change.DUPLICATED, [0, 1, 1, 2, 2, 3])):
        expected = by_hand([layers[n] for n in order])
        with measuring.applied(model, Point(change=change, layers=2)):
            torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
            # With a cache, too: every layer has a place of its own.
            with torch.inference_mode():
                first = model(ids[:, :5], use_cache=True)
                name = next(name for name in STATE_NAMES if name in first)
                rest = model(ids[:, 5:], **{name: first[name]}).logits[0]
            torch.testing.assert_close(rest, expected[5:], atol=1e-4, rtol=1e-4)
    with measuring.applied(model, Point(change=Change.INSERTED, layers=1)):
        new = model.model.layers[3].mlp.up_proj.weight
        means = 0.5 * (layers[2].mlp.up_proj.weight + layers[3].mlp.up_proj.weight)
        torch.testing.assert_close(new, means)


@pytest.mark.parametrize(
    "drawing", [Drawing(0.0), Drawing(0.5), Drawing(1.3, top_p=0.8), Drawing(top_k=3), Drawing(0.7, 0.6, 5)]
)
def test_decoding_against_numpy(drawing: Drawing) -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(20, 30)) * 3.0
    result = torch.softmax(decode(torch.from_numpy(rows), drawing), -1).numpy()
    for row, p in zip(rows, result, strict=True):
        if drawing.temperature == 0.0:
            expected = (np.arange(30) == row.argmax()).astype(float)
        else:
            w = np.exp(row / drawing.temperature)
            order = np.argsort(-w)
            if drawing.top_k:
                w[order[drawing.top_k :]] = 0.0
            w /= w.sum()
            kept = 1 + int((np.cumsum(w[order]) < drawing.top_p).sum())
            w[order[kept:]] = 0.0
            expected = w / w.sum()
        np.testing.assert_allclose(p, expected, atol=1e-6)


def test_bytes(model: Any) -> None:
    assert stored_share(model, UNCHANGED) == 1.0
    assert stored_share(model, Point(bits=4)) == pytest.approx(4.25 / 16)
    assert stored_share(model, Point(sparsity=0.5)) == pytest.approx(9 / 16)
    assert stored_share(model, Point(sparsity=0.5, pattern="n:4")) == pytest.approx(9 / 16)
    assert stored_share(model, Point(bits=4, sparsity=0.5)) == pytest.approx((2 + 1 + 0.25) / 16)
    assert stored_share(model, Point(change=Change.DROPPED, layers=1)) == 0.75
    assert stored_share(model, Point(change=Change.DUPLICATED, layers=1)) == 1.0
    assert stored_share(model, Point(change=Change.INSERTED, layers=1)) == 1.25
    removed, total = removed_rows(model, 0.5), 0
    for name, module in linears(model).items():
        total += int(module.weight.numel()) - int(removed[name].expand_as(module.weight).sum())
    whole = sum(module.weight.numel() for module in linears(model).values())
    assert stored_share(model, Point(sparsity=0.5, pattern="rows")) == pytest.approx(total / whole)


def test_figures_against_an_independent_computation(options: DoctorOptions) -> None:
    pair = CheckpointPair(options)
    assert pair.compressed_model is pair.reference_model
    jobs = encode(pair, load(options.prompts, 3), options)
    swept = measuring.SweptModel(pair, 0)
    drawing = Drawing(0.7)
    block = measuring.Block(jobs, [])
    other = Point(drawing=Drawing(top_p=0.5))
    for point in (Point(bits=3), Point(bits=3, drawing=drawing), other, Point(drawing=drawing)):
        measured = swept.measure(point, block).texts()
        assert len(block.logits) <= 2
        for job, text in zip(jobs, measured if point != other else [], strict=point != other):
            ids = torch.from_numpy(np.concatenate([job.prompt, text.output]).astype(np.int64))[None]
            with torch.inference_mode():
                r = pair.reference_model(ids).logits[0, len(job.prompt) - 1 : -1].double()
                with measuring.applied(pair.reference_model, point):
                    c = pair.reference_model(ids).logits[0, len(job.prompt) - 1 : -1].double()
            r = r / (1.0 if point.only_decoding else point.drawing.temperature)
            log_r, log_c = torch.log_softmax(r, -1), torch.log_softmax(c / point.drawing.temperature, -1)
            kl = (log_r.exp() * (log_r - log_c)).sum(-1).numpy()
            np.testing.assert_allclose(text.figures["kl_rc"], kl, atol=2e-5)
            tv = (log_r.exp() - log_c.exp()).abs().sum(-1).numpy() / 2
            np.testing.assert_allclose(text.figures["tv"], tv, atol=2e-5)
    unchanged = swept.measure(UNCHANGED, block).texts()
    assert all((text.figures["kl_rc"] == 0.0).all() for text in unchanged)
    assert all((text.figures["floor_kl"] < 1e-4).all() for text in unchanged)


def report_of(options: DoctorOptions, tmp_path: Path) -> dict[str, Any]:
    assert run(replace(options, json=tmp_path / "sweep.json", html=tmp_path / "sweep.html")) == 0
    result: dict[str, Any] = json.loads((tmp_path / "sweep.json").read_text())
    return {name: value for name, value in result["sweep"].items() if not name.endswith("seconds")} | {
        "notes": result["notes"]
    }


@pytest.fixture
def short(options: DoctorOptions) -> DoctorOptions:
    return replace(options, tokens=4, max_prompts=4, sweep=(Axis.STRUCTURE, Axis.DECODING))


def test_an_interrupted_sweep_continues(
    short: DoctorOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    straight = report_of(short, tmp_path)
    # No texts are left, not even as token ids.
    assert not list((tmp_path / "cache").rglob("*.part"))
    assert straight["rungs"] == [15]
    assert {row["name"] for row in straight["table"]} >= {"unchanged", "1 layer dropped", "greedy", "top-p 0.9"}
    work = tmp_path / "work"
    measure, seen = measuring.SweptModel.measure, []

    def interrupt(swept: Any, point: Point, block: Any) -> Any:
        if len(seen) == 5:
            raise KeyboardInterrupt
        seen.append(point)
        return measure(swept, point, block)

    monkeypatch.setattr(measuring.SweptModel, "measure", interrupt)
    assert run(replace(short, work=work)) == 130
    assert "the same command continues" in capsys.readouterr().err
    assert len(list(work.glob("point-*.part"))) == 5
    monkeypatch.setattr(measuring.SweptModel, "measure", lambda *a: seen.append(a[1]) or measure(*a))
    assert report_of(replace(short, work=work), tmp_path) == straight
    assert len(set(seen)) == len(seen) == 15


def test_a_budget_ends_a_sweep_with_what_it_has(short: DoctorOptions, tmp_path: Path) -> None:
    result = report_of(replace(short, sweep_budget=0.0), tmp_path)
    assert [row["name"] for row in result["table"]] == ["unchanged"]
    assert "minutes ended in rung 1 of 1, at point 2 of 15" in result["notes"][-1]


def test_points_whose_logits_overflow_are_left_out_and_named(
    short: DoctorOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One point must not cost the report of all others; without a reference there is nothing to compare with."""
    logits, overflow = measuring.SweptModel._logits, [2]

    def overflowing(swept: Any, model: Any, job: Any, output: Any) -> Any:
        result = logits(swept, model, job, output)
        return result * torch.nan if model.config.num_hidden_layers in overflow else result

    monkeypatch.setattr(measuring.SweptModel, "_logits", overflowing)
    result = report_of(short, tmp_path)
    assert "2 layers dropped: left out in rung 1: logits or KL are not finite" in result["notes"]
    names = [row["name"] for row in result["table"]]
    assert "1 layer dropped" in names
    assert "2 layers dropped" not in names
    overflow.append(4)
    with pytest.raises(DoctorError, match="REFERENCE: its logits are not finite in float32"):
        run(short)


def test_points_that_do_not_fit_are_left_out_and_named(options: DoctorOptions, tiny: Any, tmp_path: Path) -> None:
    """The tiny pair's layers have 32 inputs. Its second model is one more row."""
    changed = replace(
        options, reference=str(tiny.reference), compressed=str(tiny.compressed), max_prompts=3, sweep=(Axis.BITS,)
    )
    result = report_of(changed, tmp_path)
    assert any("8 bits: left out: " in note and "not a multiple of 64" in note for note in result["notes"])
    assert [row["name"] for row in result["table"]] == [
        "unchanged", "4 bits, groups of 32", "4 bits, by row", "3 bits, groups of 32", "3 bits, by row",
    ]  # fmt: skip
    assert result["given"]["name"] == "compressed"
    assert result["given"]["kl_rc"]["value"] > 0.0


def test_one_prompt_is_not_enough(options: DoctorOptions) -> None:
    with pytest.raises(DoctorError, match="--prompts: a sweep needs at least 2 prompts"):
        run(replace(options, max_prompts=1))


def test_check_names_what_does_not_divide(model: Any) -> None:
    from hemostat_lab.doctor.sweep.alterations import NotApplicableError

    with pytest.raises(NotApplicableError, match="has 64 inputs, not a multiple of 128"):
        check(model, Point(bits=4, group=128))
