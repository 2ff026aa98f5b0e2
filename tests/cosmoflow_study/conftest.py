"""Universes that all tests of the study share."""

from __future__ import annotations

from pathlib import Path

import pytest
import worlds


@pytest.fixture(scope="session")
def universes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return worlds.make(tmp_path_factory.mktemp("universes"))
