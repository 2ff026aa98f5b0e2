"""Read a checkpoint: nothing is believed before its SHA-256 has been compared, nothing is unpickled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from meshwright.checkpoint import format as layout
from meshwright.checkpoint.format import Checkpoint
from meshwright.errors import CheckpointError


def newest(directory: str | Path) -> Path | None:
    """The newest complete checkpoint under `directory`, or None if there is none. Unfinished ones are not seen."""
    found = layout.complete(Path(directory))
    return found[-1] if found else None


def read(path: str | Path) -> Checkpoint:
    """The checkpoint at `path`, verified, its tensors on the CPU.

    Raises `CheckpointError` naming the file that is missing or damaged. A damaged checkpoint is never skipped
    silently: remove its directory to go on from the one before.
    """
    path = Path(path)
    manifest = _manifest(path / layout.STATE)
    tensors = {}
    for name in (layout.MODEL, layout.OPTIMIZER):
        data = _bytes(path / name)
        if hashlib.sha256(data).hexdigest() != manifest["files"].get(name):
            raise CheckpointError(
                f"{path / name} is damaged: its SHA-256 is not the one in {layout.STATE} ({len(data):,} bytes read). "
                f"Remove {path} to resume from the checkpoint before it."
            )
        tensors[name] = safetensors.torch.load(data)
    return Checkpoint(manifest["step"], tensors[layout.MODEL], tensors[layout.OPTIMIZER], manifest["extra"])


def assert_fits(saved: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: str | Path) -> None:
    """Raise `CheckpointError` unless both have the same names, shapes and dtypes; up to 5 of each kind are named."""
    missing = [name for name in wanted if name not in saved]
    unexpected = [name for name in saved if name not in wanted]
    kinds = {"saved": layout.shapes(saved), "wanted": layout.shapes(wanted)}
    other = [
        f"{name} (saved {_text(kinds['saved'][name])}, this model {_text(kinds['wanted'][name])})"
        for name in wanted
        if name in saved and kinds["saved"][name] != kinds["wanted"][name]
    ]
    problems = {"missing in the checkpoint": missing, "not in this model": unexpected, "of another shape": other}
    text = [
        f"{len(names)} {problem}: {', '.join(names[:5])}{', …' * (len(names) > 5)}"
        for problem, names in problems.items()
        if names
    ]
    if text:
        raise CheckpointError(f"{where} belongs to another model: {'; '.join(text)}")


def _text(kind: list[Any]) -> str:
    return f"{kind[0]} {tuple(kind[1])}"


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(_bytes(path))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged: not JSON ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("sha256") != layout.digest(manifest):
        raise CheckpointError(f"{path} is damaged: its content does not have the SHA-256 it states")
    if manifest["meshwright_checkpoint"] != layout.VERSION:
        version = manifest["meshwright_checkpoint"]
        raise CheckpointError(f"{path}: checkpoint version {version}; this release reads {layout.VERSION}")
    return manifest


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read the checkpoint: {error.strerror}") from None
