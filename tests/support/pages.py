"""Checks of HTML pages and SVG plots that the tests of `hemostat doctor` share."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest


def chromium_markup(page: str, folder: Path, *flags: str) -> str:
    """The markup of `page` after Chromium has loaded it without a message on its console. Skips without Chromium."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here: the page was checked by parsers only")
    file = folder / "page.html"
    file.write_text(page, encoding="utf-8")
    ran = subprocess.run(
        [browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
         *flags, "--enable-logging=stderr", "--dump-dom", file.as_uri()],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in ran.stderr
    return ran.stdout


def assert_marks_inside(plot: ElementTree.Element) -> None:
    """No mark of an SVG plot begins or ends outside of the picture."""
    width, height = map(float, plot.attrib["viewBox"].split()[2:])
    for mark in plot.iter():
        for names, most in ((("x", "x1", "x2", "cx"), width), (("y", "y1", "y2", "cy"), height)):
            for name in names:
                assert -1.0 <= float(mark.attrib.get(name, 0.0)) <= most + 1.0, (mark.tag, name)
