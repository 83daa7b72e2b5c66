"""Chromium, the page in it, and the screenshot of the README.

``python tests/test_app/browser.py DEMO_DIR OUT.png`` writes the screenshot with the weights of a demo.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
NAMES = ("chromium", "chromium-browser", "google-chrome")
MISSING = "no Chromium on this machine: apt-get install chromium (Debian), then run the test again"
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 400, "height": 900}
#: What a machine that trains beside it may take, in milliseconds.
PATIENCE = 120_000


def chromium() -> str:
    """Return the browser; without one, skip the test, or fail it where CI should have one."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(MISSING)
    return str(found)


@contextlib.contextmanager
def served(demo_dir: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    """Serve the page and yield its address and the file of addresses elsewhere that the server wanted to reach."""
    record, log = folder / "reached.txt", folder / "server.log"
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("server.py")), str(record)]
    command += ["--demo-dir", str(demo_dir), "--port", "0", "--device", "cpu"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    with log.open("w") as sink:
        process = subprocess.Popen(command, cwd=ROOT, stdout=sink, stderr=subprocess.STDOUT, env=env)
    try:
        yield _address(process, log), record
    finally:
        process.terminate()
        process.wait(60)
    assert not list(folder.glob("mmvmamba-app-*")), "uploads outlive the page"


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    end = time.monotonic() + PATIENCE / 1000
    while time.monotonic() < end and process.poll() is None:
        for line in log.read_text().splitlines():
            if line.startswith("The page is at "):
                return line.split()[-1]
        time.sleep(0.2)
    raise AssertionError(f"the page does not start; its log:\n{log.read_text()}")


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """Start Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # --no-sandbox: containers run as root, and the page is our own
        started = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield started
        started.close()


def opened(browser: Any, address: str, size: dict[str, int]) -> Any:
    """Return the page in a window of a size, once it can be used."""
    page = browser.new_page(viewport=size)
    page.set_default_timeout(PATIENCE)
    page.goto(address)
    page.get_by_role("button", name="Run").wait_for()
    return page


def choose(page: Any, sample: str, task: str | None = None) -> None:
    """Choose a task and a sample, and wait until both have arrived."""
    if task is not None:
        before = page.get_by_role("combobox", name="Model").input_value()
        page.get_by_role("radio", name=task).check()
        page.wait_for_function(
            "before => document.querySelector('#model input').value !== before", arg=before, timeout=PATIENCE
        )
    page.get_by_role("button", name=sample).click()
    page.locator("#picture img").wait_for()


def run(page: Any) -> None:
    """Press Run and wait for the answer and its scan maps."""
    page.get_by_role("button", name="Run").click()
    page.locator("#message").get_by_text("Answered in").wait_for()
    page.locator("#scans img").first.wait_for()


def screenshot(page: Any, path: Path) -> Path:
    """Write what the window shows, from the top of the page."""
    page.evaluate("window.scrollTo(0, 0)")
    page.wait_for_timeout(500)  # pictures that have just come are faded in
    page.screenshot(path=str(path), animations="disabled")
    return path


def main(demo_dir: str, out: str) -> None:
    """Write the screenshot of the README."""
    from PIL import Image

    with (
        tempfile.TemporaryDirectory() as folder,
        served(Path(demo_dir), Path(folder)) as (address, _),
        browser() as started,
    ):
        page = opened(started, address, WIDE)
        choose(page, "digits 2")
        run(page)
        page.get_by_role("button", name="Run").click()  # again, without the time of warming up
        page.wait_for_function("() => !document.querySelector('#message').innerText.includes('loading')")
        page.wait_for_timeout(5000)  # for the scan maps
        whole = Image.open(screenshot(page, Path(out))).convert("RGB")
    # 32 steps of each colour: the grain of the pictures packs better, plain areas stay plain
    whole.point(lambda value: round(value / 255 * 31) * 255 // 31).save(out, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
