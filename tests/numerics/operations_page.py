"""Writes docs/operations.md from the registered rules, their docstrings, and the cases that reach them.

    python tests/numerics/operations_page.py            writes the page
    python tests/numerics/operations_page.py --check    ends with 1 if the page is not what would be written

Which rules a case reaches is seen, not declared: every case runs on one rank with the tables of rules watched.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from cases import OPERATIONS as CASES
from cases_fallback import FALLBACKS
from drawn_strategies import SHARES
from harness import Case, plan_of, run_parallel
from operations_costs import COSTS, Cost
from test_programs import FULL, SPLIT_SHARE
from test_programs import ORDINARY as PROGRAMS
from test_properties import ORDINARY as PROPERTIES

from meshwright.errors import UnsupportedError
from meshwright.parallel import operators
from meshwright.parallel.operators import OPERATORS
from meshwright.parallel.tensor import FUNCTIONS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "operations.md"
COMMAND = "python tests/numerics/operations_page.py"
SHOWN = 24  # more operations of one rule than this are counted, not listed
DRAWN = {"conv": "conv", "conv_transpose": "conv_transpose", "max_pool": "pool", "avg_pool": "pool", "pad": "pad"}
DRAWN |= {"adaptive": "adaptive", "interpolate": "resize", "norm": "norm", "slices": "slices"}
HEAD = f"""# Operations

Written by `{COMMAND}` from the registered rules and the test cases; a test holds it to them.

What is split stays split: an operation below fetches what its outputs need and nothing else. "Sends" counts elements
that one rank sends forward; backward sends as many. *Cases* are the named ones of `tests/numerics` whose operation
reaches the rule, each on one rank and on meshes of 4 (many on 2, 3 and 8 too), against one device. {{drawn}} random
cases (`test_properties.py`) and {{programs}} random programs of 3 to 8 operations (`test_programs.py`) run besides,
{FULL} times as many with `./scripts/test --full`; of the programs at least {SPLIT_SHARE:.0%} must need no gather.

Whatever has no rule is gathered on every rank, computed exactly, and reported once with its bytes (`mw.report`);
`mw.parallelize(..., strict=True)` refuses it before anything is sent.
"""
Rule = Callable[..., Any]


def plain(rule: Any) -> Any:
    """The function behind partial applications."""
    return plain(rule.func) if isinstance(rule, functools.partial) else inspect.unwrap(rule)


def family(rule: Any) -> str:
    return str(plain(rule).__module__).rsplit(".", 1)[-1]


def name_of(operation: Any) -> str:
    """The name by which users know a torch function or an ATen operator (its overloads together)."""
    if hasattr(operation, "_schema"):
        return f"aten.{operation._schema.name.removeprefix('aten::')}"
    found = torch.overrides.resolve_name(operation)
    if found is None or "." not in found:
        room = getattr(operation, "__module__", None) or "torch"
        found = f"{room}.{getattr(operation, '__name__', operation)}"
    return found.replace("torch.nn.functional.", "F.")


def rules() -> dict[str, dict[str, tuple[Any, list[str]]]]:
    """Family → name of a rule → (the rule, the operations that it is for)."""
    found: dict[str, dict[str, tuple[Any, list[str]]]] = defaultdict(dict)
    for table in (FUNCTIONS, OPERATORS):
        for operation, rule in table.items():
            _, names = found[family(rule)].setdefault(plain(rule).__name__, (plain(rule), []))
            names.append(name_of(operation))
    return found


def reached() -> tuple[dict[str, int], int]:
    """How many cases reach each family, and how many cases there are."""
    seen: set[str] = set()

    def watched(rule: Rule) -> Rule:
        room = family(rule)

        @functools.wraps(rule)
        def run(*args: Any, **kwargs: Any) -> Any:
            seen.add(room)
            return rule(*args, **kwargs)

        return run

    for table in (FUNCTIONS, OPERATORS):
        for operation, rule in list(table.items()):
            table[operation] = watched(rule)
    short_path = operators.at_once

    def watched_path(*args: Any) -> Any:
        """Elementwise work that need not ask its rule."""
        result = short_path(*args)
        if result is not NotImplemented:
            seen.add("pointwise")
        return result

    operators.at_once = watched_path  # type: ignore[attr-defined]
    counts: dict[str, int] = defaultdict(int)
    extra = [Case(gap.name, gap.make, gap.inputs, strict=False, grad=gap.grad) for gap in FALLBACKS]
    for case in [*CASES, *extra]:
        seen.clear()
        with suppress(UnsupportedError):  # what is refused by name has reached what refuses it
            run_parallel(case, plan_of("one"))
        for room in seen:
            counts[room] += 1
    return counts, len(CASES) + len(extra)


def words(text: str | None) -> str:
    """The first paragraph of a docstring on one line, fit for a table."""
    return " ".join((text or "").strip().split("\n\n")[0].split()).replace("|", "\\|")


def listed(names: list[str]) -> str:
    short = sorted(set(names), key=lambda name: (name.startswith("aten."), name))
    if len(short) <= SHOWN:
        return ", ".join(f"`{name}`" for name in short)
    return ", ".join(f"`{name}`" for name in short[:4]) + f" … ({len(short)} operators)"


def section(room: str, members: dict[str, tuple[Any, list[str]]], cases: int, drawn: list[str]) -> str:
    module = sys.modules[plain(next(iter(members.values()))[0]).__module__]
    cost = COSTS.get(room, Cost("not stated"))
    paragraphs = [" ".join(part.split()) for part in (inspect.getdoc(module) or "").split("\n\n")]
    random = f", and the random family {', '.join(f'`{name}`' for name in drawn)}" if drawn else ""
    rows = [f"| {listed(names)} | {words(inspect.getdoc(rule))} |" for rule, names in members.values()]
    return "\n".join(
        [
            f"## {room.replace('_', ' ')}",
            "",
            "\n\n".join(paragraphs),
            "",
            f"- Sends: {cost.sends}.",
            f"- Gathered or refused: {cost.fallback}.",
            f"- Cases: {cases}{random}.",
            "",
            "| operations | rule |",
            "|---|---|",
            *rows,
            "",
        ]
    )


def page() -> str:
    """The whole document."""
    found = rules()
    counts, total = reached()
    drawn = {room: [name for name in SHARES if DRAWN[name] == room] for room in found}
    head = HEAD.format(drawn=sum(PROPERTIES.values()), programs=sum(PROGRAMS.values()))
    parts = [section(room, found[room], counts[room], drawn[room]) for room in sorted(found)]
    return re.sub(r"[ \t]+\n", "\n", "\n".join([head, f"{total} named cases, {len(found)} families.\n", *parts]))


def main() -> int:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    missing = sorted(set(rules()) - set(COSTS))
    if missing:
        print(f"families without a line in tests/numerics/operations_costs.py: {', '.join(missing)}")
        return 1
    text = page()
    if "--check" not in sys.argv:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
        print(f"docs/operations.md is not what the rules and cases give; run: {COMMAND}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
