"""What mesh tensors answer by themselves, without a rule: torch's own getters would come by `__torch_function__`, at
twenty times the cost, and optimisers and modules ask each tensor several times a step."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor._dtensor_spec import DTensorSpec

from meshwright.errors import UnsupportedError
from meshwright.parallel.layout import Placements

_grad = torch._C.TensorBase.__dict__["grad"]


class Answers:
    """The questions that are asked of any tensor, and of a DTensor."""

    _local_tensor: torch.Tensor
    _spec: DTensorSpec
    _keeper: Any = None  # of a gradient that is retained on the part (see history.py)

    def __repr__(self, *, tensor_contents: object = None) -> str:
        kind = type(self).__name__
        axes = self._spec.mesh.mesh_dim_names or ()
        places = ", ".join(f"{name}: {p}" for name, p in zip(axes, self._spec.placements, strict=False))
        shape = tuple(self._spec.shape)
        return f"{kind}(shape={shape}, dtype={self._local_tensor.dtype}, {places}, local={self._local_tensor})"

    @property
    def shape(self) -> torch.Size:
        """The global shape."""
        return self._spec.shape

    @property
    def ndim(self) -> int:
        """The number of dims."""
        return len(self._spec.shape)

    def dim(self) -> int:
        """The number of dims."""
        return len(self._spec.shape)

    @property
    def is_sparse(self) -> bool:
        """Whether the part is (optimisers ask that of every gradient)."""
        return self._local_tensor.is_sparse

    @property
    def dtype(self) -> torch.dtype:
        """The type of the numbers."""
        return self._local_tensor.dtype

    @property
    def device(self) -> torch.device:
        """That of this rank's part."""
        return self._local_tensor.device

    @property
    def device_mesh(self) -> DeviceMesh:
        """The mesh of ranks."""
        return self._spec.mesh

    @property
    def placements(self) -> Placements:
        """For each mesh axis: Shard(dim), Replicate or Partial."""
        return tuple(self._spec.placements)

    @property
    def grad(self) -> Any:
        """The gradient, if this is a leaf or retains it."""
        if self._keeper is not None:
            return self._keeper.gradient()
        with torch._C.DisableTorchFunctionSubclass():
            return _grad.__get__(self)

    @grad.setter
    def grad(self, value: Any) -> None:
        if self._keeper is not None:
            self._keeper.set(value)
            return
        with torch._C.DisableTorchFunctionSubclass():
            _grad.__set__(self, value)

    @grad.deleter
    def grad(self) -> None:
        self.grad = None

    def full_tensor(self, *, grad_placements: object = None) -> torch.Tensor:
        """The whole value on every rank as a plain tensor; differentiable, and collective where it is split."""
        from meshwright.parallel.parts import to_local
        from meshwright.parallel.redistribute import replicate

        return to_local(replicate(self), direct=False)

    def to_local(self, *, grad_placements: object = None) -> torch.Tensor:
        """This rank's part as a plain tensor; its gradient is the gradient of that part."""
        from meshwright.parallel.parts import to_local

        return to_local(self, direct=False)  # a tensor of its own, whatever the user does with it

    def redistribute(self, device_mesh: Any = None, placements: Any = None, **options: Any) -> Any:
        """The same value, placed otherwise on the same mesh; differentiable."""
        from meshwright.parallel.redistribute import redistribute

        if device_mesh is not None and device_mesh != self._spec.mesh:
            raise UnsupportedError("redistribute: the tensor cannot move to another mesh; use the mesh it is on")
        return redistribute(self, tuple(self._spec.placements if placements is None else placements))

    def tolist(self) -> Any:
        """The global values as nested lists."""
        return self.full_tensor().detach().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """The global value as an array (collective where the tensor is split)."""
        return self.full_tensor().numpy(force=force)
