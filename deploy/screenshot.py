"""`make screenshot`: writes docs/console.png, a picture of the console over a real run of the demo.

The run ends after a number of scored requests or after a time limit.
"""

# ruff: noqa: T201 - a command
from __future__ import annotations

import argparse
import contextlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

import httpx
from PIL import Image
from playwright.sync_api import sync_playwright

OUT = Path(__file__).resolve().parents[1] / "docs" / "console.png"
WIDTH = 1280
COLOURS = 64
MAX_BYTES = 400_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scored", type=int, default=700, help="take the picture after this number of scored requests")
    parser.add_argument("--minutes", type=float, default=30.0, help="take the picture after this time at the latest")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        print("screenshot: chromium is not installed: apt-get install chromium", file=sys.stderr)
        return 2
    # A larger part of the requests than usual measures the noise floor, so that it has an interval after 15 minutes.
    more = ["--set", "shadow.floor_fraction=0.2"]
    command = [str(Path(sys.executable).parent / "hemostat"), "demo", "--no-console", *more]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as demo:
        try:
            url = announced(demo)
            ends = time.monotonic() + 60 * options.minutes
            while (scored := status(url)["requests"]["scored"]) < options.scored and time.monotonic() < ends:
                time.sleep(2)
            take(chromium, url, options.out, dark=options.dark)
        finally:
            demo.send_signal(signal.SIGINT)
    size = options.out.stat().st_size
    print(f"{options.out}: {scored} scored requests, {size:,} bytes")
    return 0 if size <= MAX_BYTES else 1


def announced(demo: subprocess.Popen[str]) -> str:
    """Wait for the console's address. All output of the demo is copied to our own output until it ends."""
    assert demo.stdout is not None
    for line in demo.stdout:
        print(line, end="", flush=True)
        if found := re.search(r"Console (http://\S+?)/\s", line):
            threading.Thread(target=copy_output, args=(demo.stdout,), daemon=True).start()
            return found[1]
    raise SystemExit("screenshot: the demo ended before it had a console")


def copy_output(output: IO[str]) -> None:
    """Line by line, so that the picture's run can be followed, until the demo ends or its output is closed here."""
    with contextlib.suppress(ValueError):
        for line in output:
            print(line, end="", flush=True)


def status(url: str) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{url}/api/v1/status", timeout=30, trust_env=False).raise_for_status().json()
    return found


def take(chromium: str, url: str, out: Path, *, dark: bool) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium)
        page = browser.new_page(viewport={"width": WIDTH, "height": 900}, color_scheme="dark" if dark else "light")
        page.goto(f"{url}/")
        page.wait_for_selector("#plot-proxy canvas")
        page.wait_for_timeout(12_000)  # rates are computed from several states
        page.screenshot(path=out, full_page=True)
        browser.close()
    # A page has few colours, so a palette makes the file small. Median cut would lose the colours of thin lines.
    few = Image.open(out).convert("RGB").quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(out, optimize=True)


if __name__ == "__main__":
    sys.exit(main())
