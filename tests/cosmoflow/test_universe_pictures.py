"""The scripts behind the page: pictures, and the memory of a rank; at a small size here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import memory
import pictures


def test_pictures_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("camb")
    for name in ("SLICES", "SPECTRA"):
        monkeypatch.setattr(pictures, name, replace(getattr(pictures, name), voxels=16, particles=1))
    assert pictures.main([str(tmp_path)]) == 0
    for name in ("universe_slices.png", "universe_spectra.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert pictures.main([]) == 2
    assert "docs/images" in capsys.readouterr().err


def test_memory_is_printed_for_each_number_of_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    assert memory.main(["18", "1", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["18³ on 1 rank", "18³ on 2 ranks"]
    assert memory.main(["64"]) == 2
