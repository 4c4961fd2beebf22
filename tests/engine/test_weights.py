"""The fingerprint of the weights that an engine has loaded, and how it reaches the registry."""

from __future__ import annotations

import logging
import os
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from tests.support.engine_admin import TOKEN, EngineAdmin
from tests.support.engine_profiles import VOCAB_SIZE

pytest.importorskip("torch")

from hemostat_engine import weights
from hemostat_engine.agent import Agent, Identity
from hemostat_engine.library import Counters, Library
from hemostat_engine.settings import Settings
from hemostat_engine.taps import Taps
from hemostat_engine.weights import LoadedWeights, fingerprint

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def checkpoint(folder: Path, seed: int = 0, shards: int = 2) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for n in range(shards):
        tensor = rng.normal(size=(300, 200)).astype(np.float32)
        safetensors.numpy.save_file({f"layer.{n}": tensor}, folder / f"model-{n}.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def of(folder: Path) -> str:
    return fingerprint(str(folder))


def test_copies_have_one_fingerprint_whatever_their_times_and_other_files(tmp_path: Path) -> None:
    first = checkpoint(tmp_path / "a")
    shutil.copytree(first, tmp_path / "b")
    for file in (tmp_path / "b").iterdir():
        os.utime(file, ns=(1, 1))
    (tmp_path / "b" / "README.md").write_text("of one machine")
    assert of(first) == of(tmp_path / "b")
    assert len(of(first)) == 32


@pytest.mark.parametrize("block_bytes", [weights.BLOCK_BYTES, 256])
def test_other_weights_with_the_same_names_and_sizes_are_others(
    block_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of 240 kB: read whole, or by 128 samples of 256 bytes."""
    monkeypatch.setattr(weights, "BLOCK_BYTES", block_bytes)
    first, other = checkpoint(tmp_path / "a"), checkpoint(tmp_path / "b", seed=1)
    assert [f.stat().st_size for f in sorted(first.iterdir())] == [f.stat().st_size for f in sorted(other.iterdir())]
    before = of(first)
    assert before != of(other)
    for file in other.iterdir():
        stat = (first / file.name).stat()
        shutil.copy(file, first / file.name)
        os.utime(first / file.name, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert of(first) == of(other)


@pytest.mark.parametrize("name", ["config.json", "model-1.safetensors", "model.safetensors.index.json"])
def test_each_file_counts(name: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "a")
    before = of(folder)
    with (folder / name).open("ab") as file:
        file.write(b" ")
    assert of(folder) != before


def test_reading_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint(tmp_path / "a", shards=1)
    (folder / "config.json").unlink()
    with (folder / "model-0.safetensors").open("r+b") as file:
        file.truncate(50 << 30)  # sparse
    read: list[int] = []
    samples = weights._samples

    def counted(*given: Any) -> Any:
        for block in samples(*given):
            read.append(len(block))
            yield block

    monkeypatch.setattr(weights, "_samples", counted)
    of(folder)
    assert sum(read) == weights.BLOCKS * weights.BLOCK_BYTES == 16 << 20
    monkeypatch.setattr(weights, "MAX_FILES", 0)
    assert of(folder) == ""


def test_of_the_hub_the_commit_counts(tmp_path: Path) -> None:
    cached = checkpoint(tmp_path / "models--a--b" / "snapshots" / COMMIT)
    assert fingerprint("a/b", COMMIT) == of(cached) != fingerprint("a/b", COMMIT.replace("0", "f"))
    (tmp_path / "current").symlink_to(cached)
    assert of(tmp_path / "current") == of(cached), "the same through a link"
    assert fingerprint("a/b") == ""
    configuration = tmp_path / "of remote weights"
    configuration.mkdir()
    (configuration / "config.json").write_text("{}")
    assert of(configuration) == "", "a folder without weights says nothing about them"


def test_what_is_no_file_is_never_opened(tmp_path: Path) -> None:
    """Reading a pipe or a device would not end."""
    folder = checkpoint(tmp_path / "a")
    before = of(folder)
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "folder.safetensors").mkdir()
    links = {"pipe": folder / "pipe.safetensors", "device": "/dev/zero", "loop": "loop.bin", "nothing": "nowhere"}
    for name, target in links.items():
        (folder / f"{name}.bin").symlink_to(target)
    assert of(folder) == before
    assert of(folder / "pipe.safetensors") == of(Path("/dev/zero")) == of(tmp_path / "nowhere") == ""


def test_a_single_file(tmp_path: Path) -> None:
    for n in range(2):
        (tmp_path / f"{n}.gguf").write_bytes(b"%d" % n)
    assert len({fingerprint(str(tmp_path / f"{n}.gguf")) for n in range(2)} - {""}) == 2


def computed() -> None:
    """Returns once no fingerprint is being computed."""
    for thread in threading.enumerate():
        if thread.name == "hemostat-weights":
            thread.join()


def test_what_vllm_says_is_read_and_what_it_does_not_say_is_not_known() -> None:
    config = SimpleNamespace(
        served_model_name=["m", "other"], model="a/b", hf_config=SimpleNamespace(_commit_hash=COMMIT)
    )
    result = LoadedWeights.of(config)
    result.start()
    computed()
    assert result.report() == {"model": "m", "weights": fingerprint("a/b", COMMIT)}
    unknown: list[Any] = [
        None,
        SimpleNamespace(),
        SimpleNamespace(served_model_name="m", model=Path("x")),
        SimpleNamespace(served_model_name="m" * 300, model="a/b", hf_config=config.hf_config),
        SimpleNamespace(served_model_name="m", model="a/b", hf_config=SimpleNamespace(_commit_hash=None)),
    ]

    class Raises:
        served_model_name, model = "m", "a/b"

        @property
        def hf_config(self) -> Any:
            raise RuntimeError("it needs the network")

    for model in [*unknown, Raises()]:
        result = LoadedWeights.of(model)
        result.start()
        computed()
        assert result.report() == {}


def test_files_that_cannot_be_read_are_logged_once_and_nothing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> Any:
        raise OSError("stale file handle")

    monkeypatch.setattr(weights, "_samples", refuse)
    loaded_weights = LoadedWeights("m", str(checkpoint(tmp_path / "a")))
    with caplog.at_level(logging.WARNING):
        loaded_weights.start()
        computed()
        assert loaded_weights.report() == loaded_weights.report() == {}
    assert [record.message for record in caplog.records] == [
        f"the weights in {tmp_path / 'a'} have no fingerprint: stale file handle"
    ]


def test_the_registry_gets_it_once_it_is_known(tmp_path: Path) -> None:
    admin = EngineAdmin()
    try:
        loaded_weights = LoadedWeights("m", str(checkpoint(tmp_path / "a")))
        counters = Counters()
        agent = Agent(
            Identity("boot", 0, 1, VOCAB_SIZE, "v1", "test"),
            Settings(admin_url=admin.url, engine_token=TOKEN),
            Library(VOCAB_SIZE),
            counters,
            Taps(counters),
            weights=loaded_weights,
            spawn=lambda run: run(),
        )
        agent.tick(0.0)
        assert admin.registry.live_engines(0.0) == 1
        assert not admin.registry.weights({"m"}, 0.0)
        agent.start()
        computed()
        agent.stop()
        agent.tick(1e9)
        assert admin.registry.weights({"m"}, 0.0) == {of(tmp_path / "a"): 1}
        assert not admin.registry.weights({"another model"}, 0.0)
    finally:
        admin.close()
