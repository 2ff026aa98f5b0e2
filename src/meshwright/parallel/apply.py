"""The public entrance: a module becomes parallel, a tensor becomes split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard
from torch.utils._pytree import tree_leaves, tree_map_only

from meshwright.cluster.agree import assert_same_on_all_ranks
from meshwright.cluster.pages import keep_pages
from meshwright.cluster.pages import wanted as wanted_of_pages
from meshwright.errors import PlanError, UnsupportedError
from meshwright.parallel import rules as _rules  # noqa: F401  (importing registers the rules)
from meshwright.parallel.account import Ledger, where
from meshwright.parallel.functions import sent_home
from meshwright.parallel.layout import REPLICATE, Placements, local_shape, replicated
from meshwright.parallel.mesh import default_device, mesh_of
from meshwright.parallel.parts import from_local as _from_local
from meshwright.parallel.randomness import forward_seeded
from meshwright.parallel.redistribute import redistribute, same
from meshwright.parallel.rules.pointwise import cut
from meshwright.parallel.rules.sync_norm import adopt
from meshwright.parallel.tensor import MeshParameter, MeshTensor, is_mesh, spec_of, wrap
from meshwright.plan.plan import Plan

_LEDGER = "_meshwright_ledger"
_compared: set[tuple[object, ...]] = set()
_attach: Callable[[nn.Module], None] | None = None


def set_reducer(attach: Callable[[nn.Module], None]) -> None:
    """Install what sums parameter gradients over the ranks (done once, by `meshwright.sync`)."""
    global _attach
    _attach = attach


def _reduce_gradients(model: nn.Module) -> None:
    assert _attach is not None
    _attach(model)


def placements_for(plan: Plan, ndim: int, layout: str | None) -> Placements:
    """The placements of a tensor of `ndim` dims under `plan`."""
    found = zip(plan.dims(ndim, layout), plan.axes, strict=True)
    return tuple(REPLICATE if dim is None or axis.size == 1 else Shard(dim) for dim, axis in found)


def shard(x: torch.Tensor, plan: Plan, layout: str | None = None) -> MeshTensor:
    """A full tensor, equal on every rank → the same value split under `plan`; each rank keeps its part alone.

    Args: `x` any dtype and memory format (kept). `layout` names the dims where custom does not (5-D NCDHW,
    4-D NCHW, 3-D NCW, 2-D NC): `layout="NDHW"`. Differentiable if `x` requires grad. Nothing is sent, but the first
    tensor of each shape and type is compared between the ranks (a digest). Raises `PlanError` for an unknown layout
    or ranks that do not match the plan, `MismatchError` if the ranks hold different tensors.
    """
    mesh = mesh_of(plan, x.device.type)
    placements = placements_for(plan, x.ndim, layout)
    shape = tuple(x.shape)
    kind = (plan, shape, x.dtype, layout)
    if mesh.size() > 1 and kind not in _compared:
        assert_same_on_all_ranks({"x": x.detach()}, "the input of mw.shard")
        _compared.add(kind)
    part = cut(x, placements, mesh)
    if x.requires_grad and x.grad_fn is not None:  # a plain tensor counts as whole, and so does its gradient
        whole = _from_local(x, mesh, replicated(mesh), shape)
        return redistribute(whole, placements)
    kept = part.detach()
    kept = kept.clone(memory_format=torch.preserve_format)  # the rest of `x` can be freed, and writes stay here
    out = wrap(kept, mesh, placements, shape)
    out.requires_grad_(x.requires_grad)
    return out


def from_local(part: torch.Tensor, plan: Plan, shape: Any, layout: str | None = None) -> MeshTensor:
    """A split tensor of global `shape` from this rank's `part`; no rank ever holds the whole.

    `part` must be `full[mw.interval(shape, plan, rank, layout)]`. Differentiable if `part` requires grad.
    Raises `PlanError` if its shape is not that of the interval.
    """
    mesh = mesh_of(plan, part.device.type)
    shape = tuple(int(size) for size in shape)
    placements = placements_for(plan, len(shape), layout)
    expected = local_shape(mesh, placements, shape)
    if tuple(part.shape) != expected:
        raise PlanError(
            f"from_local: this rank's part of a tensor of shape {shape} under {plan} has shape {expected}, "
            f"not {tuple(part.shape)}; mw.interval(shape, plan, rank) gives the slices"
        )
    if part.requires_grad:
        return _from_local(same(part), mesh, placements, shape)  # `part` stays the caller's, with its hooks
    return wrap(part, mesh, placements, shape)


def parallelize(
    model: nn.Module,
    plan: Plan,
    *,
    strict: bool = False,
    device: torch.device | str | None = None,
    seed: int = 0,
) -> nn.Module:
    """Make `model` compute on split tensors, with the result of one device. Changes the module and returns it.

    Parameters and buffers become mesh tensors (DTensors) under their own names and keep their identity, so an
    optimiser made before stays valid. Every rank must hold the same values.

    Args:
        plan: how ranks split the work.
        strict: an operation without an exact split form raises `StrictError` instead of being gathered.
        device: where to compute; the default is this rank's device.
        seed: the random streams (dropout, noise) are functions of seed, call and global position.
    Raises `PlanError` (ranks do not match), `MismatchError` (ranks hold different models), `UnsupportedError` (a
    parameter that cannot be converted), `ConfigError` (an unknown value of `MESHWRIGHT_PAGES`).
    """
    wanted_of_pages()
    if any(is_mesh(t) for t in model.parameters()):
        raise UnsupportedError(f"{type(model).__name__} is parallelized already; build a new module for another plan")
    place = torch.device(device) if device is not None else default_device()
    mesh = mesh_of(plan, place.type)
    assert_same_on_all_ranks(model)
    ledger = Ledger(strict=strict, seed=seed)
    done: dict[int, torch.Tensor] = {}
    for module in model.modules():
        adopt(module)
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None and id(tensor) not in done:
                    _convert(tensor, name, mesh, place, ledger)
                    done[id(tensor)] = tensor
    model.__dict__[_LEDGER] = ledger
    for name, module in model.named_modules():
        module.register_forward_pre_hook(_Enter(ledger, name or type(model).__name__, place.type == "cpu"))
        module.register_forward_hook(_Leave(), always_call=True)
    _reduce_gradients(model)
    return model


def _convert(tensor: torch.Tensor, name: str, mesh: DeviceMesh, device: torch.device, ledger: Ledger) -> None:
    """Turn a plain parameter or buffer into a replicated mesh tensor, keeping the Python object."""
    if tensor.device.type == "meta":
        raise UnsupportedError(f"parameter {name!r} is on the meta device; materialise it before parallelize")
    if tensor.grad_fn is not None or tensor._backward_hooks or tensor._use_count() > 1:  # type: ignore[attr-defined]
        raise UnsupportedError(
            f"parameter {name!r} is in use (a graph, a hook or a view holds it), so it cannot keep its identity; "
            "call parallelize before the first forward and before registering hooks on parameters"
        )
    local = tensor.detach().to(device)
    spec = spec_of(mesh, replicated(mesh), tuple(tensor.shape), local.stride(), local.dtype)
    shell = torch.Tensor._make_wrapper_subclass(
        MeshParameter,
        tensor.shape,
        strides=local.stride(),
        dtype=local.dtype,
        device=local.device,
        requires_grad=tensor.requires_grad,
    )
    grad = tensor.grad
    is_parameter = isinstance(tensor, nn.Parameter)
    set_class: Callable[[Any, type], None] = object.__dict__["__class__"].__set__
    set_class(tensor, MeshParameter)
    set_class(shell, torch.Tensor)
    torch._C._swap_tensor_impl(tensor, shell)
    tensor.__dict__.update(_local_tensor=local, _spec=spec, _ledger=ledger)
    if is_parameter:
        tensor.__dict__["_is_param"] = True
    if grad is not None:
        tensor.grad = wrap(grad.detach().to(device), mesh, replicated(mesh))


def _runs(ledger: Ledger) -> bool:
    """Whether a module of this record runs in this thread (mostly the innermost, which is asked first)."""
    return any(other is ledger for other, _ in where.stack)


class _Enter:
    """Names the layer that runs; at the root also gives all ranks the same random state, and sees to memory."""

    def __init__(self, ledger: Ledger, name: str, on_cpu: bool) -> None:
        self.ledger, self.place, self.on_cpu = ledger, (ledger, name), on_cpu

    def __call__(self, module: nn.Module, args: Any) -> None:
        stack = where.stack
        if not (stack and stack[-1][0] is self.ledger) and not _runs(self.ledger):
            if self.ledger.calls == 1 and torch.is_grad_enabled() and self.on_cpu:  # a step has shown what it needs
                keep_pages()
            forward_seeded.enter(self.ledger)
            if _LEDGER in module.__dict__:
                _reduce_gradients(module)  # a deep copy of a parallelized module has no reducer yet
        stack.append(self.place)


class _Leave:
    """The way out; at the root what convolutions split by channels is split as the plan says."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        stack = where.stack
        if not stack:  # the module failed before it entered
            return None
        ledger, _ = stack[-1]
        try:
            # a checkpoint repeats an inner module in backward
            if ledger.by_filters and len(stack) == 1 and torch._C._current_graph_task_id() == -1:
                home = tree_map_only(MeshTensor, lambda x: sent_home(x, [1], "output"), output)
                pairs = zip(tree_leaves(home), tree_leaves(output), strict=True)
                return home if any(new is not old for new, old in pairs) else None
        finally:
            stack.pop()
            if not (stack and stack[-1][0] is ledger) and not _runs(ledger):
                forward_seeded.leave(ledger)
        return None


def ledger(model: nn.Module) -> Ledger:
    """The record of a parallelized module. Raises `ValueError` for a module that is not parallelized."""
    found = model.__dict__.get(_LEDGER)
    if not isinstance(found, Ledger):
        raise ValueError(f"{type(model).__name__} is not a module that mw.parallelize returned")
    return found


def report(model: nn.Module) -> list[dict[str, Any]]:
    """What each layer has exchanged or gathered since `parallelize`: rows of layer, op, bytes, messages.

    Bytes are those this rank sent. Raises `ValueError` for a module that is not parallelized.
    """
    return [asdict(entry) for entry in ledger(model).entries.values()]
