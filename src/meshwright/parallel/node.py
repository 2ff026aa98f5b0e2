"""Steps of the graph that rules make: torch's `Function` without the Python that serves `torch.func`.

Rules refuse the transforms of `torch.func` before (`functions.as_mesh`), so a step is applied as torch's C++ does, in
60 % of the time of an empty one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import Function


class Node(Function):
    """A `Function` whose `apply` takes positional arguments alone."""

    apply: Any = torch._C._FunctionBase.__dict__["apply"]
