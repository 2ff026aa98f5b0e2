"""The report as one HTML page that needs nothing else: no network, no library, no file beside it."""

from __future__ import annotations

import base64
import hashlib
import os
import tempfile
from collections.abc import Iterator
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from meshwright.errors import DataError
from meshwright.report.cost import layers, memory, time_per_step, traffic
from meshwright.report.headline import headline, title
from meshwright.report.meshbox import mesh_box
from meshwright.report.run import Run, load_run
from meshwright.report.sections import held_out, learning, section
from meshwright.report.tables import Cell, Column, facts, folded
from meshwright.report.units import bytes_text

_PARTS = (
    ("slices", "Held-out part"),
    ("learning", "Learning"),
    ("time", "Time"),
    ("bytes", "Bytes"),
    ("memory", "Memory and reading"),
    ("layers", "Layers"),
    ("plan", "Plan"),
    ("machine", "Machine"),
    ("config", "Configuration"),
)


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` into the run directory and return its path. The same run gives the same bytes.

    Raises `DataError` for a run directory that is missing, incomplete or damaged, or that cannot be written to.
    """
    target = Path(run_dir) / "report.html"
    text = page(load_run(run_dir))
    try:
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=run_dir, prefix=".report-", delete=False) as file:
            file.write(text)
        os.chmod(file.name, 0o644)
        os.replace(file.name, target)  # whoever has the page open never sees half of it
    except OSError as error:
        raise DataError(f"{target}: cannot write the report: {error}") from None
    return target


def page(run: Run) -> str:
    """The whole page. Its policy forbids every request and every script but its own."""
    style, script = _asset("style.css"), _asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    links = "".join(f'<a href="#{name}">{text}</a>' for name, text in _PARTS)
    body = (held_out, learning, time_per_step, traffic, memory, layers, _plan, _machine, _config)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title(run))} · Meshwright</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<style>{style}</style></head><body>{headline(run)}<nav aria-label="Parts of this page">{links}</nav></header>'
        f"<main>{''.join(part(run) for part in body)}</main>"
        "<footer>Written by <code>meshwright report</code>. One file; it loads nothing from anywhere.</footer>"
        f"<script>{script}</script></body></html>\n"
    )


def _plan(run: Run) -> str:
    rows: list[list[Cell]] = [
        [str(record.rank), *(f"{lo} – {hi}" for lo, hi in record.interval), f"{_voxels(record.interval):,}"]
        for record in run.ranks
    ]
    columns = [Column("Rank", "text"), Column("D"), Column("H"), Column("W"), Column("Voxels")]
    owned = folded("Which part of the training volume a rank owns", columns, rows) if rows else ""
    return section(
        "plan",
        "Plan",
        f"<p>{escape(str(run.plan))}: {run.plan.ranks} rank{'s' if run.plan.ranks > 1 else ''}.</p>",
        f'<div class="pair"><div>{mesh_box(run.ranks)}</div>',
        f"<div>{owned}<pre>{escape(run.plan_text.strip())}</pre></div></div>",
    )


def _voxels(interval: tuple[tuple[int, int], ...]) -> int:
    (d0, d1), (h0, h1), (w0, w1) = interval
    return (d1 - d0) * (h1 - h0) * (w1 - w0)


def _machine(run: Run) -> str:
    body = (
        facts(list(_flat(run.machine))) if run.machine else '<p class="none">The run has not described its machine.</p>'
    )
    return section("machine", "Machine", body)


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Nested JSON as names and texts; sizes in bytes as people read them."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from _flat(entry, f"{name} · {key}" if name else str(key))
    elif isinstance(value, list) and any(isinstance(entry, (dict, list)) for entry in value):
        for index, entry in enumerate(value):
            yield from _flat(entry, f"{name} {index}")
    elif isinstance(value, list):
        yield _spoken(name), ", ".join(map(str, value)) or "none"
    elif name.endswith("_bytes") and isinstance(value, (int, float)):
        yield _spoken(name.removesuffix("_bytes")), bytes_text(value)
    elif isinstance(value, bool):
        yield _spoken(name), "yes" if value else "no"
    else:
        yield _spoken(name), "unknown" if value is None else str(value)


def _spoken(name: str) -> str:
    return name.replace("_", " ")


def _config(run: Run) -> str:
    text = escape(run.config_text.strip())
    return section("config", "Configuration", f"<details><summary>config.yaml</summary><pre>{text}</pre></details>")


def _asset(name: str) -> str:
    return files("meshwright.report").joinpath(name).read_text(encoding="utf-8")
