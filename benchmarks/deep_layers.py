"""Deep layers of images as matrix products ÷ as torch's own kernels: the table of docs/constants.md.

Each call takes another one of ten weights, as a network calls them: a weight that has just been used lies in the cache.
Two processes do the same at once, as two ranks of a host would; the figures are those of the first.

    python benchmarks/deep_layers.py                 # fp32 and bf16
"""

from __future__ import annotations

import itertools
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from spatial import DTYPES

from meshwright.parallel import matrix_conv
from meshwright.parallel.signature import Conv

# channels in and out, kernel, stride, positions
LAYERS = [
    *((512, 512, 3, 1, at) for at in ((4, 16), (8, 16), (16, 16), (16, 32))),
    *((256, 512, 3, 2, at) for at in ((8, 16), (16, 32))),
    (1024, 1024, 3, 1, (16, 16)),
]
WEIGHTS, WARM, COUNTED = 10, 8, 21
_backward = torch.ops.aten.convolution_backward.default


def seconds(calls: Sequence[Callable[[], object]]) -> float:
    """The median of calls by turns."""
    found = []
    for call in itertools.islice(itertools.cycle(calls), WARM + COUNTED):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return statistics.median(found[WARM:])


def ratios(inside: int, out: int, k: int, s: int, at: tuple[int, int], dtype: torch.dtype) -> list[float]:
    """Output, gradient of the input, gradient of the weight: product ÷ torch's kernel."""

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape).to(dtype=dtype, memory_format=torch.channels_last)

    weights, p = [drawn(out, inside, k, k) for _ in range(WEIGHTS)], k // 2
    x, grad = drawn(1, inside, at[0] * s, at[1] * s), drawn(1, out, *at)
    conv, pads = Conv((s, s), (1, 1), 1), ((p, p), (p, p))

    def torch_s(w: torch.Tensor, of: int) -> object:
        if of == 0:
            return F.conv2d(x, w, None, s, p)
        mask = [of == 1, of == 2, False]
        return _backward(grad, x, w, None, [s, s], [p, p], [1, 1], False, [0, 0], 1, mask)

    def product(w: torch.Tensor, of: int) -> object:
        if of == 0:
            return matrix_conv.forward(x, w, None, conv, pads, at)
        if of == 1:
            return matrix_conv.input_gradient(grad, x.shape, w, conv, pads)
        return matrix_conv.weight_gradient(grad, x, w, conv, pads)

    def of_all(call: Callable[[torch.Tensor, int], object], of: int) -> float:
        return seconds([lambda w=w: call(w, of) for w in weights])

    return [of_all(product, of) / of_all(torch_s, of) for of in range(3)]


def work(shows: bool) -> None:
    """All layers in both types."""
    torch.set_num_threads(1)
    for (name, dtype), layer in itertools.product(DTYPES.items(), LAYERS):
        found = " / ".join(f"{ratio:.2f}" for ratio in ratios(*layer, dtype))
        inside, out, k, s, at = layer
        if shows:
            share = at[0] * at[1] / out
            print(
                f"{name} {inside} → {out}, kernel {k}, stride {s}, {at[0]} × {at[1]} ({share:g}): {found}", flush=True
            )


def main() -> None:
    other = multiprocessing.get_context("spawn").Process(target=work, args=(False,))
    other.start()
    try:
        work(True)
    finally:
        other.kill()
        other.join()


if __name__ == "__main__":
    main()
