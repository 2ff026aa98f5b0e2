"""Meshwright: train an unmodified `torch.nn.Module` on samples larger than one device, with the same result."""

from meshwright import errors
from meshwright.plan.plan import Plan, interval

__version__ = "0.1.0"
__all__ = ["Plan", "errors", "interval"]
