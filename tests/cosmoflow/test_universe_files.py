"""Folders of universes: what is in a file, who may write it, what a kill leaves behind."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import cosmoflow_jobs
import h5py
import numpy as np
import pytest

import generate
import meshwright as mw
import universes
from meshwright.data.formats import open_array
from meshwright.errors import ConfigError, DataError
from universes import Ranges, Settings

SMALL = Settings(seed=5, count=4, voxels=20, box_mpc=80.0, assignment="cic", redshifts=(0.0, 1.0))


def images(settings: Settings, folder: Path) -> list[np.ndarray]:
    found = []
    for index in range(settings.count):
        array = open_array(settings.image(folder, index))
        found.append(array.read(tuple(slice(0, size) for size in array.shape))[0])
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("universes")
    generate.generate(SMALL, out)
    return out


def test_what_a_file_holds(folder: Path) -> None:
    assert universes.load(folder) == SMALL
    with h5py.File(SMALL.path(folder, 3), "r") as file:
        assert file["image"].dtype == np.int16
        assert file["image"].shape == SMALL.shape == (2, 20, 20, 20)
        assert file["image"].chunks == (1, 16, 16, 16)
        assert np.array_equal(file["parameters"][:], SMALL.parameters(3).array())
        assert file.attrs["seed"] == 5
        assert list(file.attrs["redshifts"]) == [0.0, 1.0]
        now, early = file["image"][:] / file["image"].attrs["unit"]
    assert now.mean() == pytest.approx(1, abs=1e-3)
    assert early.std() < 0.8 * now.std()  # structure grows
    correlation = np.corrcoef(now.reshape(-1), early.reshape(-1))[0, 1]
    assert correlation > 0.6  # of the same universe
    assert sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")) == [
        *(f"universe_{index:05d}.h5" for index in range(4)),
        "universes.yaml",
    ]


@pytest.mark.parametrize("kind", ["hdf5", "zarr"])
def test_a_rank_reads_its_part_and_nothing_else(kind: str, tmp_path: Path) -> None:
    settings = Settings(count=1, format=kind)
    generate.generate(settings, tmp_path)
    array = open_array(settings.image(tmp_path, 0))
    for plan in (mw.Plan.uniform(depth=4), mw.Plan.uniform(depth=2, height=2, width=2), mw.Plan.uniform(width=4)):
        for rank in range(plan.ranks):
            box = (slice(0, 1), *mw.interval((1, *settings.shape), plan, rank)[2:])
            part, read_bytes = array.read(box)
            assert read_bytes == part.nbytes


def test_zarr_holds_the_same(folder: Path, tmp_path: Path) -> None:
    zarr = replace(SMALL, format="zarr", count=2)
    generate.generate(zarr, tmp_path)
    for wanted, found in zip(images(replace(SMALL, count=2), folder), images(zarr, tmp_path), strict=True):
        assert np.array_equal(wanted, found)
    parameters, _ = open_array(f"{zarr.path(tmp_path, 1)}::parameters", dims=1).read((slice(0, 4),))
    assert np.array_equal(parameters, zarr.parameters(1).array())


def test_universes_and_seeds_differ_in_their_noise(tmp_path: Path) -> None:
    same = Ranges((0.3, 0.3), (0.8, 0.8), (0.95, 0.95), (0.7, 0.7))
    found = []
    for seed in (5, 6):
        settings = replace(SMALL, ranges=same, seed=seed, count=2)
        generate.generate(settings, tmp_path / str(seed))
        found += [image[0] - image[0].mean() for image in images(settings, tmp_path / str(seed))]
    likeness = np.corrcoef([image.reshape(-1) for image in found])
    assert np.abs(likeness - np.eye(4)).max() < 0.3  # of few independent modes; of equal noise it is 1


def test_workers_make_the_same_files(folder: Path, tmp_path: Path) -> None:
    generate.generate(SMALL, tmp_path, workers=2)
    for wanted, found in zip(images(SMALL, folder), images(SMALL, tmp_path), strict=True):
        assert np.array_equal(wanted, found)


@pytest.mark.parametrize("kind", ["hdf5", "zarr"])
def test_a_call_after_a_kill_makes_what_is_missing(kind: str, folder: Path, tmp_path: Path) -> None:
    settings = replace(SMALL, format=kind)
    process = multiprocessing.get_context("forkserver").Process(
        target=cosmoflow_jobs.killed_at, args=(2, settings, tmp_path)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    partial = settings.path(tmp_path, 2).with_name(f".{settings.path(tmp_path, 2).name}.partial")
    assert partial.exists()
    assert generate.missing_universes(settings, tmp_path) == [2, 3]
    before = [settings.path(tmp_path, index).stat().st_mtime_ns for index in range(2)]
    generate.generate(settings, tmp_path)
    assert not partial.exists()
    assert before == [settings.path(tmp_path, index).stat().st_mtime_ns for index in range(2)]
    for wanted, found in zip(images(SMALL, folder), images(settings, tmp_path), strict=True):
        assert np.array_equal(wanted, found)


def test_a_killed_worker_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "make", cosmoflow_jobs.dies)
    with pytest.raises(DataError, match="a worker was killed"):
        generate.generate(SMALL, tmp_path, workers=2)


def test_a_folder_grows_and_takes_no_others(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "copy"
    shutil.copytree(folder, out)
    generate.generate(replace(SMALL, count=5), out)
    assert universes.load(out).count == 5
    assert len(images(replace(SMALL, count=5), out)) == 5
    generate.generate(replace(SMALL, count=2), out)  # fewer: they are all there
    assert universes.load(out).count == 5
    for other in (replace(SMALL, seed=6), replace(SMALL, lpt=2), replace(SMALL, ranges=Ranges(n_s=(0.9, 0.95)))):
        with pytest.raises(DataError, match="holds other universes"):
            generate.generate(other, out)


def test_two_calls_do_not_write_one_folder(folder: Path) -> None:
    with open(folder / ".lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another call"):
            generate.generate(SMALL, folder)


def test_settings_are_read_strictly(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folder of universes"):
        universes.load(tmp_path)
    (tmp_path / universes.SETTINGS).write_text("voxel: 32\n")
    with pytest.raises(ConfigError, match="did you mean voxels"):
        universes.load(tmp_path)
    for wrong in ({"voxels": 31}, {"count": 0}, {"redshifts": ()}, {"box_mpc": -1.0}, {"version": 2}):
        with pytest.raises(DataError):
            Settings(**wrong)
    with pytest.raises(DataError, match="sigma_8"):
        Settings(ranges=Ranges(sigma_8=(0.9, 0.8)))


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    command = "--count 4 --voxels 20 --box 80 --seed 5 --assign cic --redshifts 0,1"
    assert generate.main(["--out", str(tmp_path / "new"), *command.split()]) == 0
    assert "4 universes of 20³ voxels" in capsys.readouterr().out
    for wanted, found in zip(images(SMALL, folder), images(SMALL, tmp_path / "new"), strict=True):
        assert np.array_equal(wanted, found)
    for wrong, text in (
        ("--redshifts now", "--redshifts 'now'"),
        ("--workers 0", "--workers"),
        ("--ranks 0", "--ranks"),
        ("--n-s 1", "n_s"),
    ):
        assert generate.main(["--out", str(tmp_path / "wrong"), *wrong.split()]) == 1
        assert text in capsys.readouterr().err
    assert not os.path.exists(tmp_path / "wrong")
    with pytest.raises(SystemExit):
        generate.main(["--help"])
    assert "call after a kill" in capsys.readouterr().out


def test_the_commands_of_the_page_are_understood() -> None:
    page = (Path(__file__).parents[2] / "docs" / "universes.md").read_text(encoding="utf-8")
    commands = [line.split()[2:] for line in page.splitlines() if line.startswith("python examples/cosmoflow/generate")]
    assert len(commands) >= 2
    for command in commands:
        settings = generate.settings_of(generate._parser().parse_args(command))
        assert settings.voxels in (64, 128)
