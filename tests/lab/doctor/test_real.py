"""The report on the real pair of models compared with an independent computation at full vocabulary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.doctor import report_of

from hemostat_lab.demo.checkpoints import Checkpoints
from hemostat_lab.doctor import DoctorOptions
from hemostat_lab.doctor.pair import unpack

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

PROMPTS = [
    {"messages": [{"role": "user", "content": "Name three colours of the rainbow."}]},
    {"prompt": "The capital of France is"},
    {"prompt": "Once upon a time", "completion": " there was a fox who lived by the sea."},
]


def logprobs(model: Any, prompt: list[int], output: list[int]) -> Any:
    """float64 [T, V] from one plain call on the same tokens (in bfloat16 the length changes the rounding)."""
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *output[:-1]]])).logits[0, len(prompt) - 1 :]
    return torch.log_softmax(logits.double(), -1).numpy()


def test_table_of_the_real_pair(checkpoints: Checkpoints, tmp_path: Path) -> None:
    file, work = tmp_path / "prompts.jsonl", tmp_path / "work"
    file.write_text("\n".join(map(json.dumps, PROMPTS)))
    options = DoctorOptions(
        str(checkpoints.reference),
        str(checkpoints.compressed),
        prompts=file,
        tokens=24,
        device="cpu",
        layer_tokens=0,
        work=work,
    )
    report = report_of(options, tmp_path)
    outputs = [text.output.tolist() for text in unpack((work / "prompts-000000.part").read_bytes()[32:])]

    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoints.compressed)
    models = [
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
        for folder in (checkpoints.reference, checkpoints.compressed)
    ]
    kld, tv, same, nll, p = [], [], [], [], []
    for line, output in zip(PROMPTS, outputs, strict=True):
        prompt = (
            tokenizer.apply_chat_template(line["messages"], add_generation_prompt=True, return_dict=False)
            if "messages" in line
            else tokenizer.encode(line["prompt"])
        )
        if "completion" in line:
            assert tokenizer.decode(output) == line["completion"]
        r, c = (logprobs(model, prompt, output) for model in models)
        rows = np.arange(len(output))
        kld.append((np.exp(r) * (r - c)).sum(1))
        tv.append(abs(np.exp(r) - np.exp(c)).sum(1) / 2)
        same.append(r.argmax(1) == c.argmax(1))
        nll.append(np.stack([-c[rows, output], -r[rows, output]]))
        p.append(np.exp(c[rows, output]) - np.exp(r[rows, output]))
    every, delta = np.concatenate(kld), 100 * np.concatenate(p)
    q, base = np.concatenate(nll, axis=1)
    expected = {
        "Mean PPL(Q)": np.exp(q.mean()),
        "Mean PPL(base)": np.exp(base.mean()),
        "Mean PPL(Q)/PPL(base)": np.exp((q - base).mean()),
        "Mean    KLD": every.mean(),
        "Maximum KLD": every.max(),
        "99.0%   KLD": np.percentile(every, 99),
        "Median  KLD": np.median(every),
        "Mean    Δp": delta.mean(),
        "RMS Δp": np.sqrt((delta**2).mean()),
        "Same top p": 100 * np.concatenate(same).mean(),
        "total variation": np.concatenate(tv).mean(),
    }
    shown = {
        row["name"]: row["value"]
        for key in ("perplexity", "kl_divergence", "token_probability", "divergence")
        for row in report[key]
    }
    for name, value in expected.items():
        assert shown[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    assert report["tokens"] == len(every) > 40
    # W4A16 is far from the reference, and far above what rounding does.
    assert 0.2 < expected["Mean    KLD"] < 1.5
    assert shown["noise floor: c in one prefill ‖ c in two"] < 0.05 * expected["Mean    KLD"]
