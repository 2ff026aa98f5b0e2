"""The planned exchange: CosmoFlow 512³ on up to 512 ranks against a closed form and against explicit positions."""

from __future__ import annotations

import time
from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import meshwright as mw
from exchange_counts import Count, Step, by_voxel, cosmoflow, counted, even, is_even, places, switch
from meshwright.errors import UnsupportedError
from meshwright.models.cosmoflow import CosmoFlow
from meshwright.models.small_unet import benchmark_unet
from meshwright.plan import exchange
from meshwright.plan.exchange import Exchange, RankStep, planned
from meshwright.plan.geometry import Interval, chunks, reached, window
from meshwright.plan.layers import Network, layers_of

# depth × height × width, and how many of the 14 layers have even shards there: those the closed form is for
SPLITS = {
    (8, 1, 1): 11,  # until pooling makes 4 planes of 8
    (4, 2, 1): 13,
    (2, 2, 2): 14,
    (64, 1, 1): 6,  # until the fourth convolution makes 32 planes of 64
    (8, 8, 1): 11,
    (4, 4, 4): 13,
    (512, 1, 1): 1,  # until the first pooling makes 256 planes of 512
    (32, 16, 1): 7,
    (8, 8, 8): 11,
}
STEPS = cosmoflow(512, width=16, pools=7)
CONVOLUTIONS = 27 * 16 * (4 * 1 + 16 * (1 * 2 + 2 * 4 + 4 * 8 + 8 * 16 + 16 * 16 + 16 * 16))  # weights


def plan_of(parts: tuple[int, ...]) -> mw.Plan:
    return mw.Plan.uniform(**dict(zip(("depth", "height", "width"), parts, strict=True)))


@lru_cache
def network() -> Network:
    with torch.device("meta"):
        model = CosmoFlow(512)
    return layers_of(model, torch.empty((1, 4, 512, 512, 512), device="meta"))


@lru_cache
def planned_for(parts: tuple[int, ...]) -> tuple[RankStep, ...]:
    return planned(network(), plan_of(parts))


def as_count(found: Exchange) -> Count:
    return Count(*found.forward, *found.backward)


def test_the_layers_are_those_of_the_published_network() -> None:
    *windows, switch = network().layers
    assert [(w.name, w.op, w.shape, w.taps[0].stride) for w in windows] == [
        (s.name, s.kind, (1, s.channels, *s.space), s.stride) for s in STEPS
    ]
    assert (switch.op, switch.shape, switch.out) == ("view", (1, 256, 2, 2, 2), (1, 2048))


@pytest.mark.parametrize("parts", SPLITS, ids=str)
def test_every_rank_sends_what_the_closed_form_says(parts: tuple[int, ...]) -> None:
    """Where shards are even; elsewhere the next test counts."""
    fit = [index for index, step in enumerate(STEPS) if is_even(step, parts)]
    assert len(fit) == SPLITS[parts]
    for rank, place in enumerate(places(parts)):
        for index in fit:
            assert as_count(planned_for(parts)[rank].exchanges[index]) == even(STEPS[index], parts, place)


@pytest.mark.parametrize("parts", SPLITS, ids=str)
def test_every_rank_sends_what_explicit_positions_say(parts: tuple[int, ...]) -> None:
    for index, step in enumerate(STEPS):
        found = [as_count(rank.exchanges[index]) for rank in planned_for(parts)]
        assert found == counted(step, parts), step


@pytest.mark.parametrize("parts", SPLITS, ids=str)
def test_the_switch_and_the_gradients_have_closed_forms(parts: tuple[int, ...]) -> None:
    for rank, place in zip(planned_for(parts), places(parts), strict=True):
        assert as_count(rank.exchanges[-1]) == switch(256, parts, place)
        ranks = len(planned_for(parts))
        short = 2 * (ranks - 1) * CONVOLUTIONS * 4 / ranks - rank.reduction.nbytes  # each bucket is rounded down
        assert 0 <= short < rank.reduction.messages


@pytest.mark.parametrize("parts", SPLITS, ids=str)
def test_what_travels_forward_travels_back(parts: tuple[int, ...]) -> None:
    for index, step in enumerate(STEPS):
        exchanges = [rank.exchanges[index] for rank in planned_for(parts)]
        forward, backward = (
            tuple(map(sum, zip(*sent, strict=True)))
            for sent in ([e.forward for e in exchanges], [e.backward for e in exchanges])
        )
        assert backward == (forward if step.trains_input else (0, 0))


def test_512_ranks_are_planned_in_seconds() -> None:
    layers = network()
    exchange._cut.cache_clear()
    begin = time.process_time()
    for parts in ((512, 1, 1), (32, 16, 1), (8, 8, 8)):
        planned(layers, plan_of(parts))
    assert time.process_time() - begin < 10


@pytest.mark.parametrize("kind", ["convolution", "avg_pool"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("parts", [(2, 2, 2), (4, 2, 1), (3, 1, 2)], ids=str)
def test_what_is_sent_is_what_is_read(kind: str, stride: int, parts: tuple[int, ...]) -> None:
    """Corners included, voxel by voxel: every rank ends up with the voxels its outputs read, each received once."""
    step = Step("layer", kind, 1, (8, 8, 8), stride, itemsize=1)
    for (reads, held, sent), count in zip(by_voxel(step, parts), counted(step, parts), strict=True):
        assert held == reads
        if kind == "avg_pool":  # dims that are whole are pooled first, and what crosses the cuts is shorter along them
            for dim in (dim for dim, p in enumerate(parts) if p == 1):
                sent = sent * step.outputs(dim) // step.space[dim]
        assert sent == count.forward


@st.composite
def chains(draw: st.DrawFn) -> tuple[list[Step], int]:
    """A convolution and a pooling on an uneven volume, and a batch size."""
    space = tuple(draw(st.lists(st.integers(5, 14), min_size=1, max_size=3)))
    steps: list[Step] = []
    for kind in ("convolution", draw(st.sampled_from(["avg_pool", "max_pool"]))):
        kernel, dilation = draw(st.integers(1, 4)), draw(st.integers(1, 2)) if kind != "avg_pool" else 1
        most = kernel // 2 if kind != "convolution" else 3
        step = Step("", kind, 3, space, draw(st.integers(1, 4)), kernel, draw(st.integers(0, most)), dilation)
        if min(step.outputs(dim) for dim in range(len(space))) < 1:
            break
        if kind == "avg_pool" and kernel > min(space):  # AvgPool3d refuses, whatever the padding
            break
        steps.append(step)
        space = tuple(step.outputs(dim) for dim in range(len(space)))
    return steps, draw(st.integers(1, 3))


@settings(max_examples=60, deadline=None)
@given(chains(), st.tuples(*(st.integers(1, 5) for _ in range(3))), st.booleans())
def test_any_chain_is_planned_as_positions_say(
    drawn: tuple[list[Step], int], parts: tuple[int, int, int], trains_input: bool
) -> None:
    steps, batch = drawn
    if not steps:
        return
    n = len(steps[0].space)
    kinds = {
        "convolution": (nn.Conv1d, nn.Conv2d, nn.Conv3d)[n - 1],
        "avg_pool": (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[n - 1],
        "max_pool": (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[n - 1],
    }
    layers: list[nn.Module] = []
    for step in steps:
        given_: dict[str, int] = {"stride": step.stride, "padding": step.padding}
        if step.kind != "avg_pool":
            given_["dilation"] = step.dilation
        lead = (3, 3) if step.kind == "convolution" else ()
        layers += [kinds[step.kind](*lead, step.kernel, **given_), nn.ReLU()]
    x = torch.empty((batch, 3, *steps[0].space), device="meta", requires_grad=trains_input)
    found = layers_of(nn.Sequential(*layers), x)
    assert [layer.trains_input for layer in found.layers] == [trains_input, True][: len(steps)]
    ranks = planned(found, mw.Plan.uniform(**dict(zip(("width", "height", "depth")[:n], parts[:n], strict=True))))
    for index, step in enumerate(steps):
        expected = counted(step, parts[:n][::-1], batch)
        if not found.layers[index].trains_input:
            expected = [Count(*count[:2]) for count in expected]
        assert [as_count(rank.exchanges[index]) for rank in ranks] == expected


@given(
    st.integers(1, 40),
    st.integers(1, 9),
    st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(0, 5), st.integers(1, 4)),
)
def test_a_window_is_from_the_first_tap_inside_to_the_last(
    size: int, parts: int, options: tuple[int, int, int, int]
) -> None:
    """And what is read before and after the input makes up the rest of the taps' reach."""
    kernel, stride, padding, dilation = options
    outputs = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    for out in chunks(max(0, outputs), parts):
        places = [o * stride - padding + k * dilation for o in range(out.lo, out.hi) for k in range(kernel)]
        reach = set(range(min(places), max(places) + 1)) if places else set()
        inside, before, after = reached(out, size, kernel, stride, padding, dilation)
        assert set(range(inside.lo, inside.hi)) == reach & set(range(size))
        assert before + after + inside.size == len(reach)
        assert window(out, size, kernel, stride, padding, dilation) == inside
        if inside.size:
            assert before == sum(place < 0 for place in reach)


def test_no_outputs_read_nothing() -> None:
    assert window(Interval(3, 3), 10, 3, 1, 1, 1) == Interval(0, 0)


def test_buckets_fill_from_the_end() -> None:
    """Small models have eight or so, large ones buckets of 8 MiB; the last parameter is in the first."""
    assert exchange.buckets([]) == []
    assert exchange.buckets([10, 10]) == [0, 0]
    assert exchange.buckets([1 << 20] * 32) == [bucket for bucket in range(7, -1, -1) for _ in range(4)]
    assert exchange.buckets([9 << 20, 9 << 20, 200 << 20]) == [2, 1, 0]


def test_a_batch_split_reduces_the_fully_connected_layers_too() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Flatten(), nn.Linear(2 * 8 * 8, 5))
    found = layers_of(model, torch.empty(4, 1, 8, 8))
    (first, *_) = planned(found, mw.Plan.uniform(data=2, height=2))
    conv, linear = 2 * 9 + 2, 2 * 64 * 5 + 5
    assert first.reduction == (2 * 3 * conv * 4 // 4 + 2 * 1 * linear * 4 // 2, 2)
    assert first.forward == (2 * 8 * 4 + 2 * 2 * 4 * 8 * 4, 2)  # one row of each of 2 samples, then half of each


@pytest.mark.parametrize(
    ("model", "shape", "words"),
    [
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), (1, 1, 8, 8), "layer '1': .*batch_norm"),
        (nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular")), (1, 1, 8, 8), "layer '0': .*pad"),
        (nn.Sequential(nn.Upsample(scale_factor=2)), (1, 1, 8, 8), "layer '0': .*interpolate"),
        (nn.Sequential(nn.MaxPool2d(2, return_indices=True)), (1, 1, 8, 8), "layer '0': .*max_pool2d"),
        (nn.Sequential(nn.Conv2d(1, 2, 3)), (1, 8, 8), "layer '0': .*no batch"),
        (nn.Sequential(nn.Unflatten(1, (2, 2))), (1, 4, 8, 8), "layer '0'"),
        (nn.Sequential(nn.Flatten()), (1, 1, 8, 8), "single channel"),
        (nn.Sequential(nn.Linear(8, 2)), (1, 1, 8, 8), "fully connected"),
        (benchmark_unet(), (1, 4, 8, 8, 8), "conv_transpose3d"),
    ],
    ids=["norm", "pad", "resize", "indices", "batch", "reshape", "channel", "linear", "unet"],
)
def test_what_is_not_known_is_refused_by_name(model: nn.Module, shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        layers_of(model, torch.empty(shape))
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


def test_computed_weights_are_refused() -> None:
    model = nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 2, 3))
    with pytest.raises(UnsupportedError, match="weight_norm"):
        layers_of(model, torch.empty(1, 1, 8, 8))


def test_the_module_stays_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())
    before = {name: (id(p), p.device.type, p.clone()) for name, p in model.named_parameters()}
    layers_of(model, torch.ones(1, 1, 8, 8))
    after = {name: (id(p), p.device.type, p.clone()) for name, p in model.named_parameters()}
    assert all(before[n][:2] == after[n][:2] and before[n][2].equal(after[n][2]) for n in before)
