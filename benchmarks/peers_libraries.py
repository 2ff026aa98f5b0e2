"""How each library trains the U-Net of peers.py on a volume split in depth over two ranks.

A library is imported only by its own contender, in processes of its own (peers_rank.py).
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

Loss = Callable[[], Tensor]  # forward and loss; of the whole volume, or a rank's share of it


def squares(y: Tensor) -> Tensor:
    """Squares of the output, in fp32 at least."""
    return (y if y.dtype == torch.float64 else y.float()) ** 2


def own_half(x: Tensor) -> Tensor:
    return x.chunk(2, 2)[dist.get_rank()].clone(memory_format=torch.preserve_format)


class Contender:
    """How one library trains the U-Net on a volume split in depth over two ranks."""

    def share(self, model: nn.Module, x: Tensor) -> tuple[nn.Module, Loss]:
        raise NotImplementedError

    def gradient(self, parameter: Tensor) -> Tensor:
        assert parameter.grad is not None
        return parameter.grad

    def global_loss(self, loss: Tensor) -> float:
        return loss.item()


class Halves(Contender):
    """The limit: each rank trains on its half and never talks; "tuned" with Meshwright's choice of kernels."""

    def __init__(self, tuned: bool) -> None:
        self.tuned = tuned

    def share(self, model: nn.Module, x: Tensor) -> tuple[nn.Module, Loss]:
        if self.tuned:
            from spatial import same_kernels

            model = same_kernels(model)
        half = own_half(x)
        return model, lambda: squares(model(half)).mean()


class Meshwright(Contender):
    """As docs/tutorial.md has it: a plan, `parallelize`, `shard`; the loss is the loss of one device."""

    def share(self, model: nn.Module, x: Tensor) -> tuple[nn.Module, Loss]:
        import meshwright as mw

        plan = mw.Plan.uniform(depth=2)
        model, x = mw.parallelize(model, plan, strict=True), mw.shard(x, plan)
        return model, lambda: squares(model(x)).mean()

    def gradient(self, parameter: Tensor) -> Tensor:
        assert parameter.grad is not None
        return parameter.grad.full_tensor()


class DistConv(Contender):
    """LBANN's DistConv: `DistConvDDP` around the module, `DCTensor` around the shard.

    The output stays split and each rank takes its share of the loss, as its users train U-Nets. Its tests bring the
    output to one rank instead (`to_ddp`): an exchange more. `DistConvDDP` adds the gradients of the shards up. On CPUs
    gloo refuses its channels_last halos, so they are sent as views (`send_any_format`).
    """

    def __init__(self, checkout: str) -> None:
        sys.path.insert(0, checkout)
        from distconv import ParallelStrategy

        send_any_format()
        self.strategy = ParallelStrategy(num_shards=2, shard_dim=2, device_type="cpu")

    def share(self, model: nn.Module, x: Tensor) -> tuple[nn.Module, Loss]:
        from distconv import DCTensor, DistConvDDP

        wrapped = DistConvDDP(model, parallel_strategy=self.strategy)
        part = DCTensor.from_shard(own_half(x), self.strategy)
        voxels = 3 * x[0, 0].numel()
        return model, lambda: squares(wrapped(part)).sum() / voxels

    def global_loss(self, loss: Tensor) -> float:
        whole = torch.tensor([loss.item()], dtype=torch.float64)
        dist.all_reduce(whole)
        return whole.item()


class ShardTensor(Contender):
    """NVIDIA PhysicsNeMo's ShardTensor: a plain module, its input a ShardTensor.

    As its training example has it, weights are broadcast once (`sync_module_over_mesh`) and their gradients are
    reduced by autograd. Three things differ on CPUs: its rules are registered by hand, because it does so by itself
    only where CUDA is; the input is made of local parts with `sharding_shapes="chunk"`, because `scatter_tensor` needs
    a `DistributedManager`, which cannot start without an accelerator; and operators of torchvision are declared.
    """

    def __init__(self) -> None:
        declare_torchvision()
        from physicsnemo.domain_parallel import register_custom_ops
        from torch.distributed.device_mesh import init_device_mesh

        if not torch.cuda.is_available():
            register_custom_ops()
        self.mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("domain",))

    def share(self, model: nn.Module, x: Tensor) -> tuple[nn.Module, Loss]:
        from physicsnemo.domain_parallel import ShardTensor as Sharded
        from physicsnemo.domain_parallel import sync_module_over_mesh
        from torch.distributed.tensor import Shard

        sync_module_over_mesh(model, self.mesh)
        part = Sharded.from_local(
            own_half(x), self.mesh, (Shard(2),), sharding_shapes="chunk", global_shape=tuple(x.shape)
        )
        return model, lambda: squares(model(part)).mean()

    def global_loss(self, loss: Tensor) -> float:
        return loss.full_tensor().item()  # type: ignore[attr-defined]


def send_any_format() -> None:
    """Let pairwise messages take channels_last tensors on gloo, which wants contiguous ones: views, no copies."""
    send = dist.batch_isend_irecv

    def send_views(operations: list[dist.P2POp]) -> list[dist.Work]:
        for operation in operations:
            if not operation.tensor.is_contiguous():
                operation.tensor = operation.tensor.movedim(1, -1)
        return send(operations)

    dist.batch_isend_irecv = send_views


def declare_torchvision() -> None:
    """PyPI's torchvision is built for CUDA; beside torch for CPUs its operators are missing and its import fails.

    ShardTensor imports it, and uses none of them here, so it is enough that they have names.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for module in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[module]
        for operator in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, operator):
                signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                torch.library.define(f"torchvision::{operator}", signature)


def contender(name: str, checkout: str) -> Contender:
    match name:
        case "plain halves" | "tuned halves":
            return Halves(tuned=name == "tuned halves")
        case "meshwright":
            return Meshwright()
        case "distconv":
            return DistConv(checkout)
        case "shardtensor":
            return ShardTensor()
    raise ValueError(f"no contender {name!r}")
