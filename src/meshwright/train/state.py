"""What a checkpoint holds of a training job, and how it comes back: model, optimiser, settings, random clock."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from meshwright.checkpoint import read
from meshwright.checkpoint.format import Checkpoint
from meshwright.errors import CheckpointError
from meshwright.parallel.apply import ledger
from meshwright.parallel.tensor import is_mesh


def collect(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, extra: Mapping[str, Any]) -> Checkpoint:
    """The state after `step` steps as full tensors on the CPU. Collective: every rank calls it, one writes.

    Raises `CheckpointError` for optimiser state that is neither a tensor nor None.
    """
    moments: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                moments[f"state.{name}.{key}"] = whole(value)
            elif value is not None:
                kind = type(value).__name__
                raise CheckpointError(
                    f"{type(optimizer).__name__} keeps {key} of {name} as {kind}; only tensors are saved"
                )
    weights = {name: whole(value) for name, value in model.state_dict().items()}
    return Checkpoint(
        step, weights, moments, {**extra, "optimizer": type(optimizer).__name__, "forward_calls": ledger(model).calls}
    )


def whole(tensor: Tensor) -> Tensor:
    """The full value as a plain tensor on the CPU; collective if the tensor is split."""
    return (tensor.full_tensor() if is_mesh(tensor) else tensor).detach().cpu()


def restore_model(model: nn.Module, checkpoint: Checkpoint, where: Path) -> None:
    """Load the weights into a model that is not parallelized yet. Raises `CheckpointError` if it is another model."""
    read.assert_fits(checkpoint.model, model.state_dict(), where)
    model.load_state_dict(dict(checkpoint.model))


def restore_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, checkpoint: Checkpoint, where: Path) -> None:
    """Give each parameter its saved optimiser state, placed as the parameter is.

    Raises `CheckpointError` if another kind of optimiser was saved.
    """
    saved, own = checkpoint.extra.get("optimizer"), type(optimizer).__name__
    if saved != own:
        raise CheckpointError(
            f"{where} was written with the optimiser {saved}, this job has {own}: set optim.name alike"
        )
    parameters = dict(model.named_parameters())
    for path, value in checkpoint.optimizer.items():
        name, _, key = path.removeprefix("state.").rpartition(".")
        if name not in parameters:
            raise CheckpointError(f"{where} has optimiser state for {name!r}, which this model does not have")
        parameter = parameters[name]
        if key == "step":  # torch keeps the count of steps of a parameter as a plain tensor on the CPU
            optimizer.state[parameter][key] = value
            continue
        with torch.no_grad():
            optimizer.state[parameter][key] = torch.zeros_like(parameter).copy_(value.to(parameter.device))


def restore_clock(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Dropout goes on where it was: its masks are a function of seed, position and the number of forward calls."""
    ledger(model).calls = checkpoint.extra["forward_calls"]
