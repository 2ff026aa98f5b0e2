"""Which arithmetic `train.precision = auto` means on this machine, and in what each one keeps weights."""

from __future__ import annotations

from dataclasses import replace

import torch

from meshwright.cluster.machine import describe
from meshwright.config import Config

DTYPE = {"bf16": torch.float32, "fp32": torch.float32, "fp64": torch.float64}  # of weights; bf16 means autocast
# Without such instructions bf16 is emulated: measured 15 to 20 × slower than fp32.
_BF16 = {"avx512-bf16", "amx-bf16", "arm-bf16"}


def resolve(config: Config) -> Config:
    """`config` with `auto` replaced: bf16 where the GPU or the processor computes in it, else fp32."""
    if config.train.precision != "auto":
        return config
    fast = (
        torch.cuda.is_bf16_supported() if torch.cuda.is_available() else bool(_BF16 & {*describe()["instruction_sets"]})
    )
    return replace(config, train=replace(config.train, precision="bf16" if fast else "fp32"))
