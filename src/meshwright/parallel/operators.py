"""The routing of ATen operators (forward below autograd, and all of backward) to their rules.

Order: a registered rule; elementwise work by torch's own `pointwise` tag; else the exact fallback, which gathers
and reports, or refuses. Nothing is passed on unseen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Shard

from meshwright.errors import StrictError, UnsupportedError
from meshwright.parallel.account import layer, nobody, totals
from meshwright.parallel.at_once import at_once
from meshwright.parallel.comm import Cause
from meshwright.parallel.copies import check_writable, remember, set_runner, written
from meshwright.parallel.layout import REPLICATE, Placements, partial_axes, replicated, splits
from meshwright.parallel.redistribute import move
from meshwright.parallel.tensor import MeshTensor, fresh, is_mesh, ledger_of, mesh_tensors, set_dispatcher, wrap

Rule = Callable[[Any, Any, Any], Any]
OPERATORS: dict[Any, Rule] = {}
POINTWISE: set[Any] = set()  # elementwise operators that torch does not tag
LINEAR: set[Any] = set()  # operators that may work on summands (Partial) without summing first
_known: dict[Any, _Operator] = {}

_pointwise_rule: Rule | None = None


class _Operator(NamedTuple):
    """What dispatch asks about an operator, found once: asking torch costs as much as small work."""

    rule: Rule | None
    writes: bool
    reshapes: bool  # in place
    is_linear: bool
    views: bool  # returns views of its first argument
    targets: tuple[tuple[int, str], ...]  # position and name of the arguments it writes to
    is_simple: bool  # elementwise, with one result: a new tensor, or its first argument

    @classmethod
    def of(cls, func: Any) -> _Operator:
        rule, tags, returns = OPERATORS.get(func), func.tags, func._schema.returns
        elementwise = torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags
        if rule is None and (func in POINTWISE or elementwise):
            rule = _pointwise_rule
        writes: bool = func._schema.is_mutable
        views = bool(returns) and returns[0].alias_info is not None and not writes
        targets = tuple(
            (i, argument.name)
            for i, argument in enumerate(func._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        )
        reshapes = writes and torch.Tag.inplace_view in tags
        to_first = not targets or [i for i, _ in targets] == [0]
        is_tensor = len(returns) == 1 and isinstance(returns[0].type, torch.TensorType)
        identity = OPERATORS.get(torch.ops.aten.detach.default)  # the rule for operators that return their argument
        is_known = rule is not None and rule in (_pointwise_rule, identity)
        is_simple = is_known and is_tensor and to_first and not reshapes
        return cls(rule, writes, reshapes, func in LINEAR, views, targets, is_simple)


def _about(func: Any) -> _Operator:
    known = _known.get(func)
    if known is None:
        known = _known[func] = _Operator.of(func)
    return known


def operator(*funcs: Any, linear: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule for ATen operators; `linear` ones accept Partial arguments as they are."""

    def register(rule: Rule) -> Rule:
        for func in funcs:
            OPERATORS[func] = rule
            if linear:
                LINEAR.add(func)
        return rule

    return register


def set_pointwise(rule: Rule) -> Rule:
    """Install the rule for elementwise operators."""
    global _pointwise_rule
    _pointwise_rule = rule
    return rule


def cause_of(func: Any, args: Any) -> Cause:
    """On whose behalf an operator communicates."""
    name = func._schema.name.removeprefix("aten::").removeprefix("_unsafe_")  # the name that users write
    return Cause(ledger_of(args), (layer(), name))


def placed(x: Any, target: Placements, cause: Cause) -> torch.Tensor:
    """The local part of mesh tensor `x` under `target`; no autograd."""
    spec = x._spec
    if spec.placements == target:
        local: torch.Tensor = x._local_tensor
        return local
    return move(x._local_tensor, spec.mesh, tuple(spec.shape), tuple(spec.placements), target, cause)


def summed(x: Any, cause: Cause) -> Any:
    """`x` with its summands added up over the ranks."""
    target = tuple(REPLICATE if isinstance(p, Partial) else p for p in x._spec.placements)
    return wrap(placed(x, target, cause), x._spec.mesh, target, tuple(x._spec.shape), x._ledger)


def mutable(func: Any) -> bool:
    """Whether the operator writes to one of its arguments."""
    is_mutable: bool = func._schema.is_mutable
    return is_mutable


def _map(values: Any, change: Callable[[Any], Any]) -> Any:
    """Apply `change` to every mesh tensor in (nested) arguments."""
    if is_mesh(values):
        return change(values)
    if isinstance(values, list | tuple):
        return type(values)(_map(value, change) for value in values)
    if isinstance(values, dict):
        return {key: _map(value, change) for key, value in values.items()}
    return values


def dispatch(func: Any, args: Any, kwargs: Any) -> Any:
    """Run one ATen operator on mesh tensors."""
    known = _about(func)
    if known.is_simple:
        result = at_once(func, args, kwargs, known.writes, known.rule is not _pointwise_rule)
        if result is not NotImplemented:
            return result
    tensors = mesh_tensors([*args, *kwargs.values()] if kwargs else args)
    for t in tensors:
        if t._frozen_view:
            fresh(t)
    if known.writes and not known.reshapes:
        for t in _written(func, args, kwargs):
            if t._frozen_view:
                check_writable(func, t)
    elif known.reshapes and known.rule is None:
        raise UnsupportedError(
            f"{func} in layer {layer()!r} changes the shape of a mesh tensor in place; "
            "use the form without underscore, which returns a new tensor"
        )
    if not known.is_linear or known.writes:
        for t in tensors:
            if _is_partial(t):
                args, kwargs = _without_summands(func, args, kwargs)
                break
    result = _ruled(func, args, kwargs)
    if known.writes:
        for t in _written(func, args, kwargs):
            written(t, known.reshapes)
    elif known.views and args and is_mesh(args[0]):
        remember(result, func, args, kwargs)
    return result


def _written(func: Any, args: Any, kwargs: Any) -> list[Any]:
    """The mesh tensors an operator writes to."""
    return mesh_tensors([args[i] if i < len(args) else kwargs.get(name) for i, name in _about(func).targets])


def _is_partial(t: Any) -> bool:
    return bool(partial_axes(tuple(t._spec.placements)))


def accumulates(func: Any, args: Any) -> bool:
    """Whether this is autograd adding up a gradient, the one write that may leave summands behind."""
    return (
        func in (torch.ops.aten.add_.Tensor, torch.ops.aten.copy_.default)
        and torch._C._current_graph_task_id() != -1
        and isinstance(args[0], MeshTensor)
        and isinstance(args[1], MeshTensor)
        and not torch.is_grad_enabled()
        and not args[0]._is_view()
    )


def _without_summands(func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Arguments whose summands are added up, unless the operator is linear. What is written to is added up in place.

    Raises `UnsupportedError` where only a view of the summands would be added up.
    """
    if mutable(func):
        if accumulates(func, args):
            return args, kwargs
        cause = cause_of(func, args)
        for t in _written(func, args, kwargs):
            if _is_partial(t):
                if t._is_view():
                    raise UnsupportedError(
                        f"{func} in layer {layer()!r} writes to a view of a gradient that is not summed over the ranks "
                        "yet (no_sync, autograd.grad); write to the gradient itself, or use its redistribute() first"
                    )
                whole = summed(t, cause)
                t._local_tensor, t._spec = whole._local_tensor, whole._spec
    cause = cause_of(func, args)

    def whole_of(t: Any) -> Any:
        return summed(t, cause) if _is_partial(t) else t

    return _map(args, whole_of), _map(kwargs, whole_of)


def _ruled(func: Any, args: Any, kwargs: Any) -> Any:
    rule = _about(func).rule
    if rule is not None:
        result = rule(func, args, kwargs)
        if result is not NotImplemented:
            return result
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        return func.decompose(*args, **kwargs)  # inference mode hands these over in one piece
    if mutable(func) and args and is_mesh(args[0]) and (plain := _without_writing(func)) is not None:
        x = args[0]
        out = dispatch(plain, args, kwargs)
        x._local_tensor.copy_(placed(out, tuple(x._spec.placements), cause_of(func, args)))
        return x
    return fallback(func, args, kwargs)


def _without_writing(func: Any) -> Any:
    """The form of an in-place operator that returns a new tensor, or None."""
    name = func._schema.name.removeprefix("aten::")
    if torch.Tag.nondeterministic_seeded in func.tags or not name.endswith("_") or name.startswith("_"):
        return None
    return getattr(getattr(torch.ops.aten, name[:-1], None), func._overloadname, None)


def fallback(func: Any, args: Any, kwargs: Any) -> Any:
    """Exact for any operator without side effects: every rank gathers the arguments and computes the whole.

    Raises `StrictError` before communication if the module was parallelized with `strict=True` and anything is
    split; `UnsupportedError` for random operators and in-place writes that a gathered copy would lose.
    """
    tensors = mesh_tensors([*args, *kwargs.values()])
    if not tensors:  # only nested deeper than the rules look
        raise UnsupportedError(f"{func}: mesh tensors nested in lists of lists are not understood")
    mesh: DeviceMesh = tensors[0]._spec.mesh
    ledger = ledger_of(tensors)
    name = func._schema.name.removeprefix("aten::")
    if torch.Tag.nondeterministic_seeded in func.tags:
        raise UnsupportedError(f"{name} in layer {layer()!r}: this random operator has no rule that all ranks share")
    split = [t for t in tensors if splits(tuple(t._spec.placements))]
    if mutable(func) and any(splits(tuple(t._spec.placements)) for t in _written(func, args, kwargs)):
        raise UnsupportedError(f"{name} in layer {layer()!r} writes in place to a split tensor and has no rule")
    if split and ledger is not None and ledger.strict:
        where = ", ".join(f"{tuple(t._spec.shape)} {t._spec.placements}" for t in split)
        raise StrictError(
            f"{name} in layer {layer()!r} has no exact split form for {where}; strict=True forbids to gather. "
            "Use another operation there, or parallelize without strict."
        )
    cause = Cause(ledger, (layer(), name))
    before = totals.sent_bytes

    def whole(t: Any) -> torch.Tensor:
        return placed(t, replicated(mesh), cause)

    local_args, local_kwargs = _map(args, whole), _map(kwargs, whole)
    if split:
        nbytes = totals.sent_bytes - before
        totals.gathered_bytes += nbytes
        (ledger or nobody).gathered(layer(), name, nbytes)
    out = func(*local_args, **local_kwargs)
    if mutable(func):
        return args[0] if isinstance(out, torch.Tensor) else out
    aliases = any(r.alias_info is not None for r in func._schema.returns)

    def rewrap(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return wrap(value, mesh, replicated(mesh), None, ledger, frozen_view=bool(split) and aliases)
        if isinstance(value, list | tuple):
            return type(value)(rewrap(item) for item in value)
        return value

    return rewrap(out)


def shards_only(placements: Placements, dims: Sequence[int]) -> bool:
    """Whether no axis splits any of `dims`."""
    return all(dim not in dims for _, dim in splits(placements))


def reshard(x: Any, dims: Sequence[int], cause: Cause) -> Any:
    """`x` made whole along `dims` (the other splits stay)."""
    if shards_only(tuple(x._spec.placements), dims):
        return x
    target = tuple(REPLICATE if isinstance(p, Shard) and p.dim in dims else p for p in x._spec.placements)
    return wrap(placed(x, target, cause), x._spec.mesh, target, tuple(x._spec.shape), x._ledger)


set_dispatcher(dispatch)
set_runner(_ruled)
