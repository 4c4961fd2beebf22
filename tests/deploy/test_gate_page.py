"""The page "Before you roll out", from an empty environment to a verdict."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path
from string import ascii_letters

import numpy as np
import pytest
from tests.support.fake_vllm import FakeVllm
from tests.support.gate_servers import servers
from tests.support.paths import ROOT

MAX_SECONDS = 600
"""The longest time of each command."""


def first_command() -> list[str]:
    """Returns the words of the page's first command."""
    found = re.search(r"```sh\n(hemostat gate .+?)\n```", (ROOT / "docs" / "gate.md").read_text(), re.DOTALL)
    assert found is not None
    return shlex.split(found[1].replace("\\\n", " "))


@pytest.mark.slow
def test_the_first_command_of_the_page_comes_to_a_verdict(clean_environment: Path, tmp_path: Path) -> None:
    """Servers that answer like vLLM are in the place of its addresses, and of the folder of the original model."""
    random = np.random.default_rng(9)
    lines = ["".join(random.choice(list(ascii_letters), 30)) for _ in range(400)]
    prompts = [json.dumps({"prompt": line, "max_tokens": 16}) for line in lines]
    (tmp_path / "prompts.jsonl").write_text("\n".join(prompts))
    environment = {"PATH": f"{clean_environment / 'bin'}:/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"}
    with servers(FakeVllm(), FakeVllm(noise=1.0), FakeVllm(noise=0.3)) as (reference, far, near):

        def verdict(stable: str, candidate: str, state: str) -> str:
            given = {"--stable": stable, "--candidate": candidate, "--reference": reference, "--state": state}
            words = first_command()
            for flag, value in given.items():
                words[words.index(flag) + 1] = value
            done = subprocess.run(
                [*words, "--json", f"{state}.json"],
                env=environment,
                cwd=tmp_path,
                capture_output=True,
                text=True,
                timeout=MAX_SECONDS,
                check=False,
            )
            assert "Traceback" not in done.stderr
            result: str = json.loads((tmp_path / f"{state}.json").read_text())["verdict"]
            assert done.returncode == {"pass": 0, "fail": 1, "undecided": 2}[result]
            assert done.stdout.startswith(f"{result}: "), done.stdout
            return result

        assert verdict(far, near, "near") == "pass"
        assert verdict(near, far, "far") == "fail"
