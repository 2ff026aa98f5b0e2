"""What the documents say exists, exists; what exists is in the documents."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
from documents import DOCUMENTS, ROOT

import meshwright as mw

SOURCE = ROOT / "src" / "meshwright"
IDS = [str(path.relative_to(ROOT)) for path in DOCUMENTS]


def module_constants() -> dict[str, str]:
    """`module.NAME` → its source text. Public names in capitals, and private ones that are plain numbers."""
    found: dict[str, str] = {}
    for path in sorted(SOURCE.rglob("*.py")):
        module = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
                continue
            targets: list[ast.expr] = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target, value in pairs(targets[0], node.value):
                if not isinstance(target, ast.Name) or not re.fullmatch(r"_?[A-Z][A-Z0-9_]+", target.id):
                    continue
                text = ast.unparse(value)
                registry = text in ("{}", "[]", "set()")  # filled elsewhere: no value to give a reason for
                if is_number(value) or not (registry or target.id.startswith("_")):
                    found[f"{module}.{target.id}"] = text
    return found


def pairs(target: ast.expr, value: ast.expr) -> list[tuple[ast.expr, ast.expr]]:
    """`A, B = 1, 2` as (A, 1), (B, 2)."""
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        return list(zip(target.elts, value.elts, strict=True))
    return [(target, value)]


def is_number(value: ast.expr) -> bool:
    """A literal number, or arithmetic on such."""
    parts = list(ast.walk(value))
    kinds = (ast.Constant, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop)
    numbers = (part.value for part in parts if isinstance(part, ast.Constant))
    return all(isinstance(part, kinds) for part in parts) and all(type(number) in (int, float) for number in numbers)


def table_of_constants() -> dict[str, tuple[str, str]]:
    """Rows of docs/constants.md: | `module.NAME` | value | reason |."""
    text = (ROOT / "docs" / "constants.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.]+)` \| (.+?) \| (.+?) \|$", text, flags=re.MULTILINE)
    return {name: (value, reason) for name, value, reason in rows}


def test_every_constant_is_explained_with_its_value() -> None:
    code, table = module_constants(), table_of_constants()
    assert not set(code) - set(table), "constants without a row in docs/constants.md"
    assert not set(table) - set(code), "rows of docs/constants.md without a constant"
    for name, (value, reason) in table.items():
        assert len(reason) > 20, f"{name}: no reason given"
        if value.startswith("`"):
            assert value.strip("`") == code[name], f"{name}: the document gives another value than the source"
        else:
            assert not is_number(ast.parse(code[name], mode="eval").body), f"{name}: a number is written out"


def test_the_table_of_constants_would_miss_none() -> None:
    assert {"plan.plan.VERSION", "plan.plan.LETTER"} <= set(module_constants())


def documented_signatures() -> dict[str, str]:
    """Headings of docs/api.md: ### `mw.name(parameters)`."""
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    return dict(re.findall(r"^### `mw\.([\w.]+)(\(.*\))?`$", text, flags=re.MULTILINE))


def plain_signature(function: object) -> str:
    """`(model, plan, strict=False)`: names and defaults, no annotations."""
    parameters = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in inspect.signature(function).parameters.values()  # type: ignore[arg-type]
        if parameter.name not in ("self", "cls")
    ]
    return str(inspect.Signature(parameters))


@pytest.fixture(scope="module", autouse=True)
def every_module_imported() -> None:
    """A module may not shadow a public name when it is imported (`mw.report` and a package `report`)."""
    for module in pkgutil.walk_packages(mw.__path__, "meshwright."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)


def test_every_public_name_has_its_entry() -> None:
    assert set(mw.__all__) <= {name.split(".")[0] for name in documented_signatures()}


@pytest.mark.parametrize("name", documented_signatures())
def test_signature_is_the_one_of_the_code(name: str) -> None:
    thing: object = mw
    for part in name.split("."):
        thing = getattr(thing, part)
    signature = documented_signatures()[name]
    if signature:
        assert plain_signature(thing) == signature


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_links_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)|<img [^>]*src=\"([^\"]+)\"", path.read_text(encoding="utf-8"))
    for target in (first or second for first, second in links):
        if not re.match(r"[a-z]+:|#", target):
            assert (path.parent / target.split("#")[0]).exists(), f"{path.name}: {target} does not exist"
