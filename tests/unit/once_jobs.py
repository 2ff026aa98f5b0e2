"""What ranks run in the tests of a stream that is decoded once a host."""

from __future__ import annotations

import hashlib
import os
import signal
from pathlib import Path
from typing import BinaryIO

import torch.distributed as dist

from meshwright.data import once
from meshwright.data.folder import find_pairs
from meshwright.data.source import batch_shape, read_batch
from meshwright.data.volumes import make_pairs
from meshwright.plan.plan import Plan, interval


def read_part(folder: str, plan: Plan, indices: tuple[int, ...]) -> dict[str, object]:
    """This rank's part of some samples: its bytes as a digest, and what it cost."""
    source = make_pairs(find_pairs(folder), ("dark", "bright"))
    spans = interval(batch_shape(source, indices), plan, dist.get_rank())
    part = read_batch(source, indices, spans)
    digest = hashlib.sha256(part.image.numpy().tobytes() + part.label.numpy().tobytes()).hexdigest()
    stats = part.stats
    return {
        "digest": digest,
        "read": stats.read_bytes,
        "ideal": stats.ideal_read_bytes,
        "shared": stats.shared_bytes,
        "left": sorted(path.name for path in once._folder().iterdir() if path.suffix == ".partial"),
    }


def die_while_making(folder: str) -> str:
    """Rank 0 dies in the middle; the others find no result, and one of them makes it."""

    def die(file: BinaryIO) -> None:
        file.write(b"half")
        file.flush()
        with open(begun, "wb"):  # waits until the other rank listens
            os.kill(os.getpid(), signal.SIGKILL)

    begun = Path(folder, "begun")  # a pipe with a name
    if int(os.environ["RANK"]) == 0:
        once.once("key", 8, die)
    begun.read_bytes()  # until the other one is dead
    with once.once("key", 8, lambda file: file.write(b"whole")) as file:  # type: ignore[union-attr]
        file.seek(0)
        return file.read().decode()
