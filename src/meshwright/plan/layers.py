"""What of a plain network makes ranks talk: its convolutions and poolings, where space ends, and its parameters.

The module runs once on the meta device (shapes alone, nothing is computed) while every torch function it calls is
seen. What is not known here is refused by name, so that no exchange is ever left out of a plan silently.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from meshwright.errors import UnsupportedError


@dataclass(frozen=True)
class Taps:
    """The windows of a convolution or pooling along one dim of space."""

    kernel: int
    stride: int
    padding: int  # positions before the first
    dilation: int


@dataclass(frozen=True)
class Layer:
    """One call that needs other ranks. `name` and `op` are those of `mw.report`; shapes are global.

    `taps` has one entry for each dim of space; it is empty where space ends (a flatten into features).
    """

    name: str
    op: str
    shape: tuple[int, ...]
    out: tuple[int, ...]
    itemsize: int  # bytes of an element of the input
    trains_input: bool  # a gradient flows to the input
    taps: tuple[Taps, ...] = ()
    weight: tuple[int, ...] = ()  # the shape of a convolution's
    groups: int = 1


@dataclass(frozen=True)
class Weight:
    """A trained parameter. `meets` is the number of dims of the activation it works on; None: it is not used."""

    name: str
    numel: int
    dtype: torch.dtype
    meets: int | None = None

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Network:
    """The layers in the order they run, the parameters in the order of the module."""

    layers: tuple[Layer, ...]
    weights: tuple[Weight, ...]


def layers_of(model: nn.Module, x: Tensor) -> Network:
    """The network that `model` is for inputs like `x` (its shape, dtype and `requires_grad` count, not its values).

    `model` may live on any device and is left as it is: not yet given to `mw.parallelize`. Known are convolution,
    maximum and average pooling, elementwise activations, dropout, flatten into features and fully connected layers.
    Raises `UnsupportedError` that names any other operation and its layer.
    """
    state: dict[str, Tensor] = {}
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if type(value) not in (nn.Parameter, Tensor):
            raise UnsupportedError(f"{name!r} is a {type(value).__name__}; plan the module before mw.parallelize")
        state[name] = torch.empty_like(value, device="meta").requires_grad_(value.requires_grad)
    trained = {name: value for name, value in state.items() if value.requires_grad}
    buffers = {id(state[name]) for name, _ in model.named_buffers()}
    example = torch.empty_like(x, device="meta").requires_grad_(x.requires_grad)
    with _named(model) as names, torch.enable_grad(), _Seen(names, trained, buffers) as seen:
        torch.func.functional_call(model, state, (example,))
    weights = (Weight(name, p.numel(), p.dtype, seen.meets.get(name)) for name, p in trained.items())
    return Network(tuple(seen.layers), tuple(weights))


@contextmanager
def _named(model: nn.Module) -> Iterator[list[str]]:
    """The names of the modules that run, outermost first."""
    names: list[str] = []
    handles = []
    for name, module in model.named_modules():
        label = name or type(model).__name__
        handles.append(module.register_forward_pre_hook(lambda *_, label=label: names.append(label)))
        handles.append(module.register_forward_hook(lambda *_: (names.pop(), None)[1], always_call=True))
    try:
        yield names
    finally:
        for handle in handles:
            handle.remove()


class _Seen(TorchFunctionMode):
    """Writes down the layers of what runs."""

    def __init__(self, names: list[str], trained: dict[str, Tensor], buffers: set[int]) -> None:
        super().__init__()
        self.names, self.layers, self.meets = names, list[Layer](), dict[str, int]()
        self._known, self._buffers = {id(p): name for name, p in trained.items()}, buffers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        note = _NOTES.get(func)
        if note is not None:
            note(self, out, *args, **(kwargs or {}))
        elif _tensors(out) and not all(id(t) in self._buffers for t in _tensors(args)):  # counters of a norm
            raise self.refused(f"{resolve_name(func) or func} is not an operation whose exchange is known")
        return out

    def refused(self, why: str) -> UnsupportedError:
        return UnsupportedError(f"layer {self.names[-1]!r}: {why}; the exchange of this network cannot be planned")

    def add(self, op: str, x: Tensor, out: Tensor, taps: tuple[Taps, ...] = (), **weight: Any) -> None:
        shapes = tuple(x.shape), tuple(out.shape)
        self.layers.append(Layer(self.names[-1], op, *shapes, x.element_size(), x.requires_grad, taps, **weight))

    def uses(self, x: Tensor, *parameters: Tensor | None) -> None:
        """Parameters work on `x`."""
        for p in parameters:
            if p is None or not p.requires_grad:
                continue
            name = self._known.get(id(p))
            if name is None:
                raise self.refused("a weight is computed from others")
            if self.meets.setdefault(name, x.ndim) != x.ndim:
                raise self.refused(f"{name!r} works on activations of {self.meets[name]} and of {x.ndim} dims")


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in (values if isinstance(values, tuple | list) else [values]) if isinstance(value, Tensor)]


def _ints(value: Any, n: int) -> tuple[int, ...]:
    return tuple(value) * (n // len(value)) if isinstance(value, tuple | list) else (value,) * n


def _conv(
    seen: _Seen,
    out: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> None:
    n = weight.ndim - 2
    _batched(seen, input, n)
    stride, dilation = _ints(stride, n), _ints(dilation, n)
    kernel = tuple(weight.shape[2:])
    if padding == "same":
        padding = tuple(d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True))
    padding = _ints(0 if padding == "valid" else padding, n)
    seen.uses(input, weight, bias)
    taps = tuple(map(Taps, kernel, stride, padding, dilation))
    seen.add("convolution", input, out, taps, weight=tuple(weight.shape), groups=groups)


def _pool(op: str, n: int) -> Callable[..., None]:
    def note(
        seen: _Seen,
        out: Tensor,
        input: Tensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        *_: Any,
        **__: Any,
    ) -> None:
        _batched(seen, input, n)
        stride = kernel_size if stride is None or stride in ([], ()) else stride
        taps = (_ints(value, n) for value in (kernel_size, stride, padding, dilation))
        seen.add(op, input, out, tuple(map(Taps, *taps)))

    return note


def _average(n: int) -> Callable[..., None]:
    pool = _pool("avg_pool", n)

    def note(seen: _Seen, out: Tensor, input: Tensor, kernel_size: Any, *args: Any, **kwargs: Any) -> None:
        given = dict(zip(("stride", "padding"), args, strict=False)) | kwargs  # what follows only changes the sums
        pool(seen, out, input, kernel_size, given.get("stride"), given.get("padding", 0))

    return note


def _batched(seen: _Seen, x: Tensor, n: int) -> None:
    if x.ndim != n + 2:
        raise seen.refused(f"an input of shape {tuple(x.shape)} has no batch")


def _flatten(seen: _Seen, out: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> None:
    if out.shape == input.shape:
        return
    if out.ndim != 2 or out.shape[0] != input.shape[0]:
        raise seen.refused(f"a reshape from {tuple(input.shape)} to {tuple(out.shape)} is no flatten into features")
    if input.shape[1] == 1:
        raise seen.refused("a flatten of a single channel keeps its split")
    seen.add("view", input, out)


def _linear(seen: _Seen, out: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    if input.ndim != 2:
        raise seen.refused(f"a fully connected layer on {tuple(input.shape)} instead of samples × features")
    seen.uses(input, weight, bias)


def _nothing(seen: _Seen, out: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> None:
    """Elementwise work: every rank does its own part."""
    if any(isinstance(value, Tensor) for value in (*args, *kwargs.values())):
        raise seen.refused("elementwise work on several tensors may need their parts moved")


_Note = Callable[..., None]
_NOTES: dict[Any, _Note] = {
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), _conv),
    **dict.fromkeys((F.max_pool1d, torch.max_pool1d), _pool("max_pool", 1)),
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d), _pool("max_pool", 2)),
    **dict.fromkeys((F.max_pool3d, torch.max_pool3d), _pool("max_pool", 3)),
    **{pool: _average(n + 1) for n, pool in enumerate((F.avg_pool1d, F.avg_pool2d, F.avg_pool3d))},
    **dict.fromkeys((torch.flatten, Tensor.flatten, Tensor.view, Tensor.reshape, torch.reshape), _flatten),
    F.linear: _linear,
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu, F.leaky_relu, F.relu6, F.elu, F.selu, F.celu, F.gelu), _nothing),
    **dict.fromkeys((F.silu, F.mish, F.softplus, F.hardtanh, F.hardswish, F.hardsigmoid, F.logsigmoid), _nothing),
    **dict.fromkeys((F.dropout, torch.sigmoid, Tensor.sigmoid, torch.tanh, Tensor.tanh, torch.clone), _nothing),
    **dict.fromkeys((Tensor.clone, Tensor.contiguous), _nothing),
}
