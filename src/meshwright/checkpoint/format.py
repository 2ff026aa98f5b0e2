"""The names and the manifest of a checkpoint directory, shared by the writer and the reader.

RUN/checkpoints/step_00000150/
    model.safetensors      the module's own parameter and buffer names, full tensors
    optimizer.safetensors  state.<parameter name>.<key>
    state.json             step, settings, SHA-256 of the other files and of itself; written last
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

VERSION = 1
MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
_COMPLETE = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory: full tensors on the CPU, and `extra`, which is plain JSON data of the caller."""

    step: int
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    extra: Mapping[str, Any]


def name(step: int) -> str:
    """The directory name of the checkpoint after `step` steps."""
    return f"step_{step:08d}"


def complete(directory: Path) -> list[Path]:
    """The complete checkpoints under `directory`, oldest first. An unfinished one has another name."""
    if not directory.is_dir():
        return []
    found = [(int(match[1]), path) for path in directory.iterdir() if (match := _COMPLETE.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest without its own `sha256` entry."""
    body = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    """Name → [dtype, dims] of each tensor."""
    return {key: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for key, tensor in tensors.items()}
