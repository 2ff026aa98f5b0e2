"""The processes of a contender of peers.py or spatial_apart.py: they take orders together, the first error ends all."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import time
from pathlib import Path
from typing import Any

RANK = Path(__file__).resolve().parent / "peers_rank.py"
PATIENCE_S = 900  # for one answer of a rank


class PeerError(Exception):
    """A contender cannot run here; the text says why in its own words."""


class Pair:
    """The two processes of a contender; `ask` has both do one thing."""

    def __init__(
        self,
        name: str,
        python: str,
        edge: int,
        dtype: str,
        folder: Path,
        checkout: str,
        ranks: int = 2,
        script: Path = RANK,
        source: Path | None = None,  # of another Meshwright than the one installed
    ):
        self.ranks: list[subprocess.Popen[bytes]] = []
        settings = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        if source is not None:
            settings["PYTHONPATH"] = str(source)
        for rank in range(ranks):
            with open(folder / f"{name}-{rank}.log", "w", encoding="utf-8") as log:
                process = subprocess.Popen(
                    [python, str(script), name, str(edge), dtype, str(rank), str(folder), checkout],
                    bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                    env=os.environ | settings,
                )  # fmt: skip
            self.ranks.append(process)

    def ask(self, order: str = "") -> list[dict[str, Any]]:
        """Send one line (none: they speak first) and wait for the answer of every rank; the first error ends both."""
        for process in self.ranks:
            if order:
                assert process.stdin is not None
                with contextlib.suppress(BrokenPipeError):  # it has ended: its silence is seen below
                    process.stdin.write(f"{order}\n".encode())
        answers: dict[int, dict[str, Any]] = {}
        deadline = time.monotonic() + PATIENCE_S
        while len(answers) < len(self.ranks):
            waiting = {
                process.stdout: rank
                for rank, process in enumerate(self.ranks)
                if rank not in answers and process.stdout is not None
            }
            ready, _, _ = select.select(list(waiting), [], [], max(0.0, deadline - time.monotonic()))
            for pipe in ready:
                line = pipe.readline()
                answers[waiting[pipe]] = json.loads(line) if line else {"error": f"rank {waiting[pipe]} ended"}
            wrong = [answer["error"] for answer in answers.values() if "error" in answer]
            if wrong or not ready:
                self.stop()  # the other rank may wait for this one for ever
                raise PeerError(wrong[0] if wrong else f"no answer within {PATIENCE_S} s")
        return [answers[rank] for rank in sorted(answers)]

    def stop(self) -> None:
        for process in self.ranks:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
