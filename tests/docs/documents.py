"""Read the documents: their links, headings and command lines."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "README.md",
    *PAGES,
]

_FENCE = re.compile(r"^ *```(?P<info>[^\n`]*)\n(?P<text>.*?)^ *```$", re.DOTALL | re.MULTILINE)
_HERE_DOCUMENT = re.compile(r"<<'?(\w+)'?.*?^\1$", re.DOTALL | re.MULTILINE)
_CODE = re.compile(r"`[^`\n]*`")
_LINK = re.compile(r"\[(?:[^\]\[]|\[[^\]]*\])*\]\((?P<target>[^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6} (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block: the words behind the opening backticks, and the text."""

    info: str
    text: str


def find_blocks(text: str) -> list[Block]:
    """The fenced blocks, in order.

    >>> find_blocks("a\\n```bash exit=1\\nls\\n```\\n")
    [Block(info='bash exit=1', text='ls\\n')]
    """
    return [Block(match["info"].strip(), match["text"]) for match in _FENCE.finditer(text)]


def find_links(text: str) -> list[str]:
    """The targets of all links and pictures outside of code.

    >>> find_links("[a](b.md#c) ![d](e.png) `[f](g)`")
    ['b.md#c', 'e.png']
    """
    prose = _CODE.sub("`code`", _FENCE.sub("", text))
    return [match["target"] for match in _LINK.finditer(prose)]


def list_anchors(text: str) -> set[str]:
    """The anchors of all headings, as GitHub derives them.

    >>> sorted(list_anchors("# A page\\n## `runner why`: what, and why\\n# A page\\n"))
    ['a-page', 'a-page-1', 'runner-why-what-and-why']
    """
    anchors: set[str] = set()
    for heading in _HEADING.findall(_FENCE.sub("", text)):
        label = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        base = re.sub(r"[^\w\- ]", "", label).replace(" ", "-")
        number = 0
        while (anchor := f"{base}-{number}" if number else base) in anchors:
            number += 1
        anchors.add(anchor)
    return anchors


def list_commands(block: Block) -> Iterator[list[str]]:
    """The words of each command of a block of shell lines, without comments.

    Lines that begin with `$ ` are commands in a block that also shows output. Redirections and
    assignments in front of a command are left out.

    >>> list(list_commands(Block("bash", "cd x && A=1 runner status > y # z\\n")))
    [['cd', 'x'], ['runner', 'status']]
    """
    joined = block.text.replace("\\\n", " ")
    prompted = re.findall(r"^\$ (.+)$", joined, re.MULTILINE)
    without_files = _HERE_DOCUMENT.sub("", joined)
    for line in prompted or without_files.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split = True
        command: list[str] = []
        is_target = False
        for word in [*lexer, ";"]:
            if set(word) <= set("|&;"):
                if command:
                    yield command
                command = []
            elif set(word) <= set("<>"):
                is_target = True
            elif is_target:
                is_target = False
            elif command or not re.match(r"\w+=", word):
                command.append(word)


def list_runner_commands(path: Path) -> list[list[str]]:
    """The arguments of each `runner ...` in the fenced shell blocks of a document."""
    found = []
    for block in find_blocks(path.read_text(encoding="utf-8")):
        if block.info.split(" ")[0] in ("", "bash", "console", "sh"):
            found += [words[1:] for words in list_shell(block) if words[0] == "runner"]
    return found


def list_shell(block: Block) -> list[list[str]]:
    """The commands of a block; of one without a language only those behind `$ ` or `runner `."""
    if block.info:
        return list(list_commands(block))
    lines = [
        line
        for line in block.text.splitlines()
        if line.startswith(("$ ", "runner ")) and " = " not in line
    ]
    return list(list_commands(Block("bash", "\n".join(lines)))) if lines else []
