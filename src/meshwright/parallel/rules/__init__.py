"""The rules. Importing this package registers them all."""

from meshwright.parallel.rules import conv, many, matmul, pointwise, reduce, shape

__all__ = ["conv", "many", "matmul", "pointwise", "reduce", "shape"]
