"""One rank of one contender of peers.py, in the contender's own Python; the parent says when it takes a step.

Orders come as lines on stdin, answers leave as lines of JSON on stdout. Nothing of Meshwright is imported for the
peers, and nothing of the peers for anybody else. The network is read from its file, so that an environment without
Meshwright trains the same one.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from peers_libraries import Contender, Loss, contender, squares
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
EXACT_EDGE = 16  # of the volume on which each contender must give the answer of one device in fp64
CONTIGUOUS = " contiguous"  # ends the name of a contender that runs in torch's default format, not in the next one
LAST = torch.channels_last_3d


def unet() -> nn.Module:
    """The benchmark U-Net, without importing the package that it is part of."""
    where = ROOT / "src" / "meshwright" / "models" / "small_unet.py"
    spec = importlib.util.spec_from_file_location("small_unet", where)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.benchmark_unet()


def problem(edge: int, dtype: torch.dtype, memory_format: torch.memory_format = LAST) -> tuple[nn.Module, Tensor]:
    """The same weights and the same volume [1, 4, edge, edge, edge] in every process."""
    torch.manual_seed(0)
    model = unet()
    x = torch.randn(1, 4, edge, edge, edge)
    return model.to(dtype=dtype, memory_format=memory_format), x.to(dtype=dtype, memory_format=memory_format)


def answer_of(model: nn.Module, loss: Loss, how: Contender) -> tuple[float, list[Tensor]]:
    """Loss and gradients of the whole, as one device would have them; collective."""
    model.zero_grad(set_to_none=True)
    value = loss()
    value.backward()
    return how.global_loss(value), [how.gradient(p).detach().double().contiguous() for p in model.parameters()]


def distance(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest |a − b| over the larger of max|b| and a thousandth of the largest gradient of the model."""
    floor = 1e-3 * max(float(b.abs().max()) for b in wanted)
    return max(
        float((a - b).abs().max()) / max(float(b.abs().max()), floor) for a, b in zip(found, wanted, strict=True)
    )


def one_device(edge: int, dtype: torch.dtype, memory_format: torch.memory_format) -> tuple[float, list[Tensor]]:
    """Plain torch on the whole volume, `dtype` the one in which it computes."""
    model, x = problem(edge, dtype, memory_format)
    return answer_of(model, lambda: squares(model(x)).mean(), Contender())


def write_reference(edge: int, dtype_name: str, folder: Path) -> dict[str, Any]:
    """Answers of one device at the timed size, for the contenders to read: in fp32, from weights of the timed dtype.

    The noise of one device is how far its own answer lies off it: in bf16 that of bf16, in fp32 that of another order
    of summation (the other memory format).
    """
    model, x = problem(edge, DTYPES[dtype_name])
    model, x = model.float(), x.float()
    loss, gradients = answer_of(model, lambda: squares(model(x)).mean(), Contender())
    np.savez(folder / "reference.npz", np.float64(loss), *(g.numpy() for g in gradients))
    other = torch.contiguous_format if dtype_name == "fp32" else LAST
    other_loss, other_gradients = one_device(edge, DTYPES[dtype_name], other)
    return {"loss": abs(other_loss - loss) / loss, "gradients": distance(other_gradients, gradients)}


def read_reference(folder: Path) -> tuple[float, list[Tensor]]:
    with np.load(folder / "reference.npz", allow_pickle=False) as file:
        loss, *gradients = (torch.from_numpy(file[f"arr_{index}"]) for index in range(len(file.files)))
    return float(loss), gradients


def check(
    how: Contender, model: nn.Module, loss: Loss, memory_format: torch.memory_format, folder: Path
) -> dict[str, float]:
    """Errors against one device: in fp64 on a small volume, and in the timed dtype at the timed size."""
    small, x = problem(EXACT_EDGE, torch.float64, memory_format)
    exact_loss, exact = answer_of(*how.share(copy.deepcopy(small), x), how)
    wanted_loss, wanted = answer_of(small, lambda: squares(small(x)).mean(), Contender())
    found_loss, found = answer_of(model, loss, how)
    whole_loss, whole = read_reference(folder)
    return {
        "fp64": max(abs(exact_loss - wanted_loss) / wanted_loss, distance(exact, wanted)),
        "loss": abs(found_loss - whole_loss) / whole_loss,
        "gradients": distance(found, whole),
    }


def seconds_of(step: Callable[[], None]) -> float:
    dist.barrier()
    start = time.perf_counter()
    step()
    dist.barrier()
    return time.perf_counter() - start


def serve(name: str, edge: int, dtype: str, rank: int, folder: Path, checkout: str, say: Callable[[Any], None]) -> None:
    """Join the other rank, build, and obey: `check` → errors, `step` → seconds, end of input → leave."""
    store = dist.FileStore(str(folder / name.replace(" ", "-")), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    how = contender(name.removesuffix(CONTIGUOUS), checkout)
    memory_format = torch.contiguous_format if name.endswith(CONTIGUOUS) else LAST
    model, loss = how.share(*problem(edge, DTYPES[dtype], memory_format))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        optimizer.step()

    say({"torch": torch.__version__})
    for order in sys.stdin:
        if order.strip() == "check":
            say(check(how, model, loss, memory_format, folder))
        else:
            say({"seconds": seconds_of(step)})
    dist.destroy_process_group()


def main() -> None:
    name, edge, dtype, rank, folder, checkout = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer

    def say(value: Any) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    torch.set_num_threads(1)
    try:
        if name == "one device":
            say(write_reference(int(edge), dtype, Path(folder)))
        else:
            serve(name, int(edge), dtype, int(rank), Path(folder), checkout, say)
    except Exception as error:  # noqa: BLE001 (a peer that cannot run is a line of the table, whatever it raises)
        traceback.print_exc()
        say({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})


if __name__ == "__main__":
    main()
