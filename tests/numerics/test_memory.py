"""Activation memory of a rank: its share of one device's peak plus the halos, within 5 %.

The instrument: torch's own CPU allocator reports every allocation and release to `torch.profiler` (`profile_memory`);
the running sum of those bytes, from after construction and loading to the end of a step, has its peak here. That
counts every tensor exactly, intermediate and saved ones alike, and unlike the resident size of the process it is not
blurred by freed pages, code and library scratch. Every measurement runs in processes of its own.
"""

from __future__ import annotations

import pytest
import torch
from harness import plan_of
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import meshwright as mw
from meshwright.models.small_unet import SmallUNet, benchmark_unet

SHAPE = (1, 4, 48, 48, 48)  # the benchmark U-Net at half its size, in its format: channels_last_3d
ALLOWED = 1.05


def _model() -> SmallUNet:
    torch.manual_seed(0)
    return benchmark_unet().to(memory_format=torch.channels_last_3d)


def _step(module: nn.Module, x: Tensor) -> None:
    (module(x) ** 2).mean().backward()


def peak_bytes(module: nn.Module, x: Tensor) -> int:
    """The largest sum of live bytes above those that live at the start, over one step."""
    _step(module, x)  # the first step makes what stays: gradients, buckets, primitives
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        _step(module, x)
    events = [event for event in measured.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    assert len(events) > 50, "the profiler saw no allocations"
    return peak


def measure(name: str) -> int:
    """On one rank: the peak of a step of the model under a plan; under "plain" that of torch alone."""
    torch.set_num_threads(1)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).to(memory_format=torch.channels_last_3d)
    if name == "plain":
        return peak_bytes(_model(), x)
    plan = plan_of(name)
    module = mw.parallelize(_model(), plan, strict=True)
    return peak_bytes(module, mw.shard(x, plan))


def halo_bytes(name: str) -> int:
    """Closed form: the planes of the inputs of all 3³ convolutions that a middle rank holds of its neighbours."""
    plan, total = plan_of(name), 0

    def count(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv3d) and module.kernel_size == (3, 3, 3):
            shape = args[0].shape
            own = list(shape[2:])
            for axis, dim in zip(plan.axes, plan.dims(5), strict=True):
                if dim is not None:
                    own[dim - 2] //= axis.size
            wide = [o + min(2, axis_size(plan, i) - 1) for i, o in enumerate(own)]
            volume = [w[0] * w[1] * w[2] for w in (wide, own)]
            total += shape[1] * (volume[0] - volume[1]) * args[0].element_size()

    model = _model()
    for module in model.modules():
        module.register_forward_hook(count)
    model(torch.zeros(SHAPE))
    return total


def axis_size(plan: mw.Plan, spatial: int) -> int:
    """How many parts a spatial dim is split into."""
    sizes = [axis.size for axis, dim in zip(plan.axes, plan.dims(5), strict=True) if dim == spatial + 2]
    return sizes[0] if sizes else 1


@pytest.fixture(scope="module")
def whole() -> int:
    return mw.launch(measure, ranks=1, args=("plain",), threads=1)[0]


@pytest.mark.parametrize("name", ["one", "d2", "d4", "d2h2"])
def test_a_rank_holds_its_share(name: str, whole: int) -> None:
    """Peak of every rank ≤ 1.05 × (whole / ranks + halos)."""
    ranks = plan_of(name).ranks
    peaks = mw.launch(measure, ranks=ranks, args=(name,), threads=1)
    ideal = whole / ranks + halo_bytes(name)
    ratio = max(peaks) / ideal
    print(f"\n{name}: peaks {peaks}, whole {whole}, halos {halo_bytes(name)}, ratio {ratio:.3f}")
    assert ratio <= ALLOWED, f"{name}: peak {max(peaks)} bytes, ideal {ideal:.0f} (ratio {ratio:.3f})"
    assert min(peaks) > 0.5 * whole / ranks, "the instrument missed allocations"
