"""`scripts/setup` with an interpreter that only notes what it is asked to do: nothing is installed here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = """#!/usr/bin/env bash
set -eu
log() {{ printf '%s\\n' "$1" >>"{log}"; }}
case "$*" in
  *version_info\\[:2\\]*) echo "{version}" ;;
  *"sys.version_info < "*) [[ "{version}" != 3.9 ]] ;;
  "-m venv "*) log venv; mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  "-m pip --version") ;;
  "-m pip "*)
    [[ ! -e "{folder}/broken" ]] || exit 1
    if [[ "$*" != *--editable* ]]; then log "${{@: -1}}"; exit; fi
    log package
    touch "${{0%/*}}/meshwright"
    chmod +x "${{0%/*}}/meshwright" ;;
  *) exec "{real}" "$@" ;;
esac
"""


@dataclass(frozen=True)
class Project:
    folder: Path
    python: Path

    @property
    def log(self) -> list[str]:
        return (self.folder / "log").read_text(encoding="utf-8").split()

    def start(self) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHON": str(self.python)}
        command = [str(self.folder / "scripts" / "setup")]
        return subprocess.Popen(command, env=environment, cwd="/", stderr=subprocess.PIPE, text=True)

    def setup(self) -> tuple[int, str]:
        process = self.start()
        _, errors = process.communicate(timeout=30)
        return process.returncode, errors


def project(folder: Path, version: str = "3.12") -> Project:
    (folder / "scripts").mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "setup", folder / "scripts" / "setup")
    (folder / "pyproject.toml").write_text("first\n", encoding="utf-8")
    (folder / "log").touch()
    python = folder / "python"
    # The interpreter behind the virtual environment, so that `python -I` finds its own library.
    real = os.path.realpath(sys.executable)
    text = PYTHON.format(log=folder / "log", version=version, folder=folder, real=real)
    python.write_text(text, encoding="utf-8")
    python.chmod(0o755)
    return Project(folder, python)


def test_installs_torch_first_and_a_second_call_does_nothing(tmp_path: Path) -> None:
    place = project(tmp_path / "a project")
    assert place.setup()[0] == 0
    assert place.log == ["venv", "torch==2.13.0", "package"]
    assert place.setup() == (0, "")
    assert place.log == ["venv", "torch==2.13.0", "package"]


def test_a_cut_off_setup_is_made_anew(tmp_path: Path) -> None:
    place = project(tmp_path / "p")
    (place.folder / "broken").touch()
    assert place.setup()[0] != 0
    (place.folder / "broken").unlink()
    code, errors = place.setup()
    assert code == 0
    assert "did not finish" in errors
    assert place.log == ["venv", "venv", "torch==2.13.0", "package"]


def test_a_changed_pyproject_installs_again_into_the_same_environment(tmp_path: Path) -> None:
    place = project(tmp_path / "p")
    place.setup()
    (place.folder / "pyproject.toml").write_text("second\n", encoding="utf-8")
    assert place.setup()[0] == 0
    assert place.log == ["venv", "torch==2.13.0", "package", "torch==2.13.0", "package"]


def test_a_project_that_moved_is_set_up_anew(tmp_path: Path) -> None:
    place = project(tmp_path / "p")
    place.setup()
    moved = Project(place.folder.rename(tmp_path / "q"), tmp_path / "q" / "python")
    (tmp_path / "p").mkdir()  # the stand-in still writes its log there
    code, errors = moved.setup()
    assert code == 0
    assert "was moved" in errors
    assert (tmp_path / "p" / "log").read_text(encoding="utf-8").split() == ["venv", "torch==2.13.0", "package"]


def test_two_at_once_set_up_once(tmp_path: Path) -> None:
    place = project(tmp_path / "p")
    both = [place.start(), place.start()]
    assert [process.communicate(timeout=30) and process.returncode for process in both] == [0, 0]
    assert place.log == ["venv", "torch==2.13.0", "package"]


@pytest.mark.parametrize("missing", [False, True])
def test_an_old_or_missing_python_is_one_clear_error(tmp_path: Path, missing: bool) -> None:
    place = project(tmp_path / "p", version="3.9")
    if missing:
        place.python.unlink()
    code, errors = place.setup()
    assert code == 1
    assert ("no interpreter" if missing else "is 3.9") in errors
    assert "Python 3.11 or newer is needed" in errors
    assert not (place.folder / ".venv").exists()
