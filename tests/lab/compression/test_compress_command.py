"""`hemostat compress`: what it writes and prints, and one line for each mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.support.adapter_models import VOCABULARY, random_texts, save, tiny_model

from hemostat.checkpoints.checkpoint_digest import checkpoint_digest
from hemostat.cli import main

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("compressed_tensors")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_model(num_hidden_layers=2), tmp_path_factory.mktemp("source") / "model")


def records(path: Path) -> Path:
    lines = (
        {"prompt_token_ids": text.prompt.tolist(), "output_token_ids": text.output.tolist()}
        for text in random_texts(12)
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(source: Path, tmp_path: Path, *options: str) -> Path:
    out = tmp_path / "out"
    assert main(["compress", str(source), str(out), "--records", str(records(tmp_path / "records")), *options]) == 0
    return out


def quantization(folder: Path) -> dict[str, object]:
    result: dict[str, object] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return result


def test_digest_bytes_and_settings_are_printed(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run(source, tmp_path, "--scheme", "w4a16", "--group-size", "32")
    printed = capsys.readouterr().out
    assert f"digest {checkpoint_digest(str(out), None)}" in printed
    assert f"{(out / 'model.safetensors').stat().st_size} bytes" in printed
    assert "w4a16, calibrate descent" in printed
    groups = quantization(out)["config_groups"]
    assert groups["group_0"]["weights"]["group_size"] == 32  # type: ignore[index]
    assert not (tmp_path / "cache" / "hemostat" / "compress").exists() or not list(
        (tmp_path / "cache" / "hemostat" / "compress").iterdir()
    ), "token ids can be decoded to text: nothing is left of them"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scheme", "prune", "--sparsity", "1.2"], "sparsity"),
        (["--scheme", "prune"], "needs --sparsity"),
        (["--scheme", "w4a16", "--sparsity", "0.5"], "--sparsity is for --scheme prune"),
        (["--scheme", "w8a8", "--group-size", "64"], "leave --group-size out"),
        (["--scheme", "w4a16", "--group-size", "60"], "not a multiple of 60"),
        (["--scheme", "w4a16", "--calibrate", "smooth"], "use awq"),
        (["--plan", "missing.json"], "missing.json cannot be read"),
        (["--scheme", "w4a16", "--records", "missing"], "missing cannot be read"),
        (["--scheme", "w9a9"], "invalid choice"),
        (["--scheme", "int3"], "argument --scheme: int3 has gone, since no engine serves it: use w4a16 or w8a16"),
    ],
)
def test_a_mistake_is_one_line(
    source: Path, tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    given = [] if "--records" in options else ["--records", str(records(tmp_path / "records"))]
    assert main(["compress", str(source), str(out), *given, *options]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len([line for line in error.splitlines() if "calibrating on" not in line]) == 1
    assert not out.exists()


def test_an_fp8_copy_is_repaired_and_read_again(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from hemostat_lab.models.checkpoint import Checkpoint

    out = run(source, tmp_path, "--scheme", "fp8", "--repair")
    printed = capsys.readouterr().out
    assert f"digest {checkpoint_digest(str(out), None)}" in printed
    assert f"{(out / 'model.safetensors').stat().st_size} bytes" in printed
    assert "repair" in printed
    assert quantization(out)["format"] == "float-quantized"
    written, original = Checkpoint(out, "OUT"), Checkpoint(source, "SOURCE")
    for name in written.quantized:
        exact = original.weight(name)
        error = float((written.weight(name) - exact).norm() / exact.norm())
        assert 0.01 < error < 0.04, "3 bits of fraction"
        assert written.stored_bytes(name) == exact.numel() + 4 * len(exact), "the scales are of SOURCE's type"


def plan(source: Path, path: Path, **changes: object) -> Path:
    """4 bits in groups of 32 for attention, 8 by channel for the first MLP, 5 (dense) for the second one."""
    from hemostat_lab.compression.frame import Source
    from hemostat_lab.compression.plan import LayerPlan, Plan, encode_plan, stored_bytes

    opened = Source.open(source)
    layers = {}
    for name in opened.shapes:
        if "self_attn" in name:
            layers[name] = LayerPlan(4, 32)
        else:
            layers[name] = LayerPlan(8) if "layers.0" in name else LayerPlan(5, 64)
    total = sum(stored_bytes(*shape, layers[name]) for name, shape in opened.shapes.items())
    fields = {"source": opened.checkpoint.digest(), "layers": layers, "bytes": total, "made_from": {}} | changes
    path.write_text(encode_plan(Plan(**fields)))  # type: ignore[arg-type]
    return path


def test_a_plan_is_carried_out(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from hemostat_lab.models.checkpoint import Checkpoint

    out = run(source, tmp_path, "--plan", str(plan(source, tmp_path / "plan.json")))
    assert "layers of 5 bits are written dense" in " ".join(capsys.readouterr().err.split())
    config = quantization(out)
    groups = {group["weights"]["num_bits"]: group for group in config["config_groups"].values()}  # type: ignore[attr-defined]
    assert groups.keys() == {4, 8}
    assert sorted(config["ignore"]) == ["lm_head"] + [  # type: ignore[call-overload]
        f"model.layers.1.mlp.{kind}_proj" for kind in ("down", "gate", "up")
    ]
    written, original = Checkpoint(out, "OUT"), Checkpoint(source, "SOURCE")
    for name, error in (("0.self_attn.q_proj", 0.25), ("0.mlp.up_proj", 0.02), ("1.mlp.up_proj", 0.1)):
        exact, rounded = original.weight(f"model.layers.{name}").float(), written.weight(f"model.layers.{name}").float()
        relative = float((rounded - exact).norm() / exact.norm())
        assert 0.1 * error < relative < error, name


def test_a_plan_for_another_model_is_refused(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = save(tiny_model(seed=1, num_hidden_layers=2), tmp_path / "other")
    command = ["compress", str(other), str(tmp_path / "out"), "--plan", str(plan(source, tmp_path / "plan.json"))]
    capsys.readouterr()
    assert main(command) == 2
    error = capsys.readouterr().err.strip()
    assert "the plan is for another checkpoint" in error
    assert "\n" not in error
    assert not (tmp_path / "out").exists()


def test_vocabulary_is_checked(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = tmp_path / "records"
    wrong.write_text(json.dumps({"prompt_token_ids": [VOCABULARY], "output_token_ids": [1]}) + "\n")
    command = ["compress", str(source), str(tmp_path / "out"), "--scheme", "w4a16", "--records", str(wrong)]
    assert main(command) == 2
    assert "outside of the vocabulary" in capsys.readouterr().err


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_another_checkpoint_in_the_destination_stays(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of another source, of other settings, with a changed file, or with one that this command did not write."""
    other = save(tiny_model(num_hidden_layers=1), tmp_path / "other")
    out = tmp_path / "out"
    first = ["compress", str(source), str(out), "--scheme", "prune50"]
    assert main(first) == 0
    made = contents(out)
    assert main(first) == 0, "nothing to do"
    assert contents(out) == made
    capsys.readouterr()
    for command, differing in (
        (["compress", str(other), str(out), "--scheme", "prune50"], "source"),
        (["compress", str(source), str(out), "--scheme", "prune30"], "settings"),
        (["compress", str(source), str(out), "--scheme", "w4a16", "--records", "not-read"], "settings"),
    ):
        assert main(command) == 2
        error = capsys.readouterr().err.splitlines()
        assert error[-1] == (
            f"hemostat: {out} holds a result of Hemostat that was made from something else ({differing}): name another "
            "folder, or replace it with --overwrite"
        )
        assert contents(out) == made
    (out / "notes.txt").write_text("which prompts became worse")
    for command in (["compress", str(other), str(out), "--scheme", "prune50"], [*first[:-1], "prune30"]):
        assert main([*command, "--overwrite"]) == 2
        assert "out holds notes.txt, which Hemostat did not write there: name another folder" in capsys.readouterr().err
        assert contents(out).keys() == {*made, "notes.txt"}
    (out / "notes.txt").unlink()
    (out / "config.json").write_text(json.dumps(json.loads(made["config.json"]) | {"edited": "by hand"}))
    assert main(first) == 2
    assert "was changed after it was written: name another folder, or replace it with --overwrite" in (
        capsys.readouterr().err
    )
    assert b"by hand" in (out / "config.json").read_bytes()
    assert main(["compress", str(other), str(out), "--scheme", "prune50", "--overwrite"]) == 0
    assert contents(out).keys() == made.keys()
    assert contents(out) != made


@pytest.mark.parametrize("name", ["checkpoint of another program", "folder below", "damaged manifest"])
def test_what_hemostat_did_not_write_is_never_replaced(
    name: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    if name == "checkpoint of another program":
        save(tiny_model(num_hidden_layers=1), out)
    else:
        assert main(["compress", str(source), str(out), "--scheme", "prune50"]) == 0
    if name == "folder below":
        (out / "tokenizer").mkdir()
    if name == "damaged manifest":
        (out / "hemostat-checkpoint.json").write_text("{")
    weights = (out / "model.safetensors").read_bytes()
    for options in ([], ["--overwrite"]):
        assert main(["compress", str(source), str(out), "--scheme", "prune30", *options]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert "which Hemostat did not write there: name another folder" in error
        assert "--overwrite" not in error
    assert (out / "model.safetensors").read_bytes() == weights
