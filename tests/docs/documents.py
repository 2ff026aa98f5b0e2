"""The documents of the project and the code blocks in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
LANGUAGES = ("python", "bash", "yaml", "text")
_FENCE = re.compile(r"^(\s*)(`{3,}|~{3,})\s*(.*?)\s*$")
_FILE = re.compile(r"^# file: (\S+)\n")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line of the document on which the text begins."""

    language: str
    text: str
    line: int

    @property
    def file(self) -> str | None:
        """The name a reader saves the block under: its first line is `# file: NAME`."""
        found = _FILE.match(self.text)
        return found and found.group(1)


def blocks(document: str) -> list[Block]:
    """Every fenced block of a Markdown text, in order. Raises `ValueError` for a fence that is never closed."""
    found: list[Block] = []
    lines = document.splitlines()
    number = 0
    while number < len(lines):
        opening = _FENCE.match(lines[number])
        number += 1
        if opening is None:
            continue
        indent, fence, language = opening.groups()
        begin = number
        while number < len(lines) and lines[number].strip() != fence:
            number += 1
        if number == len(lines):
            raise ValueError(f"line {begin}: the fence {fence} is never closed")
        text = "".join(line.removeprefix(indent) + "\n" for line in lines[begin:number])
        found.append(Block(language, text, begin + 1))
        number += 1
    return found


def script(parts: list[Block]) -> str:
    """The blocks as one file, each on the lines it has in the document, so that tracebacks point into it."""
    lines: list[str] = []
    for block in parts:
        lines += [""] * (block.line - 1 - len(lines)) + block.text.splitlines()
    return "\n".join(lines) + "\n"
