"""What ranks run in the tests of the study."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cosmostudy.batches import Scale
from cosmostudy.settings import Study
from cosmostudy.training import Trainer, Training
from meshwright.train import loop, state

SCALE = Scale(0.6, 0.5)


def trained(study: Study, training: Training, universes: str, folder: str, steps: int) -> dict[str, Any]:
    """Losses, weights and predictions after a few steps, with the plan of the study."""
    loop.deterministic()
    trainer = Trainer(study, training, universes, SCALE, Path(folder))
    with trainer.batches.serve(0, trainer.steps, study.data.store_mib):
        losses = [trainer.optimise()["loss"] for _ in range(steps)]
    weights = {name: state.whole(value).numpy() for name, value in trainer.model.state_dict().items()}
    return {"losses": losses, "weights": weights, "predictions": trainer.predictions()[0]}


def served(study: Study, training: Training, universes: str, folder: str, steps: int) -> list[torch.Tensor]:
    """This rank's parts of the first batches: inputs and targets."""
    found = []
    trainer = Trainer(study, training, universes, SCALE, Path(folder))
    with trainer.batches.serve(0, steps, study.data.store_mib) as batches:
        for step in range(steps):
            found += [part.to_local().clone().numpy() for part in batches.batch(step)]  # type: ignore[attr-defined]
    return found


def without_store(study: Study) -> Study:
    return replace(study, data=replace(study.data, store_mib=None))
