"""The gate on real vLLM servers with a model of 135M parameters: what fails, and why.

The sentence of each verdict is printed with the number of prompts that it took (docs/results.md has them):
`make test-slow ARGS="tests/gate/test_real_vllm.py -s"`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from tests.support.minutes import starting

from hemostat.cli import main
from hemostat.gate.asked import load
from hemostat_lab.demo import vllm_server as vllm_process
from hemostat_lab.demo.checkpoints import Checkpoints

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(3600)]

FAIL = 1
ARGUMENTS = ("--enforce-eager", "--dtype", vllm_process.dtype(), "--max-model-len", "2048")
SCALED = "model.layers.29."
"""The last layer's weights."""

Ask = Callable[..., tuple[int, str]]


@contextmanager
def serving(checkpoint: Path, folder: Path, *more: str) -> Iterator[str]:
    server = vllm_process.VllmServer(checkpoint, "smollm2", folder / "vllm.log", [*ARGUMENTS, *more])
    try:
        with starting("vLLM"):
            server.start()
            server.wait_ready(900.0, progress=print)
        yield server.url
    finally:
        server.stop()


@pytest.fixture(scope="module")
def original(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(checkpoints.reference, tmp_path_factory.mktemp("original")) as url:
        yield url


@pytest.fixture
def ask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Ask:
    """Asks the prompts that come with Hemostat, with short answers. Returns the exit code and what was printed."""
    prompts = tmp_path / "prompts.jsonl"
    short = [msgspec.structs.replace(prompt, max_tokens=16) for prompt in load(None)]
    prompts.write_bytes(msgspec.json.Encoder().encode_lines(short))

    def asked(stable: str, candidate: str, *more: str) -> tuple[int, str]:
        expect = () if "--expect" in more else ("--expect", "same")
        code = main(["gate", "--stable", stable, "--candidate", candidate, "--prompts", str(prompts), *expect, *more])
        captured = capsys.readouterr()
        with capsys.disabled():
            print(captured.out or captured.err)
        return code, captured.out or captured.err

    return asked


def copied(checkpoint: Path, copy: Path) -> Path:
    """Returns a folder with the same files, as links that a test may replace."""
    copy.mkdir()
    for file in checkpoint.iterdir():
        (copy / file.name).symlink_to(file)
    return copy


def test_a_layer_whose_weights_are_a_twentieth_too_large_fails(
    original: str, ask: Ask, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    changed = copied(checkpoints.reference, tmp_path / "changed")
    weights = load_file(changed / "model.safetensors")
    for name in weights:
        if name.startswith(SCALED) and name.endswith("proj.weight"):
            weights[name] *= 1.05
    (changed / "model.safetensors").unlink()
    save_file(weights, changed / "model.safetensors", {"format": "pt"})
    with serving(changed, tmp_path) as candidate:
        code, text = ask(original, candidate)
    assert code == FAIL, text
    assert text.startswith("fail: the candidate is far from the stable model, on ")


def test_another_default_temperature_fails(original: str, ask: Ask, checkpoints: Checkpoints, tmp_path: Path) -> None:
    colder = ("--override-generation-config", json.dumps({"temperature": 0.6}))
    with serving(checkpoints.reference, tmp_path, *colder) as candidate:
        code, text = ask(original, candidate)
    assert code == FAIL, text
    assert text.startswith("fail: the candidate is less random by its server's default parameters (temperature, ")


def test_another_chat_template_fails_at_once(original: str, ask: Ask, checkpoints: Checkpoints, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    written = (checkpoints.reference / "chat_template.jinja").read_text()
    template.write_text(written.replace("'<|im_start|>' + message", "'<|im_start|> ' + message"))
    assert template.read_text() != written
    with serving(checkpoints.reference, tmp_path, "--chat-template", str(template)) as candidate:
        code, text = ask(original, candidate)
    assert code == FAIL, text
    assert "it has another chat template or tokenizer" in text
