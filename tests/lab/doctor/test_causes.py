"""Causes and prescription of a tiny pair, whose error was put into known places."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from tests.support.doctor import TinyPair, report_of

from hemostat import cli
from hemostat_calibration.statistics.streaming import student_975
from hemostat_lab.compression.plan import LayerPlan, check_plan, read_plan, stored_bytes
from hemostat_lab.doctor import html, terminal
from hemostat_lab.doctor.causes.findings import clear, findings
from hemostat_lab.models.checkpoint import Checkpoint

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.support.predicted_changes import input_moments_of, mean_square_change  # noqa: E402

from hemostat_lab.compression.input_moments import InputMoments  # noqa: E402


@pytest.fixture(scope="module")
def report(tiny: TinyPair, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The first two layers differ; the noise of the second is five times that of the first."""
    folder = tmp_path_factory.mktemp("causes")
    options = tiny.options(layer_tokens=40, budget="0.4", plan=folder / "plan.json", plan_for="any", html=folder / "h")
    result = report_of(options, folder)
    result["page"] = (folder / "h").read_text()
    result["plan"] = read_plan(folder / "plan.json")
    return result


def restored(report: dict[str, Any], name: str) -> dict[str, Any]:
    row: dict[str, Any] = next(row for row in report["layers"]["restored"] if row["name"] == name)
    return row


def test_restoring_one_and_all_but_one(report: dict[str, Any]) -> None:
    first, second = restored(report, "layer 0"), restored(report, "layer 1")
    assert 0 < first["alone_nats"] < second["alone_nats"]
    # Only two layers differ: restoring one leaves what the other costs alone.
    assert first["mean_kld"] == pytest.approx(second["alone_nats"], rel=1e-5)
    assert second["mean_kld"] == pytest.approx(first["alone_nats"], rel=1e-5)
    additivity = report["layers"]["additivity"]
    assert additivity["parts"] == 2
    assert additivity["sum_alone"] == pytest.approx(first["alone_nats"] + second["alone_nats"])
    assert additivity["excess"] == pytest.approx(report["layers"]["mean_kld"] - additivity["sum_alone"])


def test_every_linear_layer_that_differs_is_measured(report: dict[str, Any]) -> None:
    modules = report["layers"]["modules"]
    assert {(row["layer"], row["module"]) for row in modules["rows"]} == {
        (n, name) for n in (0, 1) for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
                                               "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    }  # fmt: skip
    assert modules["not_measured"] == 0
    cost = [sum(row["alone_nats"] for row in modules["rows"] if row["layer"] == n) for n in (0, 1)]
    assert 0 < cost[0] < cost[1]


def test_findings_name_the_layer_and_carry_their_evidence(report: dict[str, Any]) -> None:
    by_topic = {finding["topic"]: finding for finding in reversed(report["findings"])}
    assert {"position", "token class", "layer", "additivity", "kind of module", "module",
            "outliers of weights", "outliers of activations", "attention sink"} == by_topic.keys()  # fmt: skip
    layer = by_topic["layer"]
    row = restored(report, "layer 1")
    assert layer["value"] == row["won_nats"]
    assert layer["half_width"] == pytest.approx(student_975(layer["requests"] - 1) * row["won_se_by_request"])
    assert (
        f"with layer 1 restored and all else compressed, the mean KLD of {report['layers']['mean_kld']:.4f}"
        in (layer["text"])
    )
    assert "layer 1 " in by_topic["module"]["text"]
    for finding in report["findings"]:
        assert finding["tokens"] > 0 < finding["requests"], finding
        assert finding["text"].endswith("."), finding
        assert "nan" not in finding["text"], finding


def test_prescription_is_a_plan_within_the_budget(report: dict[str, Any], tiny: TinyPair) -> None:
    prescription, plan = report["prescription"], report["plan"]
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny.reference)
    shapes = {n: tuple(m.weight.shape) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    del shapes["lm_head"]
    assert plan.layers.keys() == shapes.keys()
    assert plan.source == report["reference"]["digest"]
    check_plan(plan, Checkpoint(tiny.reference, "SOURCE").digest(), shapes)  # as compress --plan does
    assert plan.bytes == sum(stored_bytes(*shapes[name], layer) for name, layer in plan.layers.items())
    dense = sum(stored_bytes(*shape, LayerPlan(16)) for shape in shapes.values())
    assert prescription["budget"] == round(0.4 * dense)
    assert plan.bytes <= prescription["budget"] < 1.02 * plan.bytes
    assert len(set(plan.layers.values())) > 1
    own, *others = prescription["compared"]
    assert own["name"] == "prescribed"
    assert others[-1]["name"] == "COMPRESSED"
    assert others[0]["name"].startswith("uniform ")
    assert own["predicted"] <= others[0]["predicted"]
    assert prescription["predicted_lower_bound"] <= own["predicted"]


def input_moments(model: Any, names: list[str], texts: list[Any]) -> dict[str, InputMoments]:
    """Of what the layers read, by hooks in the whole model."""
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _, given, __, name=name: rows[name].append(given[0][0]))
        for name in names
    ]
    with torch.no_grad():
        for ids in texts:
            model(torch.from_numpy(ids.astype(np.int64))[None])
    for handle in handles:
        handle.remove()
    return {name: input_moments_of(torch.cat(row)) for name, row in rows.items()}


def test_measured_mix_is_that_of_a_model_with_rounded_weights(report: dict[str, Any], tiny: TinyPair) -> None:
    """The reference is as it was afterwards, and the figure is the KL of an independently rounded model."""
    from hemostat_lab.doctor.checkpoints import CheckpointPair, kl
    from hemostat_lab.doctor.pair import encode
    from hemostat_lab.doctor.prescription.candidates import planned_weight
    from hemostat_lab.doctor.prompts import load

    options = tiny.options()
    pair = CheckpointPair(options)
    jobs = encode(pair, load(tiny.prompts, None), options)
    outputs = [
        text.output for begin in range(0, len(jobs), 2) for text in pair.score(jobs[begin : begin + 2], 0, False)
    ]
    rounded = transformers.AutoModelForCausalLM.from_pretrained(tiny.reference).eval()
    divergences, weights = [], {}
    learned = [np.concatenate([job.prompt, output]) for job, output in zip(jobs, outputs, strict=True)][0::2]
    inputs = input_moments(rounded, list(report["plan"].layers), learned)
    with torch.inference_mode():
        for name, plan in report["plan"].layers.items():
            module = rounded.get_submodule(name)
            weights[name] = planned_weight(name, module.weight.data, plan, inputs[name])
        for name, weight in weights.items():
            rounded.get_submodule(name).weight.data = weight
        for job, output in list(zip(jobs, outputs, strict=True))[1::2]:
            ids = torch.tensor([[*job.prompt.tolist(), *output.tolist()]])
            r, c = (model(ids).logits[0, len(job.prompt) - 1 : -1] for model in (pair.reference_model, rounded))
            divergences += kl(r, c).tolist()
    assert report["prescription"]["tokens"] == len(divergences)
    assert report["prescription"]["mean_kld"] == pytest.approx(np.mean(divergences), rel=1e-3)


def test_page_shows_causes_and_prescription(report: dict[str, Any]) -> None:
    page = report["page"]
    for text in ("<h2>Causes</h2>", "<h2>Prescription</h2>", "Bits of each linear layer", "self_attn.q_proj"):
        assert text in page
    assert page.count('class="heat"') > 14 + 21


def test_sentences_of_figures_without_a_clear_cause(report: dict[str, Any]) -> None:
    """Intervals that include 0 are not stated as causes."""
    vague = json.loads(json.dumps({key: report[key] for key in report if key != "plan"}))
    for key in ("by_position", "by_class", "by_entropy", "by_form", "by_prompt_length"):
        for row in vague[key]:
            row["excess"]["se_by_request"] = 100.0
    for row in vague["layers"]["restored"]:
        row["won_se_by_request"] = 100.0
    vague["layers"]["additivity"]["excess_se_by_request"] = 100.0
    vague["layers"]["noise_floor"] = 100.0
    texts = [finding["text"] for finding in findings(vague)]
    assert sum("not clearly" in text for text in texts) >= 2
    assert any("no single layer stands out" in text for text in texts)
    assert any("The effects add up" in text for text in texts)
    assert any("not distinguished from rounding" in text for text in texts)


def test_the_largest_of_many_has_to_be_clearer() -> None:
    """Of 30 groups that are all alike, the largest is 2.3 standard errors above 0 in most reports."""
    draw = np.random.default_rng(5)
    largest = draw.standard_normal((400, 30)).max(axis=1)
    alone = np.mean([clear(value, 1.0, 1000) for value in largest])
    shared = np.mean([clear(value, 1.0, 1000, chosen_of=30) for value in largest])
    assert alone > 0.4
    assert shared < 0.06


def test_figures_that_are_infinite_are_left_out(report: dict[str, Any]) -> None:
    """KL is infinite where the compressed model excludes an id: JSON has null there."""
    infinite = json.loads(json.dumps({key: report[key] for key in report if key != "plan"}))
    layers = infinite["layers"]
    layers["mean_kld"] = layers["additivity"]["excess"] = None
    for row in layers["restored"]:
        row["won_nats"] = row["won_se_by_request"] = row["won_share"] = None
    layers["modules"]["rows"][0]["alone_nats"] = None
    infinite["findings"] = findings(infinite)
    assert {"layer", "kind of module", "additivity"}.isdisjoint(finding["topic"] for finding in infinite["findings"])
    Console(file=io.StringIO()).print(terminal.render(infinite))
    assert "Causes" in html.render(infinite)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "many"], "--budget: 'many' is neither a number of bytes nor a share"),
        (["--budget", "1.5"], "--budget: '1.5' is neither"),
        (["--budget", "-3"], "--budget: '-3' is neither"),
        (["--budget", "nan"], "--budget: 'nan' is neither"),
        (["--plan", "/nowhere/plan.json"], "--plan: /nowhere/plan.json cannot be written"),
        (["--plan", "/nowhere/plan.json", "--sweep"], "--sweep makes no prescription"),
        (["--plan-for", "tpu"], "invalid choice: 'tpu'"),
    ],
)
def test_bad_options_of_a_prescription(
    arguments: list[str], message: str, tiny: TinyPair, capsys: pytest.CaptureFixture[str]
) -> None:
    flag, value, *more = arguments
    assert cli.main(["doctor", str(tiny.reference), str(tiny.compressed), f"{flag}={value}", *more]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_predicted_loss_is_the_mean_square_of_the_change_of_log_likelihood(tiny: TinyPair) -> None:
    """Against gradients of the whole model, for one weight matrix and the change at one token at a time."""
    from hemostat_lab.doctor.prescription.losses import predicted_losses
    from hemostat_lab.models.parts import Parts

    ids = np.array([5, 17, 200, 33, 90, 12], np.int32)
    result = predicted_losses(tiny.reference, [ids], "any", "cpu", 3, Parts(None), lambda *_: None)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny.reference).eval()
    name = "model.layers.1.mlp.down_proj"
    change, layer = mean_square_change(model, ids, name, 3), result[name]
    for plan, predicted in zip(layer.plans, layer.losses, strict=True):
        assert predicted == pytest.approx(0.5 * change(plan), rel=1e-3, abs=1e-12), plan


def test_prescription_continues_after_an_interruption(
    tiny: TinyPair, report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hemostat_lab.doctor import run
    from hemostat_lab.doctor.prescription import losses

    options = tiny.options(
        layer_tokens=0, budget="0.4", plan=tmp_path / "plan.json", plan_for="any", work=tmp_path / "w"
    )
    mean_square, calls = losses.TokenRows.mean_square, 0

    def counted(*arguments: Any) -> float:
        nonlocal calls
        calls += 1
        if calls == stop:
            raise KeyboardInterrupt
        return mean_square(*arguments)

    monkeypatch.setattr(losses.TokenRows, "mean_square", counted)
    stop = 150  # in the second of three layers
    assert run(options) == 130
    assert not (tmp_path / "plan.json").exists()
    assert len(list((tmp_path / "w").glob("prescription-*-layer-*.part"))) == 1
    stop = -1
    assert run(options) == 0
    assert read_plan(tmp_path / "plan.json").layers == report["plan"].layers
    assert calls <= 150 + 2 * 7 * 12  # the finished layer is not measured again
    assert not list((tmp_path / "w").glob("rounded-*weights*")), "copies of the weights are not left behind"
    assert run(options) == 0
    assert read_plan(tmp_path / "plan.json").layers == report["plan"].layers


def test_losses_of_other_candidates_in_the_work_folder_are_not_used(
    tiny: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hemostat_lab.doctor import run
    from hemostat_lab.doctor.prescription import candidates

    options = tiny.options(
        layer_tokens=0, budget="0.4", plan=tmp_path / "plan.json", plan_for="any", work=tmp_path / "w"
    )
    for plans in ((LayerPlan(2, 32), LayerPlan(16)), (LayerPlan(3, 32), LayerPlan(4, 32), LayerPlan(16))):
        monkeypatch.setitem(candidates._CANDIDATES, "any", plans)
        assert run(options) == 0
        assert set(read_plan(tmp_path / "plan.json").layers.values()) <= set(plans)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"budget": "100"}, "--budget: 100 bytes are too few: the smallest plan for vllm needs"),
        ({"prescribe": True}, "not all layers of COMPRESSED are stored quantized"),
    ],
)
def test_budgets_that_cannot_be_met(
    changed: dict[str, Any], message: str, tiny: TinyPair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from hemostat_lab.doctor import run
    from hemostat_lab.doctor.options import DoctorError

    with pytest.raises(DoctorError, match=message):
        run(replace(tiny.options(layer_tokens=0, max_prompts=2), **changed))
    with pytest.raises(DoctorError, match="name two checkpoint folders, not servers"):
        run(replace(tiny.options(), reference="http://a", compressed="http://b", prescribe=True))
