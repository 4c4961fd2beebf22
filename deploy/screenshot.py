"""`make screenshot`: the console over a real run of the demo, as deploy/console.png.

The run is bounded by what has been scored, and by time. Nothing on the picture is made up.
"""

# ruff: noqa: T201 - a command
from __future__ import annotations

import argparse
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
from PIL import Image
from playwright.sync_api import sync_playwright

FOLDER = Path(__file__).resolve().parent
WIDTH = 1280
COLOURS = 64
BYTES_AT_MOST = 200_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scored", type=int, default=700, help="requests after which the picture is taken")
    parser.add_argument("--minutes", type=float, default=30.0, help="the picture is taken then, whatever was scored")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--out", type=Path, default=FOLDER / "console.png")
    options = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        print("screenshot: no chromium here: apt-get install chromium", file=sys.stderr)
        return 2
    # In a quarter of an hour the noise floor, too, should have an interval: more of the requests than usual go to it.
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
    return 0 if size <= BYTES_AT_MOST else 1


def announced(demo: subprocess.Popen[str]) -> str:
    """The console's address, once there is one; what the demo says goes on to our own output, to the end."""
    assert demo.stdout is not None
    for line in demo.stdout:
        print(line, end="", flush=True)
        if found := re.search(r"Console (http://\S+?)/\s", line):
            threading.Thread(target=lambda: print(*demo.stdout or (), sep=""), daemon=True).start()
            return found[1]
    raise SystemExit("screenshot: the demo ended before it had a console")


def status(url: str) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{url}/api/v1/status", timeout=30, trust_env=False).raise_for_status().json()
    return found


def take(chromium: str, url: str, out: Path, *, dark: bool) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium)
        page = browser.new_page(viewport={"width": WIDTH, "height": 900}, color_scheme="dark" if dark else "light")
        page.goto(f"{url}/")
        page.wait_for_selector("#plot-proxy canvas")
        page.wait_for_timeout(12_000)  # rates need some states
        page.screenshot(path=out, full_page=True)
        browser.close()
    # A page has few colours: a fraction of the bytes, and the same picture. Median cut would lose those of thin lines.
    few = Image.open(out).convert("RGB").quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(out, optimize=True)


if __name__ == "__main__":
    sys.exit(main())
