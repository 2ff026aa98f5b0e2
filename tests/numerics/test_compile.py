"""`torch.compile` of a parallelized module is refused with the reason, and the module stays usable."""

from __future__ import annotations

import warnings

import torch
from torch import nn

import meshwright as mw


def compiled(way: str) -> str:
    """What a compiled module says; then the module itself gives the answer of one device."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(), nn.Conv3d(4, 2, 1)).double()
    x = torch.randn(1, 1, 6, 5, 4, dtype=torch.float64)
    with torch.no_grad():
        want = plain(x)
    plan = mw.Plan.uniform(depth=2)
    model = mw.parallelize(plain, plan)
    parts = mw.shard(x, plan)
    said = "nothing"
    try:
        if way == "function":
            torch.compile(model)(parts)
        else:
            model.compile()
            model(parts)
    except Exception as error:  # noqa: BLE001  (torch wraps the refusal in an error of its own)
        said = str(error)
    model._compiled_call_impl = None
    torch.testing.assert_close(model(parts).full_tensor(), want, rtol=1e-10, atol=1e-12)
    return said


def test_compiling_is_refused_with_the_reason() -> None:
    """Both forms."""
    for way in ("function", "method"):
        for said in mw.launch(compiled, ranks=2, args=(way,), threads=1):
            assert "torch.compile of a parallelized module is not supported" in said, said
