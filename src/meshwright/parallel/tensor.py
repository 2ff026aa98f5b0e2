"""The tensor that users hold: a DTensor whose every operation is exact on split dims.

`MeshTensor` is a subclass of DTensor: `.shape` is global, `.full_tensor()` is the single-device value. Functions of
`torch` reach the rules of `functions.py` (whole operations: convolution, pooling, losses), operators of ATen reach
those of `operators.py` (elementwise work, reductions, views, and all of backward). What neither knows is gathered
and reported, or refused: never guessed.

`MeshParameter` is the same for parameters. A parameter keeps its identity when its module is parallelized, so that
an optimiser made before stays valid. Python cannot turn a plain tensor object into one with DTensor's slots, so the
class is not a DTensor by layout but answers as one (`isinstance(p, DTensor)` holds through `__class__`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from meshwright.cluster.process_group import when_leaving
from meshwright.errors import UnsupportedError
from meshwright.parallel.account import Ledger, where
from meshwright.parallel.answers import Answers
from meshwright.parallel.history import EDGE, node_of, observed
from meshwright.parallel.layout import Placements, global_strides

FUNCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {}
_dispatch: Callable[..., Any] | None = None
_DETACH = torch.ops.aten.detach.default
_version, _output_nr = (torch._C.TensorBase.__dict__[name].__get__ for name in ("_version", "output_nr"))
_specs: dict[tuple[object, ...], DTensorSpec] = {}
when_leaving(_specs.clear)  # they hold meshes, which hold groups


def set_dispatcher(dispatcher: Callable[..., Any]) -> None:
    """Install the rules for ATen operators (done once, by `operators.py`)."""
    global _dispatch
    _dispatch = dispatcher


class MeshOps(Answers):
    """What split activations and parameters share: their operations are routed to the rules."""

    _ledger: Ledger | None  # of the module it comes from; None: no module
    _frozen_view: bool = False  # a copy that one device would hold as a view
    _source: Any = None  # of such a copy: where it comes from (see copies.py)
    _history: tuple[torch.Tensor, Any] | None = None  # see `history`
    _way: str | None = None  # "part" once a rule went on from it, "node" once somebody looked at the graph before

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if torch.compiler.is_compiling():  # its tracer would take mesh tensors for DTensors and fail obscurely later
            raise UnsupportedError(
                "torch.compile of a parallelized module is not supported: the exchange between ranks runs in Python "
                "between the kernels. Call the module itself."
            )
        rule = FUNCTIONS.get(func)
        if rule is not None:
            result = rule(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        if func is _DETACH and not args[0]._frozen_view:  # once for every gradient that autograd accumulates
            return under(args[0]._local_tensor, args[0]._spec, args[0]._ledger)
        assert _dispatch is not None
        return _dispatch(func, args, kwargs or {})


def _no_flattening(self: object) -> None:
    raise AttributeError("mesh tensors are not flattened (torch.compile of a parallelized module is not supported)")


# Before 2.13 torch's C++ dispatch takes whatever answers as a DTensor for one of its own and never asks the subclass.
# There mesh tensors have all the methods of a DTensor, but `isinstance(x, DTensor)` does not hold.
_ASKS_SUBCLASSES = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) >= (2, 13)
_Base: Any = DTensor if _ASKS_SUBCLASSES else torch.Tensor


class MeshTensor(MeshOps, _Base):
    """A split or replicated activation."""

    @property
    def grad_fn(self) -> Any:
        """The node that made this tensor; that of its part, if rules have gone on from there already."""
        part = observed(self)
        if part is None:
            return node_of(self)
        node: Any = part.grad_fn
        node.metadata[EDGE, part.output_nr] = self._spec, self._ledger
        return node

    @property
    def output_nr(self) -> int:
        """Which of the outputs of `grad_fn` this is."""
        part = observed(self)
        with torch._C.DisableTorchFunctionSubclass():
            count: int = _output_nr(self) if part is None else part.output_nr
        return count

    # torch would swap parameters by `swap_tensors` where values answer to flattening; ours follow through `.data`
    __tensor_flatten__ = property(_no_flattening)


class MeshParameter(MeshOps, torch.Tensor):  # type: ignore[misc, override]
    """A parameter or buffer of a parallelized module; see the module docstring."""

    if _ASKS_SUBCLASSES:
        __class__ = property(lambda self: DTensor)
    __hash__ = torch.Tensor.__hash__


# What `isinstance` finds for activations and parameters of a parallelized module under this version of torch.
MESH_TYPES: tuple[type, ...] = (DTensor,) if _ASKS_SUBCLASSES else (MeshTensor, MeshParameter)


def is_mesh(value: object) -> TypeGuard[Any]:
    """Whether a value is a mesh tensor (activation or parameter)."""
    return isinstance(value, MeshOps)


def spec_of(
    mesh: DeviceMesh, placements: Placements, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype
) -> DTensorSpec:
    """One spec object per value: making one costs more than looking it up."""
    key = (id(mesh), placements, shape, strides, dtype)
    spec = _specs.get(key)
    if spec is None:
        if len(_specs) > 20000:
            _specs.clear()
        spec = DTensorSpec(mesh, placements, TensorMeta(torch.Size(shape), strides, dtype))
        _specs[key] = spec
    return spec


class Layout:
    """Where the parts of a tensor lie: mesh, placements and global shape. It remembers the last spec: parts of one
    layout mostly lie alike in memory."""

    __slots__ = ("_last", "mesh", "placements", "shape")

    def __init__(self, mesh: DeviceMesh, placements: Placements, shape: tuple[int, ...]) -> None:
        self.mesh, self.placements, self.shape = mesh, placements, shape
        self._last: tuple[tuple[int, ...], torch.dtype, DTensorSpec] | None = None  # of the parts with such strides

    def spec(self, local: torch.Tensor) -> DTensorSpec:
        """That of a tensor of which this rank has the part `local`."""
        strides, last = local.stride(), self._last
        if last is None or last[0] != strides or last[1] is not local.dtype:
            whole = strides if self.shape == local.shape else global_strides(self.shape, strides)
            last = strides, local.dtype, spec_of(self.mesh, self.placements, self.shape, whole, local.dtype)
            self._last = last
        return last[2]


def wrap(
    local: torch.Tensor,
    mesh: DeviceMesh,
    placements: Placements,
    shape: tuple[int, ...] | None = None,
    ledger: Ledger | None = None,
    *,
    frozen_view: bool = False,
) -> MeshTensor:
    """A `MeshTensor` around this rank's part (no copy, no autograd). `shape` is global; None: equal to the local."""
    if shape is None:
        shape = tuple(local.shape)
        strides = local.stride()
    else:
        strides = local.stride() if shape == local.shape else global_strides(shape, local.stride())
    spec = spec_of(mesh, placements, shape, strides, local.dtype)
    out = under(local.detach() if local.requires_grad else local, spec, ledger)
    if frozen_view:
        out._frozen_view = True
    return out


def under(local: torch.Tensor, spec: DTensorSpec, ledger: Ledger | None) -> MeshTensor:
    """`local`, which has no history, under a spec that is its own: half the time of `wrap`."""
    meta: Any = spec.tensor_meta
    out = torch.Tensor._make_wrapper_subclass(  # DTensor's own constructor takes twice the time
        MeshTensor, meta.shape, strides=meta.stride, dtype=meta.dtype, device=local.device, requires_grad=False
    )
    out._local_tensor, out._spec = local, spec
    # what a module makes carries its record into backward, when the module no longer runs
    out._ledger = where.stack[-1][0] if ledger is None and where.stack else ledger
    return out


def version(x: Any) -> int:
    """How often `x`, or what it is a view of, was written: torch's counter, which is the same on all ranks."""
    with torch._C.DisableTorchFunctionSubclass():
        count: int = _version(x)
    return count


def fresh(x: Any) -> None:
    """A copy of what one device would view is fetched anew if it was written elsewhere; collective then."""
    if x._source is not None:
        x._source.refresh(x)


def like(local: torch.Tensor, other: Any) -> MeshTensor:
    """`local` wrapped with the placements and global shape of `other`."""
    return wrap(local, other._spec.mesh, other._spec.placements, tuple(other._spec.shape), other._ledger)


def mesh_tensors(values: Any) -> list[Any]:
    """All mesh tensors among arguments, one level of lists deep."""
    found: list[Any] = []
    for value in values:
        if isinstance(value, MeshOps):
            found.append(value)
        elif isinstance(value, list | tuple):
            found.extend(item for item in value if isinstance(item, MeshOps))
    return found


def ledger_of(values: Any) -> Ledger | None:
    """The record to write to: that of the first mesh tensor that has one, else of the module that runs."""
    for value in values:
        if isinstance(value, MeshOps):
            ledger: Ledger | None = value._ledger
            if ledger is not None:
                return ledger
        elif isinstance(value, list | tuple):
            found = next((t._ledger for t in mesh_tensors(value) if t._ledger is not None), None)
            if found is not None:
                return found
    return where.stack[-1][0] if where.stack else None
