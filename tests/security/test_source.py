"""What the source may not contain: ways to run bytes that came from a file, a socket or a shell."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import meshwright

SOURCE = Path(meshwright.__file__).parent
MODULES = {
    "pickle",
    "_pickle",
    "cPickle",
    "cloudpickle",
    "dill",
    "shelve",
    "marshal",
    "joblib",
    "torch.distributed.rpc",
}
MODULES |= {"urllib.request", "http.client", "requests", "ftplib", "socketserver", "torch.hub", "torch.package"}
BUILTINS = {"eval", "exec", "compile", "__import__", "input"}
CALLS = {
    "torch.load", "torch.save", "torch.jit.load", "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load",
    "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "importlib.import_module",
}  # fmt: skip
# the one place where objects are packed, for the pipes between this process and its own children
PIPES = "cluster/message.py"


def offences(tree: ast.AST, place: str = "") -> Iterator[str]:
    for node in ast.walk(tree):
        for what in _offences_of(node, place):
            yield f"{place}:{getattr(node, 'lineno', 0)}: {what}"


def _offences_of(node: ast.AST, place: str) -> Iterator[str]:
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield from _imports(node, place)
    elif isinstance(node, ast.Attribute):
        if node.attr.endswith(("_object", "_object_list")) or node.attr == "rpc":
            yield f"{node.attr} unpickles what other ranks send"
    elif isinstance(node, ast.Call):
        yield from _calls(node)


def _imports(node: ast.Import | ast.ImportFrom, place: str) -> Iterator[str]:
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    else:
        names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
    for name in names:
        if name in MODULES or name.partition(".")[0] in MODULES or name.endswith(("_object", "_object_list")):
            yield f"import of {name}"
        if name.endswith("ForkingPickler") and place != PIPES:
            yield f"{name} outside of {PIPES}"


def _calls(node: ast.Call) -> Iterator[str]:
    name = ast.unparse(node.func)
    if name in BUILTINS:
        yield f"{name}()"
    if name in CALLS:
        yield f"{name}()"
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    if keywords.get("allow_pickle", "False") != "False":
        yield "allow_pickle"
    if name in {"np.load", "numpy.load"} and "allow_pickle" not in keywords:
        yield f"{name} without allow_pickle=False"
    if keywords.get("shell", "False") != "False":
        yield "shell"
    if keywords.get("weights_only", "True") != "True":
        yield "weights_only"


def test_the_source_is_clean() -> None:
    files = sorted(SOURCE.rglob("*.py"))
    assert len(files) > 20
    found = []
    for file in files:
        place = file.relative_to(SOURCE).as_posix()
        found += offences(ast.parse(file.read_text(encoding="utf-8")), place)
    assert found == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import torch.distributed.rpc",
        "from torch.distributed import rpc",
        "from torch.distributed import broadcast_object_list",
        "from multiprocessing.reduction import ForkingPickler",
        "from urllib.request import urlopen",
        "eval('1')",
        "exec(text)",
        "torch.load(path)",
        "yaml.load(text)",
        "dist.all_gather_object(a, b)",
        "dist.broadcast_object_list(a)",
        "torch.distributed.rpc.init_rpc()",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
        "subprocess.run(text, shell=True)",
        "os.system(text)",
    ],
)
def test_the_walk_finds(code: str) -> None:
    assert list(offences(ast.parse(code), "sample.py"))


@pytest.mark.parametrize("code", ["model.eval()", "np.load(path, allow_pickle=False)", "yaml.safe_load(text)"])
def test_the_walk_lets_pass(code: str) -> None:
    assert not list(offences(ast.parse(code), "sample.py"))
