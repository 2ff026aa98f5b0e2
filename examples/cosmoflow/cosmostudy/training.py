"""One training as each rank runs it: one size, one seed, with or without batch norm. Ends with the held-out universes.

The same seed and plan give the same bits, also when the training was killed and went on from a checkpoint: batches and
symmetries are functions of seed and step, dropout of seed and call, the learning rate of the step.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import meshwright as mw
from cosmostudy.batches import Batches, Scale
from cosmostudy.cubes import Cubes
from cosmostudy.progress import Progress
from cosmostudy.settings import Recipe, Study
from meshwright.checkpoint import read, write
from meshwright.cluster import agree
from meshwright.config import OptimConfig
from meshwright.errors import NumericsError
from meshwright.guard.inject import fault_point
from meshwright.models.cosmoflow import CosmoFlow
from meshwright.parallel.account import totals
from meshwright.parallel.mesh import default_device
from meshwright.train import loop, memory, optim, rundir, signals, state

CHECKPOINTS, STEPS, RESULT, PREDICTIONS = "checkpoints", "steps.jsonl", "result.json", "predictions.npz"
LEAST = 0.01  # of the peak: where the linear decay ends
_DTYPES = {"fp32": torch.float32, "bf16": torch.float32, "fp64": torch.float64}  # of weights


@dataclass(frozen=True)
class Training:
    """Which of the study's trainings."""

    size: int
    seed: int
    batch_norm: bool = True

    @property
    def name(self) -> str:
        return f"{self.size}{'' if self.batch_norm else '-plain'}-seed{self.seed}"

    def __str__(self) -> str:
        return f"{self.size}³ seed {self.seed}{'' if self.batch_norm else ' without batch norm'}"


def trainings(study: Study) -> list[Training]:
    """All of a study, seed by seed, so that one that is cut short has every size; most without batch norm come last."""
    normed = [[Training(size, seed) for size in reversed(study.sizes)] for seed in study.seeds]
    plain = [Training(study.plain, seed, False) for seed in study.seeds] if study.plain is not None else []
    return [*normed[0], *plain[:1], *(one for each in normed[1:] for one in each), *plain[1:]]


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """Of step 0 ≤ `step` < `steps`: one cycle as in the main job, or a straight line down to `LEAST` of the peak."""
    if recipe.schedule == "one_cycle":
        return optim.learning_rate(OptimConfig(lr=recipe.lr), step, steps)
    return recipe.lr * (1 - (1 - LEAST) * step / max(1, steps - 1))


def network(study: Study, training: Training, channels: int) -> nn.Module:
    """CosmoFlow, its weights a function of the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        made = CosmoFlow(training.size, channels, study.network.width, training.batch_norm, keep=study.network.keep)
    return made.to(_DTYPES[study.train.precision], memory_format=torch.channels_last_3d)  # type: ignore[call-overload]


def optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """Adam, or AdamW with the recipe's decay of weights."""
    if recipe.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=recipe.lr)
    return torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)


class Trainer:
    """The model of one training under its plan, at its start or at its newest checkpoint in `folder`."""

    def __init__(self, study: Study, training: Training, universes: str, scale: Scale, folder: Path) -> None:
        self.study, self.training, self.folder, self.scale = study, training, folder, scale
        self.plan = study.plan(training.size)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.device = default_device()
        data = study.data
        self.source = Cubes(universes, training.size, 0, data.train)
        self.held_out = Cubes(universes, training.size, data.first_test, data.test)
        self.model = network(study, training, self.source.fields["image"].sizes[0])
        saved = read.newest(folder / CHECKPOINTS)
        checkpoint = None
        if saved is not None:
            checkpoint = read.read(saved)
            state.restore_model(self.model, checkpoint, saved)
        self.model = mw.parallelize(self.model, self.plan, device=self.device, seed=training.seed)
        self.optimizer = optimizer(study.recipe, self.model)
        self.step = 0
        if saved is not None and checkpoint is not None:
            state.restore_optimizer(self.optimizer, self.model, checkpoint, saved)
            state.restore_clock(self.model, checkpoint)
            self.step = checkpoint.step
        self.first, self.steps = self.step, study.steps(training.size)
        self.batches = Batches(
            self.source, self.plan, self.rank, scale, _DTYPES[study.train.precision], self.device,
            size=study.batch(training.size), seed=training.seed, turned=study.recipe.symmetries,
        )  # fmt: skip

    def predict(self, image: Tensor) -> Tensor:
        """[N, 4], at least in fp32."""
        bf16 = self.study.train.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            found: Tensor = self.model(image)
        return found.float() if bf16 else found

    def optimise(self) -> dict[str, Any]:
        """The next step, and the line of `steps.jsonl` that describes it. Raises `NumericsError`."""
        before, start_s = totals.copy(), time.perf_counter()
        image, target = self.batches.batch(self.step)
        data_s = time.perf_counter() - start_s
        recipe = self.study.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(recipe, self.step, self.steps)
        self.optimizer.zero_grad(set_to_none=True)
        loss = F.mse_loss(self.predict(image), target)
        value = loss.item()
        if not np.isfinite(value):
            raise NumericsError(f"{self.training}, step {self.step + 1}: the loss is {value}; lower train.lr")
        loss.backward()
        if recipe.clip_norm:
            optim.clip(self.model, recipe.clip_norm)
        self.optimizer.step()
        self.step += 1
        step_s, spent = time.perf_counter() - start_s, totals - before
        exchange_s = spent.exchange_post_s + spent.exchange_wait_s
        return {
            "step": self.step,
            "loss": value,
            "step_s": step_s,
            "compute_s": max(0.0, step_s - data_s - exchange_s - spent.reduction_s),
            "exchange_s": exchange_s,
            "reduction_s": spent.reduction_s,
            "data_s": data_s,
            "sent_bytes": spent.sent_bytes,
            "reduced_bytes": spent.reduced_bytes,
        }

    def save(self) -> None:
        """Write a checkpoint. Collective; rank 0 writes."""
        checkpoint = state.collect(self.model, self.optimizer, self.step, {"training": self.training.name})
        if self.rank == 0:
            write.write(self.folder / CHECKPOINTS, checkpoint, keep=1)

    def predictions(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """For every cube of the held-out universes [universes, cubes, 4], and the truth [universes, 4]. Collective."""
        count, size = len(self.held_out), self.batches.size
        held = Batches(self.held_out, self.plan, self.rank, self.scale, self.batches.dtype, self.device, size=size)
        self.model.eval()
        found: list[Tensor] = []
        with torch.no_grad():
            for lo in range(0, count, size):
                indices = range(lo, min(count, lo + size))
                image, _ = held.of(indices, [0] * len(indices))
                found.append(state.whole(self.predict(image)))
        self.model.train()
        cubes = torch.cat(found).double().numpy().reshape(self.held_out.universes, -1, 4)
        return cubes, self.held_out.targets.double().numpy()


def run(study: Study, training: Training, universes: str, scale: Scale, folder: str, about: str = "") -> int:
    """Train to the end and write `result.json` into `folder`; returns the signal that ended it, or 0. Collective."""
    loop.deterministic()
    path = Path(folder)
    with signals.noted() as seen:
        trainer = Trainer(study, training, universes, scale, path)
        log = path / STEPS
        if trainer.rank == 0:
            path.mkdir(parents=True, exist_ok=True)
            rundir.forget_after(log, trainer.step)
        memory.reset_peak(trainer.device)
        progress = Progress(about, trainer.step, trainer.steps, quiet=trainer.rank > 0)
        with trainer.batches.serve(trainer.step, trainer.steps, study.data.store_mib):
            while trainer.step < trainer.steps:
                fault_point(trainer.step + 1)
                record = trainer.optimise()
                if trainer.rank == 0:
                    rundir.append(log, record)
                    progress.step(record)
                stopped = agree.largest(seen.number)
                if stopped or (trainer.step % study.train.checkpoint_every == 0 and trainer.step < trainer.steps):
                    trainer.save()
                if stopped:
                    return stopped
        finish(trainer, log)
    return 0


def finish(trainer: Trainer, log: Path) -> None:
    """Predict the held-out universes and write what the training found and cost. Collective."""
    peak = agree.largest(memory.peak_bytes(trainer.device))
    read_bytes = agree.largest(trainer.source.stats.read_bytes)
    predicted, truth = trainer.predictions()
    if trainer.rank:
        return
    steps = rundir.records(log)
    path = trainer.folder
    rundir.write_arrays(path / PREDICTIONS, {"predicted": predicted, "truth": truth})
    summary = {
        "size": trainer.training.size,
        "seed": trainer.training.seed,
        "batch_norm": trainer.training.batch_norm,
        "plan": str(trainer.plan),
        "ranks": trainer.plan.ranks,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "steps": trainer.steps,
        "batch": trainer.batches.size,
        "loss": float(np.mean([step["loss"] for step in steps[-max(1, len(steps) // 10) :]])),
        "seconds": {key: sum(step[f"{key}_s"] for step in steps) for key in
                    ("step", "compute", "exchange", "reduction", "data")},
        "median_step_s": float(np.median([step["step_s"] for step in steps])),
        "sent_bytes_per_step": steps[-1]["sent_bytes"],
        "reduced_bytes_per_step": steps[-1]["reduced_bytes"],
        "read_bytes": read_bytes,
        "peak_bytes": peak,
        "error": ((predicted - truth[:, None]) ** 2).mean((0, 1)).tolist(),
    }  # fmt: skip
    rundir.write_json(path / RESULT, summary)
