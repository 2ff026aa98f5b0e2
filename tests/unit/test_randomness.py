"""Random numbers are a function of seed, call and global position: of nothing else."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import meshwright as mw
from meshwright.errors import UnsupportedError
from meshwright.parallel.noise import blocks, digits_of, fill, mix, normal, unit, words
from meshwright.plan.geometry import Interval, chunks

CPU = torch.device("cpu")
ONE = mw.Plan.uniform(data=1)


def whole(shape: tuple[int, ...]) -> tuple[Interval, ...]:
    return tuple(Interval(0, size) for size in shape)


@pytest.mark.parametrize("parts", [(1, 1, 1), (2, 2, 1), (1, 3, 2), (4, 1, 5)])
def test_parts_drawn_alone_are_the_whole(parts: tuple[int, ...]) -> None:
    shape = (3, 5, 7)
    full = words(11, shape, whole(shape), CPU)
    for box in itertools.product(*(chunks(size, n) for size, n in zip(shape, parts, strict=True))):
        index = tuple(slice(span.lo, span.hi) for span in box)
        assert torch.equal(words(11, shape, box, CPU), full[index])
        part = torch.empty_like(full[index])
        assert torch.equal(fill(part, 11, shape, box, lambda bits, block: bits), full[index])


def test_words_are_those_of_splitmix64() -> None:
    """The first numbers of the published generator with seed 1234567 (its state is advanced before each)."""
    gamma = 0x9E3779B97F4A7C15
    got = words(1234567 + gamma, (3,), (Interval(0, 3),), CPU)
    assert [int(v) % 2**64 for v in got] == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert mix(1234567) == 6457827717110365317 >> 1


@pytest.mark.parametrize("shape", [(), (0, 4), (1,), (10,), (3, 4, 5), (2, 1, 7, 3)])
@pytest.mark.parametrize("limit", [1, 4, 16, 1000])
def test_blocks_cover_each_position_once(shape: tuple[int, ...], limit: int) -> None:
    count = torch.zeros(shape)
    for index in blocks(shape, limit):
        count[index] += 1
        assert count[index].numel() <= max(limit, shape[-1] if shape else 1)
    assert bool((count == 1).all())


def test_blocks_do_not_change_the_numbers() -> None:
    shape = (3, 300, 300)
    out = fill(torch.empty(shape, dtype=torch.int64), 5, shape, whole(shape), lambda bits, index: bits)
    assert torch.equal(out, words(5, shape, whole(shape), CPU))
    permuted = torch.empty((300, 300, 3), dtype=torch.int64).permute(2, 0, 1)
    assert torch.equal(fill(permuted, 5, shape, whole(shape), lambda bits, index: bits), out)


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def test_moments_and_correlations() -> None:
    shape = (64, 64, 64)
    n = math.prod(shape)
    bound = 5 / math.sqrt(n)  # five standard errors
    first, second = (words(mix(call), shape, whole(shape), CPU) for call in (1, 2))
    u, z = unit(first), normal(first)
    assert abs(float(u.mean()) - 0.5) < bound * math.sqrt(1 / 12)
    assert abs(float(u.var()) - 1 / 12) < bound * math.sqrt(1 / 180)
    assert abs(float(z.mean())) < bound
    assert abs(float(z.var()) - 1) < bound * math.sqrt(2)
    assert abs(float((z**4).mean()) - 3) < bound * math.sqrt(96)
    for dim in range(3):
        assert abs(correlation(u.narrow(dim, 0, 63), u.narrow(dim, 1, 63))) < bound
    assert abs(correlation(u, unit(second))) < bound
    for bit in range(64):
        assert abs(float(((first >> bit) & 1).double().mean()) - 0.5) < bound / 2 * 1.2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_uniform_never_reaches_one(dtype: torch.dtype) -> None:
    highest = torch.tensor([-1])  # all bits set
    assert float(unit(highest, digits_of(dtype)).to(dtype)) < 1
    assert bool(normal(torch.tensor([-1, 0, 1 << 62])).isfinite().all())


class Noisy(nn.Module):
    def __init__(self, how: str = "plain") -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.how = how

    def body(self, x: torch.Tensor) -> torch.Tensor:
        x = F.dropout(x * self.scale, 0.4)
        return F.dropout(x * torch.rand_like(x) * torch.rand(x.shape[-1]), 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "plain":
            return self.body(x)
        return checkpoint(self.body, x, use_reentrant=self.how == "reentrant")


def run(how: str = "plain", seed: int = 3, generator_seed: int = 0) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The outputs of two forward passes, and the gradient of the input of the second."""
    torch.manual_seed(generator_seed)
    model = mw.parallelize(Noisy(how), ONE, strict=True, seed=seed)
    x = mw.shard(torch.ones(2, 3, 8, 8, 8), ONE).requires_grad_()
    first, second = model(x), model(x)
    second.sum().backward()
    return [first.full_tensor().detach(), second.full_tensor().detach()], x.grad.full_tensor()


def test_numbers_depend_on_seed_and_call_alone() -> None:
    (first, second), _ = run()
    (again, _), _ = run(generator_seed=99)
    (other, _), _ = run(seed=4)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("how", ["reentrant", "not reentrant"])
def test_checkpoint_recomputes_the_same_numbers(how: str) -> None:
    plain, plain_grad = run()
    kept, grad = run(how)
    assert torch.equal(kept[1], plain[1])
    assert torch.equal(grad, plain_grad)


class Deep(nn.Module):
    """A checkpoint around modules: their layers, hooks and rules run again inside backward."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(nn.Dropout(0.3), nn.Conv3d(2, 2, 3, padding=1), nn.Dropout3d(0.3))
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) if self.reentrant is None else checkpoint(self.inner, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_of_modules(reentrant: bool) -> None:
    grads = []
    for how in (None, reentrant):
        model = mw.parallelize(Deep(how), ONE, strict=True)
        x = mw.shard(torch.ones(2, 2, 6, 6, 6), ONE).requires_grad_()
        model(x).square().sum().backward()
        grads.append([x.grad.full_tensor(), *(p.grad.full_tensor() for p in model.parameters())])
    for plain, recomputed in zip(*grads, strict=True):
        assert torch.equal(plain, recomputed)


def _around_it_all(reentrant: bool, draws: bool) -> list[float]:
    """Of two calls of a checkpointed module: the sum of a result, which is linear in the last weight, less what the
    gradient of that weight makes of it; nothing if both came of the same mask."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Dropout(), nn.Conv2d(8, 4, 1, bias=False)).double()
    plan = mw.Plan.uniform()
    model, found = mw.parallelize(model, plan), []
    x = mw.shard(torch.randn(2, 3, 6, 6, dtype=torch.float64), plan).requires_grad_()
    results = []
    for _ in range(2):
        if draws:
            torch.rand(())
        results.append(checkpoint(model, x, use_reentrant=reentrant).sum())
    weight = model[2].weight
    for y in results:
        weight.grad = None
        y.backward()
        found.append(float(((weight * weight.grad).sum() - y).detach().full_tensor()))
    return found


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_of_the_whole_module(reentrant: bool) -> None:
    """It restores the state outside, by which the call is found; two calls that began with the same are refused."""
    assert max(map(abs, _around_it_all(reentrant, draws=True))) < 1e-12
    with pytest.raises(UnsupportedError, match="which of them is meant"):
        _around_it_all(reentrant, draws=False)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_outside_a_module(reentrant: bool) -> None:
    x = mw.shard(torch.ones(2, 3, 8, 8, 8), ONE).requires_grad_()
    y = checkpoint(lambda v: F.dropout(F.dropout(v.exp(), 0.4).sin(), 0.4), x, use_reentrant=reentrant)
    y.sum().backward()
    assert torch.equal(y.full_tensor() != 0, x.grad.full_tensor() != 0)


def test_forward_leaves_the_global_generator_alone() -> None:
    model = mw.parallelize(Noisy(), ONE)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    model(mw.shard(torch.ones(2, 3, 4, 4, 4), ONE))
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_keeps_mean_and_share() -> None:
    x = mw.shard(torch.ones(1, 4, 32, 32, 32), ONE)
    y = F.dropout(x, 0.25).full_tensor()
    assert y.unique().tolist() == pytest.approx([0, 4 / 3])
    assert abs(float((y == 0).float().mean()) - 0.25) < 5 * math.sqrt(0.25 * 0.75 / y.numel())
    channels = F.dropout3d(x, 0.5).full_tensor().flatten(2)
    assert torch.equal(channels.amin(2), channels.amax(2))
    assert F.dropout(x, 1.0).full_tensor().abs().max() == 0
    assert torch.equal(F.dropout(x, 0.5, training=False).full_tensor(), x.full_tensor())


def test_a_generator_that_is_passed_decides() -> None:
    x = mw.shard(torch.zeros(1, 4, 8, 8, 8), ONE)
    a, b = (torch.empty_like(x).normal_(generator=torch.Generator().manual_seed(5)).full_tensor() for _ in range(2))
    assert torch.equal(a, b)
