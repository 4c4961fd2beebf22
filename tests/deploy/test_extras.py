"""The processes of `hemostat serve` and the command line import no extra; a command names the extra that it lacks."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tests.support.paths import ROOT, SOURCES

EXTRAS = ("compressed_tensors", "jinja2", "opentelemetry.sdk", "psycopg", "torch", "transformers", "vllm")
PROGRAM = """
import importlib, sys
for name in sys.argv[2:]:
    sys.modules[name] = None  # importing it raises ModuleNotFoundError
importlib.import_module(sys.argv[1])
"""


@pytest.mark.parametrize(
    "module",
    [
        "hemostat.cli",
        "hemostat.supervisor",
        "hemostat.control.process",
        "hemostat.learner.learner_process",
        "hemostat.relay.main",
        "hemostat_lab.doctor",
        "hemostat_lab.demo",
    ],
)
def test_import_without_extras(module: str) -> None:
    done = run(PROGRAM, module, *EXTRAS)
    assert done.returncode == 0, done.stderr


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(str(ROOT / part) for part in SOURCES)
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )


COMMAND = """
import sys
sys.modules[sys.argv.pop(1)] = None
from hemostat.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("absent", "command"),
    [
        ("torch", "adapt {dense} {quantized} --out {out}"),
        ("torch", "compress {dense} {out} --scheme w4a16"),
        ("torch", "doctor {dense} {quantized}"),
        ("compressed_tensors", "adapt {dense} {quantized} --out {out}"),
        ("compressed_tensors", "compress {dense} {out} --scheme w4a16"),
        ("compressed_tensors", "doctor {quantized} {quantized}"),
    ],
)
def test_a_command_without_a_package_names_it_in_one_line(absent: str, command: str, tmp_path: Path) -> None:
    dense, quantized = tmp_path / "dense", tmp_path / "quantized"
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 8}
    quantization = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}}
    for folder, more in ((dense, {}), (quantized, {"quantization_config": quantization})):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config | more))
        save_file({"model.norm.weight": np.ones(4, np.float32)}, folder / "model.safetensors")
    arguments = command.format(dense=dense, quantized=quantized, out=tmp_path / "out").split()
    done = run(COMMAND, absent, *arguments)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "not installed: " in last
    name = absent.replace("_", "-")
    assert name in last
    assert re.search(rf"pip install .*'{name}<\S+,>=\S+'", last)
