"""A run directory as training leaves it: small, made from arithmetic, with every file the report reads."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from meshwright.plan.plan import Plan, interval

SHAPE = (40, 24, 36)  # held-out volume, D × H × W
TRAIN_SHAPE = (40, 48, 36)
CLASSES = ["other", "grey", "white"]
HOSTILE = "</script><script>document.title='hacked'</script><b onclick=\"x\">&amp;'"


def slices(shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """A head of nested ellipsoids; the prediction is the truth, wrong along one edge."""
    d, h, w = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    radius = np.sqrt(d**2 + h**2 + w**2) + 0.06 * np.sin(9 * d) * np.cos(7 * w)
    truth = np.where(radius < 0.5, 2, np.where(radius < 0.75, 1, 0)).astype(np.uint8)
    prediction = np.where(radius + 0.05 * h < 0.5, 2, np.where(radius < 0.77, 1, 0)).astype(np.uint8)
    image = np.clip(1.1 - radius, 0, 1).astype(np.float32)
    found = {"shape": np.array(shape), "spacing_mm": np.array([2.0, 2.0, 2.0])}
    for across, way in enumerate("dhw"):
        for name, volume in (("image", image), ("truth", truth), ("prediction", prediction)):
            found[f"{name}_{way}"] = volume.take(shape[across] // 2, axis=across)
    return found


def step(number: int, last: int) -> dict[str, object]:
    share, wave = number / last, math.sin(number * 12.9898) * 43758.5453 % 1 - 0.5
    compute_s, exchange_s = 0.9 + 0.05 * wave + 1.5 * (number == 1), 0.07 + 0.03 * abs(wave)
    return {
        "step": number,
        "loss": 0.12 + 1.1 * math.exp(-5 * share) + 0.05 * wave,
        "lr": 4e-3 * math.sin(math.pi * min(1.0, 0.06 + share)),
        "dice": [
            0.99 - 0.4 * math.exp(-9 * share),
            0.94 - 0.8 * math.exp(-5 * share),
            0.95 - 0.9 * math.exp(-4 * share),
        ],
        "grad_norm": 0.3 + 2.0 * math.exp(-6 * share) + 0.2 * abs(wave),
        "step_s": compute_s + exchange_s + 0.042,
        "compute_s": compute_s,
        "exchange_s": exchange_s,
        "reduction_s": 0.03,
        "data_s": 0.008,
        "sent_bytes": 14_680_064,
        "reduced_bytes": 370_000,
        "messages": 118,
        "samples_per_s": 1 / (compute_s + exchange_s + 0.042),
    }


def rank(plan: Plan, number: int) -> dict[str, object]:
    own = interval(TRAIN_SHAPE, plan, number, layout="DHW")
    ideal = math.prod(s.stop - s.start for s in own) * 5
    return {
        "rank": number,
        "interval": [[s.start, s.stop] for s in own],
        "peak_bytes": 1_240_000_000 + 31_000_000 * number,
        "state_bytes": 402_000_000,
        "ideal_bytes": ideal,
        "part_bytes": ideal,
        "read_bytes": ideal * 2 + 352,
        "ideal_read_bytes": ideal * 2,
    }


def layers() -> list[dict[str, object]]:
    rows = [(f"down.{i // 2}.conv{i % 2}", "conv3d", 9_000_000 // 2**i, 0, 4) for i in range(6)]
    rows += [("head", "conv3d", 0, 0, 0), (HOSTILE, "median", 0, 6_553_600, 2)]
    keys = ("layer", "op", "exchanged_bytes", "gathered_bytes", "messages")
    return [dict(zip(keys, row, strict=True)) for row in rows]


MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """`make_run(plan, steps=…, finished=…)` → the path of a new run directory."""

    def make(plan: Plan | None = None, *, steps: int = 60, finished: bool = True) -> Path:
        plan = plan or Plan.uniform(depth=2)
        run = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        run.mkdir()
        (run / "config.yaml").write_text(yaml.safe_dump({"data": {"resolution_mm": 2}, "model": {"base": 8}}))
        plan.save(run / "plan.yaml")
        machine = {"processor": "A processor", "cores": 2, "memory_bytes": 24 * 2**30, "backends": ["gloo"], "gpus": []}
        (run / "machine.json").write_text(json.dumps(machine))
        lines = [json.dumps(step(number, steps)) for number in range(1, steps + 1)]
        (run / "steps.jsonl").write_text("".join(line + "\n" for line in lines))
        checks = [{"step": n, "loss": 0.3 - n / 1000, "dice": step(n, steps)["dice"]} for n in range(20, steps + 1, 20)]
        (run / "validation.jsonl").write_text("".join(json.dumps(check) + "\n" for check in checks))
        if not finished:
            return run
        (run / "ranks.json").write_text(json.dumps([rank(plan, number) for number in range(plan.ranks)]))
        (run / "layers.json").write_text(json.dumps(layers()))
        np.savez(run / "slices.npz", **slices(SHAPE))
        end = {"finished": True, "steps": steps, "train_s": 61.2, "total_s": 74.9, "dice": [0.991, 0.938, 0.945]}
        end |= {"classes": CLASSES, "ranks": plan.ranks, "threads_per_rank": 1, "precision": "bf16"}
        end |= {"parameters": 89_811, "resolution_mm": 2.0, "fold": 0}
        (run / "summary.json").write_text(json.dumps(end))
        return run

    return make
