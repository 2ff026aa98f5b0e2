"""The page in a real browser: it draws everything it holds, at any width, in both modes, and makes no noise."""

from __future__ import annotations

import json
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


def test_the_pointer_reads_the_values_of_its_step(chromium, make_run, tmp_path):
    run = make_run()
    page = write_report(run)
    probe = """<script>addEventListener("load", () => {
      const chart = document.querySelector("svg[data-hover]"), box = chart.getBoundingClientRect();
      const [left, right] = JSON.parse(chart.dataset.hover).frame.map((at) => at / chart.viewBox.baseVal.width);
      const middle = box.left + box.width * (left + (right - left) * 19 / 59);
      chart.dispatchEvent(new PointerEvent("pointermove", { clientX: middle, clientY: box.top + 40 }));
    });</script>"""
    text = re.sub(r"<meta http-equiv[^>]*>", "", page.read_text()).replace("</body>", f"{probe}</body>")
    page.write_text(text)  # without its policy, which would refuse the probe
    dom = browse(chromium, page, tmp_path / "profile", "--dump-dom").stdout
    tip = re.search(r'<div class="tip"[^>]*>(<b>.*?)</div>', dom)
    assert tip
    assert re.sub("<[^>]+>", " ", tip.group(1)).split() == ["step", "20", *tip_values(run)]


def tip_values(run: Path) -> list[str]:
    step, check = (
        json.loads((run / name).read_text().splitlines()[at])
        for name, at in (("steps.jsonl", 19), ("validation.jsonl", 0))
    )
    return ["training", "loss", f"{step['loss']:.4g}", "held-out", "loss", f"{check['loss']:.4g}"]


def test_a_page_that_names_a_script_of_another_is_not_obeyed(chromium, make_run, tmp_path):
    page = write_report(make_run())
    page.write_text(page.read_text().replace("</body>", "<script>document.title = 'hacked'</script></body>"))
    done = browse(chromium, page, tmp_path / "profile", "--dump-dom")
    assert "<title>hacked" not in done.stdout
    assert "Content Security Policy" in done.stderr  # and so the check for CONSOLE above can fail
