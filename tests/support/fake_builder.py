"""The process that makes an adapter, without torch: random corrections, and every way in which it can fail.

    python tests/support/fake_builder.py JOBFOLDER [PARENT]

HEMOSTAT_FAKE_BUILDER names what goes wrong; "" is nothing. `killed:N`: it is killed at stage N, once.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from hemostat.adapters.live.job import linear_shapes
from hemostat.checkpoints.checkpoint_digest import checkpoint_digest
from hemostat_calibration.adapters.factors import LowRank
from hemostat_calibration.profiles.adapter import adapter_profile

ENVIRONMENT = "HEMOSTAT_FAKE_BUILDER"
STAGES = ("reading", "statistics", "corrections", "sharing", "held out", "writing")
RANK = 2


def say(**line: Any) -> None:
    print(json.dumps(line), flush=True)


def main(folder: Path) -> int:
    fault, _, argument = os.environ.get(ENVIRONMENT, "").partition(":")
    job = json.loads((folder / "job.json").read_text())
    tokens = np.load(folder / "tokens.npz")
    if fault == "refuses":
        say(error="adapter.compressed: cannot be read")
        return 1
    if fault == "memory":
        kept = np.ones(int(argument) << 17)  # that many MiB, touched
        time.sleep(60)
        return int(kept[0])
    if fault == "disk":
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    work = folder / "work"
    work.mkdir(exist_ok=True)
    for n, stage in enumerate(STAGES):
        say(stage=stage, done=n, total=len(STAGES))
        marker = work / f"{n}"
        if not marker.exists():
            marker.touch()
            if fault == "killed" and n == int(argument):
                if stage == "writing":
                    (folder / "profile.safetensors").write_bytes(b"half of it")
                os.kill(os.getpid(), signal.SIGKILL)
        if fault == "killed_always":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "hangs":
            time.sleep(600)
    rng = np.random.default_rng(int(tokens["ids"].sum()))
    layers = {
        name: LowRank(
            rng.normal(0, 0.05, (RANK, inputs)).astype(np.float32),
            rng.normal(0, 0.05, (outputs, RANK)).astype(np.float32),
        )
        for name, (outputs, inputs) in linear_shapes(Path(job["reference"])).items()
        if name.endswith("_proj")
    }
    if fault == "misfit":
        layers = {name: LowRank(f.a[:, 1:], f.b) for name, f in layers.items()}
    vocab_size = json.loads((Path(job["reference"]) / "config.json").read_text())["vocab_size"]
    model = "another" if fault == "other_model" else job["model"]
    profile = adapter_profile(
        model=model, vocab_size=vocab_size, layers=layers, metadata={"tokens": str(len(tokens["ids"]))}
    )
    data = bytearray(profile.to_bytes())
    if fault == "half":
        del data[len(data) // 2 :]
    if fault == "bit":
        data[-1] ^= 1
    if fault == "nan":
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        start = 8 + length + next(entry["data_offsets"][0] for entry in header.values() if entry.get("dtype") == "F32")
        data[start : start + 4] = np.float32(np.nan).tobytes()
    compressed = checkpoint_digest(job["compressed"], None)
    report = {
        "version": profile.version,
        "rank": RANK,
        "tokens": len(tokens["ids"]),
        "reference": checkpoint_digest(job["reference"], None),
        "compressed": "0" * 32 if fault == "wrong_base" else compressed,
        "kinds": {"q_proj": {"rank": RANK, "won": 0.5}},
        "layers": {name: {"rank": RANK, "won": 0.5} for name in layers},
        "held_out": None,
    }
    try:
        (folder / "profile.safetensors").write_bytes(data)
        if fault != "nothing":
            (folder / "report.json").write_text("{" if fault == "half_report" else json.dumps(report))
    except OSError as error:
        say(error=f"{error.filename}: {error.strerror}")
        return 1
    say(done=True, version=profile.version)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
