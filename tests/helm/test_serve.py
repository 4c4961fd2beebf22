"""What a pod would run: `hemostat serve` with the rendered file and environment, and the probes' paths asked."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import yaml
from tests.support.helm_chart import Helm, Rendered
from tests.support.stack import wait_for


@contextmanager
def served(rendered: Rendered, folder: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The admin port's address. Only the ports are not the pod's: they may be taken here."""
    path = folder / "hemostat.yaml"
    path.write_text(yaml.safe_dump(rendered.config))
    flags = [
        f"--set={port}.{key}={value}"
        for port in ("listen", "admin")
        for key, value in (("host", "127.0.0.1"), ("port", 0))
    ]
    arguments = [
        str(path) if argument == "/etc/hemostat/hemostat.yaml" else argument for argument in rendered.hemostat["args"]
    ]
    assert str(path) in arguments
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HEMOSTAT_")}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "hemostat", *arguments, *flags],
            stdout=subprocess.PIPE, stderr=log, text=True, env=kept | dict(rendered.environment()),
        )  # fmt: skip
    try:
        assert process.stdout is not None
        process.stdout.readline()
        match = re.search(r"admin port (http://\S+)", process.stdout.readline())
        assert match, (folder / "log").read_text()
        yield match[1], process
    finally:
        process.terminate()
        try:
            process.wait(60)
        finally:
            process.kill()
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


def answer(admin: str, rendered: Rendered, probe: str) -> int:
    """Returns the status with which a probe of the chart is answered."""
    return httpx.get(admin + rendered.hemostat[probe]["httpGet"]["path"], timeout=60).status_code


def test_a_pod_is_ready_while_its_reference_is_gone_and_stops_in_time(helm: Helm, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens there
        nobody = f"http://127.0.0.1:{taken.getsockname()[1]}"
        rendered = helm.set(
            f"upstream.url={nobody}", "config.reference.backend=vllm", f"config.reference.url={nobody}",
            "config.calibration.mode=auto", "config.shutdown_seconds=0",
        )  # fmt: skip
        with served(rendered, tmp_path) as (admin, process):
            for probe in ("startupProbe", "livenessProbe"):
                assert answer(admin, rendered, probe) == 200
            # The address is printed as soon as the port listens. Relays report that they take requests a little later.
            wait_for("a relay that takes requests", lambda: answer(admin, rendered, "readinessProbe") == 200)
            change = {"url": f"{admin}/api/v1/calibration", "json": {"mode": "off"}, "timeout": 60}
            assert httpx.post(**change).status_code == 401
            token = {"Authorization": f"Bearer {rendered.secrets['admin-token']}"}
            assert httpx.post(**change, headers=token).status_code == 200
            process.send_signal(signal.SIGTERM)
            sleep = rendered.hemostat["lifecycle"]["preStop"]["sleep"]["seconds"]
            assert process.wait(rendered.pod["spec"]["terminationGracePeriodSeconds"] - sleep) == 0
