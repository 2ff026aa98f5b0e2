"""Imports run one way through the rooms, and importing the package costs little and does nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import meshwright

SOURCE = Path(meshwright.__file__).parent
# A room may import itself and any room of an earlier row. `models` know nothing of the rest.
ROWS = [
    ["errors", "models"],
    ["strict"],
    ["config"],
    ["cluster", "graph"],
    ["plan"],
    ["parallel"],
    ["sync"],
    ["data", "checkpoint", "guard"],
    ["train"],
    ["report"],
    ["cli"],
]
ROW = {room: index for index, row in enumerate(ROWS) for room in row}
MOST_TIMES_TORCH = 2.0
ROUNDS = 5


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and room of every import of the package, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, *rest = name.split(".")
            if package == "meshwright" and rest:
                yield node.lineno, rest[0]


def violations(room: str, tree: ast.AST) -> list[tuple[int, str]]:
    # a name that is no room (`__version__`) comes from the package itself
    return [(line, other) for line, other in imported(tree) if other != room and ROW.get(other, 0) >= ROW[room]]


def rooms() -> Iterator[tuple[str, Path]]:
    for file in sorted(SOURCE.rglob("*.py")):
        parts = file.relative_to(SOURCE).with_suffix("").parts
        if parts not in {("__init__",), ("__main__",)}:
            yield parts[0], file


def test_every_room_has_a_row() -> None:
    assert {room for room, _ in rooms()} <= set(ROW)


def test_imports_run_one_way() -> None:
    found = [
        f"{file.relative_to(SOURCE)}:{line}: {room} imports {other}"
        for room, file in rooms()
        for line, other in violations(room, ast.parse(file.read_text(encoding="utf-8")))
    ]
    assert found == []


@pytest.mark.parametrize(
    ("room", "code"),
    [
        ("plan", "from meshwright.parallel.mesh import x"),
        ("data", "import meshwright.checkpoint.write"),
        ("models", "def f():\n    from meshwright.plan.plan import Plan"),
        ("cluster", "from meshwright import train"),
    ],
)
def test_a_wrong_way_is_found(room: str, code: str) -> None:
    assert violations(room, ast.parse(code))


def test_the_plan_knows_no_torch_distributed() -> None:
    for file in (SOURCE / "plan").rglob("*.py"):
        assert "torch.distributed" not in ast.unparse(ast.parse(file.read_text(encoding="utf-8"))).replace(
            "Imports no torch.distributed", ""
        ), file


def import_s(module: str) -> float:
    """Processor seconds of importing `module` in a fresh process: other work on the machine does not count."""
    code = f"import time; begin = time.process_time(); import {module}; print(time.process_time() - begin)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return float(done.stdout)


def test_importing_takes_less_than_twice_torch() -> None:
    torch_s, ours_s = [], []
    for _ in range(ROUNDS):
        torch_s.append(import_s("torch"))
        ours_s.append(import_s("meshwright"))
        if min(ours_s) < MOST_TIMES_TORCH * min(torch_s):
            return
    pytest.fail(f"import meshwright took {min(ours_s):.2f} s, import torch {min(torch_s):.2f} s")
