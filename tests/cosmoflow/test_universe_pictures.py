"""The script of the page's pictures draws both, at a small size here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

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
