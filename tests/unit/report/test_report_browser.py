"""The page in a real browser: it draws everything it holds, at any width, in both modes, and makes no noise."""

from __future__ import annotations

import re
import shutil
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest

from meshwright.plan.plan import Plan
from meshwright.report.page import write_report

_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--enable-logging=stderr",
]


@pytest.fixture(scope="module")
def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        pytest.skip("chromium is not installed: apt-get install chromium")
    return found


def browse(chromium: str, page: Path, profile: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [chromium, *_FLAGS, f"--user-data-dir={profile}", *flags, page.resolve().as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done


def attributes(dom: str) -> dict[str, int]:
    opening = re.search(r"<html[^>]*>", dom)
    assert opening
    return {name: int(value) for name, value in re.findall(r'data-(\w+)="(\d+)"', opening.group())}


def colours(png: Path) -> int:
    """How many different rows of pixels a screenshot has: 1 for a blank one."""
    raw, at, body = png.read_bytes(), 8, b""
    while at < len(raw):
        size, kind = int.from_bytes(raw[at : at + 4]), raw[at + 4 : at + 8]
        body += raw[at + 8 : at + 8 + size] if kind == b"IDAT" else b""
        at += 12 + size
    height = int.from_bytes(raw[20:24])
    rows = np.frombuffer(zlib.decompress(body), np.uint8).reshape(height, -1)
    return len(np.unique(rows, axis=0))


@pytest.mark.parametrize("plan", [Plan.uniform(depth=2), Plan.uniform(data=2, height=2, width=2)], ids=str)
def test_everything_is_drawn_and_nothing_complains(chromium, make_run, tmp_path, plan):
    page = write_report(make_run(plan))
    text = page.read_text()
    done = browse(chromium, page, tmp_path / "profile", "--dump-dom", "--window-size=1280,1000")
    drawn = attributes(done.stdout)
    assert drawn == {
        "svg": text.count("<svg"),
        "img": 12,  # three directions, four pictures each
        "empty": 0,
        "wider": 0,
        "errors": 0,
    }
    assert text.count("<svg") >= 8
    assert "CONSOLE" not in done.stderr, done.stderr
    assert "<title>Held-out Dice: grey 0.938, white 0.945 · Meshwright</title>" in done.stdout  # not "hacked"


def test_a_run_that_was_killed_still_draws(chromium, make_run, tmp_path):
    page = write_report(make_run(finished=False))
    done = browse(chromium, page, tmp_path / "profile", "--dump-dom")
    assert attributes(done.stdout) == {
        "svg": page.read_text().count("<svg"),
        "img": 0,
        "empty": 0,
        "wider": 0,
        "errors": 0,
    }
    assert "still going, or it was killed" in done.stdout


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_the_screenshot_is_a_picture(chromium, make_run, tmp_path, scheme):
    page, shot = write_report(make_run()), tmp_path / "shot.png"
    mode = f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"
    browse(chromium, page, tmp_path / "profile", f"--screenshot={shot}", "--window-size=1280,2400", mode)
    assert colours(shot) > 500
