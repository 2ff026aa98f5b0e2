"""The loss is not a number: run the same batch again with a hook on each layer and name the first that is to blame."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from meshwright.cluster import agree
from meshwright.errors import NumericsError
from meshwright.parallel.tensor import is_mesh

_NONE = 2**62


def stop(model: nn.Module, forward: Callable[[], object], inputs: Tensor, step: int, loss: float) -> None:
    """Raise `NumericsError` for a `loss` that is not finite, naming the first layer of `model` whose output is not.

    `forward` computes the loss of the same batch again. Collective: the loss is global, so every rank comes here, and
    a layer is to blame where any rank's part of its output is not finite.
    """
    what = f"step {step}: the loss is {loss}"
    if agree.largest(not _finite(inputs)):
        raise NumericsError(
            f"{what}: the input already has values that are not finite; look at the data of this sample"
        )
    weights = [name for name, value in model.named_parameters() if not _finite(value)]
    if weights:
        raise NumericsError(f"{what}: the weights already have values that are not finite, first {weights[0]!r}")
    raise NumericsError(f"{what}: {_first_layer(model, forward)}. Lower optim.lr, or set train.precision=fp32.")


def _first_layer(model: nn.Module, forward: Callable[[], object]) -> str:
    calls: list[tuple[str, bool]] = []

    def hook(name: str, kind: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(module: nn.Module, arguments: Any, output: Any) -> None:
            tensors = list(_tensors(output))
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
            calls.append((f"{name or 'the model'!r} ({kind}, output {shapes})", all(map(_finite, tensors))))

        return look

    handles = [
        module.register_forward_hook(hook(name, type(module).__name__)) for name, module in model.named_modules()
    ]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    own = next((index for index, (_, finite) in enumerate(calls) if not finite), _NONE)
    first = agree.least(own)
    if first == _NONE:
        return "every layer's output is finite, so the loss itself makes it (or it was not repeatable)"
    ranks = [rank for rank, (index,) in enumerate(agree.gather([own])) if index == first]
    return f"the first layer that is not finite is {calls[first][0]}, on rank {', '.join(map(str, ranks))}"


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, list | tuple):
        for item in output:
            yield from _tensors(item)


def _finite(tensor: Tensor) -> bool:
    """Whether this rank's part is finite."""
    local = tensor.to_local() if is_mesh(tensor) else tensor
    return bool(torch.isfinite(local).all())
