"""The rules. Importing this package registers them all."""

from meshwright.parallel.rules import (
    conv,
    linear,
    many,
    matmul,
    norm,
    pointwise,
    reduce,
    shape,
    special,
)

__all__ = [
    "conv",
    "linear",
    "many",
    "matmul",
    "norm",
    "pointwise",
    "reduce",
    "shape",
    "special",
]
