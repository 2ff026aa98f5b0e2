"""Every code block of README, CONTRIBUTING and docs runs as printed. No block is passed over.

- `python`: the blocks of a document form one script, run in an empty folder of its own.
- `# file: NAME` on the first line (python or yaml): the block is saved under that name in that folder first.
- `yaml`: read by the plan reader if it holds `meshwright_plan`, else by the configuration reader.
- `bash`: run after the script, line by line, in that folder. Lines that begin with one of `RUN_ELSEWHERE` are not run
  here because they set up an environment or take minutes; their program must exist and their arguments must be read.
- `text`: shown, not code. Any other language, and a block without one, is an error.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from documents import DOCUMENTS, LANGUAGES, ROOT, Block, blocks, script

import meshwright as mw
from meshwright import cli, config
from meshwright.train.plans import resolve_plan

# command as printed → what checks it
RUN_ELSEWHERE = {
    "./scripts/train": "the main job, run by the tests of the command line",
    "./scripts/test": "the run that this test is a part of",
    "./scripts/check": "a part of ./scripts/test",
    "./scripts/setup": "the first step of ./scripts/test",
    ".ci/run": "calls ./scripts/test",
    "python benchmarks/": "minutes; run by hand for the figures of the README",
    "examples/cosmoflow/run": "the study: minutes to an hour; tests/cosmoflow_study run it at small size",
    "examples/unet/run": "minutes; tests/unet read its arguments and what it makes of them",
    "python examples/": "seconds to minutes; the tests of the example read its arguments and run it at small size",
}
LIMIT_S = 240


def run(command: list[str], cwd: Path, where: str) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIMIT_S
    )
    assert done.returncode == 0, f"{where}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"


def commands(block: Block) -> list[str]:
    """The lines of a bash block that are not empty or a comment; continued lines are joined."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if shlex.split(line, comments=True)]


def check_unrun(command: str, where: str) -> None:
    """A command that runs elsewhere: its program is there, and what follows `train` is a job that can be read."""
    program, *arguments = shlex.split(command, comments=True)
    if program == "python":
        assert (ROOT / arguments[0]).is_file(), f"{where}: {arguments[0]} does not exist"
        return
    path = ROOT / program
    assert os.access(path, os.X_OK), f"{where}: {program} is not an executable file"
    assert subprocess.run(["bash", "-n", str(path)], timeout=10).returncode == 0
    if program == "./scripts/train":
        parsed = cli._parser().parse_args(["train", *arguments])
        resolve_plan(config.load(parsed.config, parsed.set, parsed.ranks))


def read_yaml(block: Block) -> None:
    raw = yaml.safe_load(block.text)
    if isinstance(raw, dict) and "meshwright_plan" in raw:
        mw.Plan.from_dict(raw)
    else:
        config.read(config.Config, raw, "configuration")


@pytest.mark.parametrize("path", DOCUMENTS, ids=[str(path.relative_to(ROOT)) for path in DOCUMENTS])
def test_blocks_run_as_printed(path: Path, tmp_path: Path) -> None:
    found = blocks(path.read_text(encoding="utf-8"))
    for block in found:
        assert block.language in LANGUAGES, f"{path}:{block.line}: {block.language!r} is not one of {LANGUAGES}"
        if block.file:
            assert block.language in ("python", "yaml"), f"{path}:{block.line}: only python and yaml are saved"
            (tmp_path / block.file).write_text(block.text, encoding="utf-8")
        if block.language == "yaml":
            read_yaml(block)
    python = [block for block in found if block.language == "python" and not block.file]
    if python:
        (tmp_path / "blocks.py").write_text(script(python), encoding="utf-8")
        run([sys.executable, "blocks.py"], tmp_path, f"{path.name} (blocks.py has its line numbers)")
    for block in found:
        for command in commands(block) if block.language == "bash" else []:
            where = f"{path.name}:{block.line}: {command}"
            if command.startswith(tuple(RUN_ELSEWHERE)):
                check_unrun(command, where)
            else:
                run(["bash", "-euo", "pipefail", "-c", command], tmp_path, where)


def test_a_block_without_a_language_is_seen() -> None:
    assert [block.language for block in blocks("a\n```\nx\n```\n  ```python\n  y = 1\n  ```\n")] == ["", "python"]
    with pytest.raises(ValueError, match="line 1"):
        blocks("```python\nx\n")


def test_the_script_keeps_the_lines_of_the_document() -> None:
    text = "# title\n\n```python\na = 1\n```\n\nwords\n\n```python\nraise SystemExit\n```\n"
    lines = script(blocks(text)).splitlines()
    assert lines[3] == "a = 1"
    assert lines[9] == "raise SystemExit"
