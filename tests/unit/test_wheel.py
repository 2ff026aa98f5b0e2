"""The built wheel works in an environment that holds Meshwright from the wheel alone."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    (found,) = out.glob("meshwright-*.whl")
    return found


@pytest.fixture(scope="module")
def clean_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that sees the dependencies of this environment, but of Meshwright only the wheel."""
    home = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    install = ("-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet")
    run(sys.executable, *install, "--disable-pip-version-check", wheel, cwd=home)
    # A plain path entry adds the folder without running its .pth files, so the editable install stays unseen.
    site_packages = next((home / "lib").glob("python*/site-packages"))
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return python


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {name for name in names if name.startswith("meshwright/")}
    source = ROOT / "src"
    shipped = (
        path for path in (source / "meshwright").rglob("*") if path.is_file() and "__pycache__" not in path.parts
    )
    assert package == {str(path.relative_to(source)) for path in shipped}
    assert "meshwright/py.typed" in package
    others = {name.split("/")[0] for name in names - package}
    assert len(others) == 1
    assert others.pop().endswith(".dist-info")
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_runs_in_a_clean_environment(clean_python: Path, tmp_path: Path) -> None:
    code = (
        "import meshwright as mw, torch\n"
        "model = mw.parallelize(torch.nn.Conv3d(1, 1, 3, padding=1), mw.Plan.uniform())\n"
        "print(model(torch.ones(1, 1, 4, 4, 4)).shape[-1], mw.__file__)\n"
    )
    width, where = run(clean_python, "-I", "-c", code, cwd=tmp_path).split()
    assert width == "4"
    assert Path(where).is_relative_to(clean_python.parents[1])


def test_command_of_the_wheel(clean_python: Path, tmp_path: Path) -> None:
    import meshwright as mw

    assert mw.__version__ in run(clean_python.parent / "meshwright", "--version", cwd=tmp_path)
    assert "train" in run(clean_python.parent / "meshwright", "--help", cwd=tmp_path)
