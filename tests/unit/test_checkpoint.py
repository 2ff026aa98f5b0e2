"""A checkpoint is whole or absent, is verified to the bit, and says whose it is."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from meshwright.checkpoint import read, write
from meshwright.checkpoint.format import MODEL, OPTIMIZER, STATE, Checkpoint, complete
from meshwright.errors import CheckpointError


def sample(step: int = 1, size: int = 3) -> Checkpoint:
    model = {"conv.weight": torch.arange(size).float() + step, "norm.seen": torch.tensor(step)}
    moments = {"state.conv.weight.exp_avg": torch.randn(size, generator=torch.Generator().manual_seed(step))}
    return Checkpoint(step, model, moments, {"seed": 7})


def assert_equal(left: Checkpoint, right: Checkpoint) -> None:
    assert (left.step, left.extra) == (right.step, right.extra)
    for mine, other in ((left.model, right.model), (left.optimizer, right.optimizer)):
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[name], other[name]) and mine[name].dtype == other[name].dtype for name in mine)


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    first = sample()
    path = write.write(tmp_path / "deep" / "checkpoints", first)
    assert path.name == "step_00000001"
    assert sorted(entry.name for entry in path.iterdir()) == sorted([MODEL, OPTIMIZER, STATE])
    assert_equal(read.read(path), first)
    # any safetensors program reads it, under the module's own names
    assert safetensors.torch.load_file(path / MODEL).keys() == first.model.keys()


def test_tied_and_strided_tensors_keep_their_values(tmp_path: Path) -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    tied = Checkpoint(1, {"a": weight, "b": weight, "t": weight.T, "half": weight.bfloat16()}, {}, {})
    assert_equal(read.read(write.write(tmp_path, tied)), tied)


def test_the_newest_complete_one_is_found_and_old_ones_go(tmp_path: Path) -> None:
    assert read.newest(tmp_path / "none") is None
    for step in (1, 2, 30):
        write.write(tmp_path, sample(step), keep=2)
    (tmp_path / "step_00000099.tmp-1-abc").mkdir()
    assert [path.name for path in complete(tmp_path)] == ["step_00000002", "step_00000030"]
    assert read.newest(tmp_path) == tmp_path / "step_00000030"


def test_a_step_is_not_written_twice(tmp_path: Path) -> None:
    write.write(tmp_path, sample())
    with pytest.raises(CheckpointError, match="exists already"):
        write.write(tmp_path, sample())


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, STATE])
def test_one_flipped_bit_is_an_error_that_names_the_file(tmp_path: Path, name: str) -> None:
    path = write.write(tmp_path, sample(size=50)) / name
    data = bytearray(path.read_bytes())
    for position in (0, len(data) // 2, len(data) - 3):
        damaged = data.copy()
        damaged[position] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=name):
            read.read(path.parent)
    path.write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=name):
        read.read(path.parent)
    path.unlink()
    with pytest.raises(CheckpointError, match=name):
        read.read(path.parent)


def test_a_digest_of_another_step_is_refused(tmp_path: Path) -> None:
    path = write.write(tmp_path, sample()) / STATE
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"step": 2}))
    with pytest.raises(CheckpointError, match="SHA-256"):
        read.read(path.parent)


def test_a_checkpoint_of_another_model_names_what_differs() -> None:
    saved = {"a": torch.zeros(2), "b": torch.zeros(3), "d": torch.zeros(1)}
    wanted = {"a": torch.zeros(2), "b": torch.zeros(4), "c": torch.zeros(1), "d": torch.zeros(1).double()}
    with pytest.raises(CheckpointError) as caught:
        read.assert_fits(saved | {"x": torch.zeros(1)}, wanted, "here")
    text = str(caught.value)
    assert "1 missing in the checkpoint: c" in text
    assert "1 not in this model: x" in text
    assert "b (saved float32 (3,), this model float32 (4,))" in text
    assert "d (saved float32 (1,), this model float64 (1,))" in text
    read.assert_fits(saved, saved, "here")


def test_a_full_disk_keeps_the_previous_and_leaves_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = sample()
    write.write(tmp_path, first)
    calls = []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 2:  # the second file does not fit any more
            raise OSError(errno.ENOSPC, "No space left on device")

    real = os.fsync
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="no space left: 32 bytes") as caught:
        write.write(tmp_path, sample(2))
    monkeypatch.setattr(os, "fsync", real)
    assert "step_00000001, stays" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert_equal(read.read(tmp_path / "step_00000001"), first)
    write.write(tmp_path, sample(2))


def test_a_real_limit_on_file_size_keeps_the_previous(tmp_path: Path) -> None:
    write.write(tmp_path, sample())
    run = (
        "import resource, signal, sys, torch\n"
        "from meshwright.checkpoint import write\n"
        "from meshwright.checkpoint.format import Checkpoint\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "write.write(sys.argv[1], Checkpoint(2, {'w': torch.zeros(5000)}, {}, {}))\n"
    )
    done = subprocess.run([sys.executable, "-c", run, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "CheckpointError: cannot write checkpoint step_00000002" in done.stderr
    assert "20,000 bytes are needed" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


KILLED_AT_EACH_FSYNC = """
import os, signal, sys, torch
from meshwright.checkpoint import write
from meshwright.checkpoint.format import Checkpoint

for call in range(1, 6):
    child = os.fork()
    if child == 0:
        seen = []
        def die(handle):
            seen.append(handle)
            if len(seen) == call:
                os.kill(os.getpid(), signal.SIGKILL)
        os.fsync = die
        write.write(f"{sys.argv[1]}/{call}", Checkpoint(2, {"w": torch.ones(3)}, {}, {}))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
"""


def test_a_kill_at_any_instant_leaves_the_previous_or_the_new_one(tmp_path: Path) -> None:
    """The fsyncs: model, optimizer, state, directory; then the rename; then the parent. `kill -9` just before each."""
    first, second = (Checkpoint(step, {"w": torch.full((3,), step - 1.0)}, {}, {}) for step in (1, 2))
    for call in range(1, 6):
        write.write(tmp_path / str(call), first)
    command = [sys.executable, "-c", KILLED_AT_EACH_FSYNC, str(tmp_path)]
    subprocess.run(command, check=True, timeout=120)
    for call in range(1, 6):
        directory = tmp_path / str(call)
        newest = read.newest(directory)
        assert newest is not None
        assert_equal(read.read(newest), second if call == 5 else first)
        assert len(list(directory.glob("*.tmp-*"))) == (call != 5)
        write.write(directory, sample(3))
        assert not list(directory.glob("*.tmp-*"))
