"""Write a checkpoint so that at every instant, also under `kill -9` or a full disk, the previous one is whole.

Everything goes to `step_….tmp-…`, each file is fsynced, then the directory is renamed: POSIX makes that rename atomic,
so a directory with the final name is complete.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from meshwright.checkpoint import format as layout
from meshwright.checkpoint.format import Checkpoint
from meshwright.errors import CheckpointError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write(directory: str | Path, checkpoint: Checkpoint, keep: int = 2) -> Path:
    """Write `checkpoint` under `directory` and return its path; of the complete ones the newest `keep` stay.

    To be called by one process. Raises `CheckpointError` if the step is there already or the disk refuses (full, no
    permission); then the unfinished directory is removed and all earlier checkpoints stay.
    """
    directory = Path(directory)
    final = directory / layout.name(checkpoint.step)
    if final.exists():
        raise CheckpointError(f"{final} exists already; a checkpoint is never overwritten. Remove it to write it anew.")
    files = {layout.MODEL: checkpoint.model, layout.OPTIMIZER: checkpoint.optimizer}
    temporary = directory / f"{final.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(directory)
        temporary.mkdir()
        manifest: dict[str, Any] = {
            "meshwright_checkpoint": layout.VERSION,
            "step": checkpoint.step,
            "files": {name: _write(temporary / name, _serialise(tensors)) for name, tensors in files.items()},
            "tensors": {name: layout.shapes(tensors) for name, tensors in files.items()},
            "extra": dict(checkpoint.extra),
        }
        manifest["sha256"] = layout.digest(manifest)
        _write(temporary / layout.STATE, json.dumps(manifest, indent=1).encode())
        _sync_directory(temporary)
        os.rename(temporary, final)
        _sync_directory(directory)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(_explain(error, directory, checkpoint)) from error
    for old in layout.complete(directory)[:-keep]:
        _remove(old)
    return final


def _serialise(tensors: Any) -> bytes:
    """The safetensors bytes. Parameters that share memory (tied weights) are stored once under each name."""
    return safetensors.torch.save(
        {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    )


def _write(path: Path, data: bytes) -> str:
    """Write, flush to the disk, and return the SHA-256 of what was meant to be written."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(data).hexdigest()


def _sync_directory(path: Path) -> None:
    """A rename or a new file survives a power cut only once its directory is on the disk too."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    """Rename first: a directory that is half deleted must not carry the name of a complete checkpoint."""
    doomed = path.with_name(f"{path.name}.tmp-removed-{secrets.token_hex(4)}")
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def _remove_unfinished(directory: Path) -> None:
    for path in directory.glob("step_*.tmp-*"):
        shutil.rmtree(path, ignore_errors=True)


def _explain(error: OSError, directory: Path, checkpoint: Checkpoint) -> str:
    needed = sum(_size(tensor) for part in (checkpoint.model, checkpoint.optimizer) for tensor in part.values())
    previous = layout.complete(directory)
    stays = f"The previous one, {previous[-1].name}, stays" if previous else "There is no earlier one"
    problem = f"{type(error).__name__}: {error}"
    fix = "make the directory writable"
    if error.errno in _NO_SPACE:
        where = next(path for path in (directory, *directory.parents) if path.exists())
        problem = f"no space left: {needed:,} bytes are needed, {shutil.disk_usage(where).free:,} are free"
        fix = "free some space"
    what = f"cannot write checkpoint {layout.name(checkpoint.step)} to {directory}"
    return f"{what}: {problem}. {stays}; {fix}, then --resume."


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
