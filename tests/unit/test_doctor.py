"""`meshwright doctor`: readable, and its exit code says whether local ranks can meet."""

from __future__ import annotations

import importlib
import io
from typing import NoReturn

import pytest
from rich.console import Console

from meshwright.cluster.machine import Missing
from meshwright.errors import RankError
from meshwright.report.doctor import doctor

module = importlib.import_module("meshwright.report.doctor")


def run_doctor() -> tuple[int, str]:
    text = io.StringIO()
    return doctor(Console(file=text, width=200)), text.getvalue()


def test_a_healthy_machine() -> None:
    code, text = run_doctor()
    assert code == 0
    for word in ("processor", "memory", "gloo", "2 local ranks: they met on loopback"):
        assert word in text


def test_ranks_that_cannot_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> NoReturn:
        raise RankError("rank 1 of 2 failed: [no] loopback", rank=1)

    monkeypatch.setattr(module, "launch", fail)
    code, text = run_doctor()
    assert code == 1
    assert "rank 1 of 2 failed: [no] loopback" in text


def test_what_is_missing_is_printed_as_it_must_be_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "missing", lambda: [Missing("nibabel", "volumes", "pip install 'meshwright[nifti]'")])
    monkeypatch.setattr(module, "launch", lambda fn, ranks: [3.0, 3.0])
    assert "pip install 'meshwright[nifti]'" in run_doctor()[1]
