"""The command: help that teaches, one clear message for each mistake, before any rank starts, and its exit code."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import meshwright
from meshwright import config
from meshwright.cli import main
from meshwright.cluster import launch
from training_jobs import write_pairs


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    """Arguments of a job on small volumes."""
    folder = tmp_path / "data"
    folder.mkdir()
    return ["train", *(word for setting in write_pairs(folder) for word in ("--set", setting))]


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """These mistakes must be found before a rank starts."""

    def refuse(*args: object) -> None:
        pytest.fail("a rank was started")

    monkeypatch.setattr(launch._Family, "start", refuse)
    monkeypatch.chdir(tmp_path)


def message(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """What is printed for a mistake: one line on stderr, exit code 1."""
    assert main(arguments) == 1
    text = capsys.readouterr().err
    assert text.startswith("meshwright: error: ")
    assert text.count("\n") == 1
    assert "Traceback" not in text
    return text


def test_help_and_version_teach(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["--help"], ["examples:", "meshwright train --resume", "doctor"]),
        (["train", "--help"], ["--print-config", "torchrun", "plan.height=2"]),
        (["--version"], [f"meshwright {meshwright.__version__}"]),
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 0
        text = capsys.readouterr().out
        assert all(word in text for word in words)


@pytest.mark.parametrize("arguments", [[], ["trian"], ["train", "--ranks", "two"], ["train", "--run", "a", "--resume"]])
def test_wrong_usage_is_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: meshwright" in capsys.readouterr().err


def test_the_printed_configuration_is_complete_and_can_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--print-config", "--ranks", "4", "--steps", "7", "--set", "optim.lr=0.5"]) == 0
    text = capsys.readouterr().out
    Path("job.yaml").write_text(text, encoding="utf-8")
    job = config.load("job.yaml")
    assert (job.ranks, job.train.steps, job.optim.lr) == (4, 7, 0.5)
    assert set(yaml.safe_load(text)) == set(vars(config.Config()))
    assert main(["train", "--print-config", "--config", "job.yaml"]) == 0
    assert capsys.readouterr().out == text


def test_each_mistake_is_one_message(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for more, words in (
        (["--set", "train.stepz=3"], "unknown key train.stepz; did you mean train.steps?"),
        (["--config", "none.yaml"], "none.yaml: cannot read the configuration"),
        (["--ranks", "3", "--set", "plan.depth=2"], "the plan depth=2 needs 2 ranks, but 3 were asked for"),
        (["--ranks", "0"], "ranks = 0: at least 1"),
        (["--set", "plan.data=2", "--set", "train.batch=1"], "train.batch = 1 leaves ranks without a sample"),
        (["--set", "data.images=none*.nii"], "data.images: no file matches"),
        (["--set", "data.images=null"], "data.name = folder needs data.images"),
        (["--set", "data.intensity=[1]"], "two numbers are needed"),
        (["--resume"], "--resume: there is no run in runs/"),
        (["--resume", "nowhere"], "--resume nowhere: no run there"),
    ):
        assert words in message(capsys, [*small, *more])
    # files that do not belong together, and a file that was cut off
    assert "needs one label" in message(capsys, [*small, "--set", "data.labels='data/label0*'"])
    path = Path("data/image0.nii.gz")
    path.write_bytes(path.read_bytes()[:-20])
    assert "image0.nii.gz" in message(capsys, small)
    assert not Path("runs").exists()
    assert "not a run directory" in message(capsys, ["report", "nowhere"])


def test_a_run_is_never_written_over(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("old").mkdir()
    Path("old/config.yaml").write_text("seed: 1", encoding="utf-8")
    assert "old already holds a run; continue it with --resume old" in message(capsys, [*small, "--run", "old"])
    Path("file").touch()
    assert "cannot make the run directory file/run" in message(capsys, [*small, "--run", "file/run"])
