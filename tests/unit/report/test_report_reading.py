"""Bytes read ÷ ideal per epoch and rank, on the page and in the terminal; runs without the file keep their tables."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from meshwright.errors import DataError
from meshwright.report.console import summary
from meshwright.report.page import write_report
from meshwright.report.run import load_run, whole_epochs


def printed(run: Path) -> str:
    console = Console(file=io.StringIO(), width=200)
    summary(run, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def row(epoch: int, rank: int, read: int, ideal: int, shared: int) -> dict[str, int]:
    return {"epoch": epoch, "rank": rank, "read_bytes": read, "ideal_read_bytes": ideal, "shared_bytes": shared}


def test_every_epoch_that_read_has_its_rows_and_a_sum(make_run: Any) -> None:
    run = make_run()
    assert "shared copy" not in printed(run)
    rows = [row(1, 0, 3 << 20, 2 << 20, 0), row(1, 1, 1 << 20, 2 << 20, 2 << 20), row(3, 1, 512, 512, 0)]
    (run / "reading.json").write_text(json.dumps(rows))
    assert [(total.epoch, total.read_bytes, total.shared_bytes) for total in whole_epochs(load_run(run).reading)] == [
        (1, 4 << 20, 2 << 20),
        (3, 512, 0),
    ]
    text, page = printed(run), write_report(run).read_text(encoding="utf-8")
    assert "shared copy" in text
    assert "Training data read in each epoch" in page
    for words in ("1.50 ×", "0.50 ×", "1.00 ×", "all"):
        assert words in text
        assert words in page


def test_a_damaged_file_is_named(make_run: Any) -> None:
    run = make_run()
    (run / "reading.json").write_text(json.dumps([{"epoch": 1}]))
    with pytest.raises(DataError, match=r"reading.json: entry 0: missing 'rank'"):
        load_run(run)
