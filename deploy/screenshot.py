"""`make screenshot`: writes a picture of the console's overview in each state of `tests/support/console_states.py` to
build/console/, and docs/console.png, the overview while an alarm is raised.

The pages are the real ones and the answers of the API are made, so that a picture takes a second and needs no model.
"""

# ruff: noqa: T201 - a command
from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import httpx
from PIL import Image
from playwright.sync_api import Browser, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.support.admin_server import everything, served  # noqa: E402
from tests.support.console_states import CHANGES, State, make  # noqa: E402

PICTURE = ROOT / "docs" / "console.png"
SHOWN = "alarm"
COLOURS = 64
MAX_BYTES = 100_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--page", default="", help="address of a page, such as kinds or divergence?by=route")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "console", help="folder")
    options = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        print("screenshot: chromium is not installed: apt-get install chromium", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        served(Path(folder), everything) as one,
        sync_playwright() as playwright,
    ):
        answers = [httpx.get(f"{one.url}/api/v1/{name}", trust_env=False).json() for name in ("status", "profiles")]
        browser = playwright.chromium.launch(executable_path=chromium)
        for name in CHANGES:
            out = options.out / f"{name.replace(' ', '-')}.png"
            take(browser, make(name, *answers), f"{one.url}/#/{options.page}", out, options.width, dark=options.dark)
            print(f"{out}: {out.stat().st_size:,} bytes")
        browser.close()
    if options.page or options.dark or options.width != 1280:
        return 0
    shutil.copyfile(options.out / f"{SHOWN}.png", PICTURE)
    return 0 if PICTURE.stat().st_size <= MAX_BYTES else 1


def take(browser: Browser, state: State, url: str, out: Path, width: int, *, dark: bool) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme="dark" if dark else "light")
    state.answer(page)
    page.goto(url)
    page.wait_for_selector("main section")
    if len(state.history["points"]["time"]) > 1:
        page.wait_for_selector("main canvas, main table")
    page.screenshot(path=out, full_page=True)
    page.close()
    # A page has few colours, so a palette makes the file small. Median cut would lose the colours of thin lines.
    few = Image.open(out).convert("RGB").quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(out, optimize=True)


if __name__ == "__main__":
    sys.exit(main())
