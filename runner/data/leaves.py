"""The texts of a row (its leaves), and the marks that replace them in a rendering.

Owns which texts are leaves, the forms in which a template may print each, and their marks. Does not
own the proof: that is `structure_proof.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from runner.data.chat_template import ChatTemplate

THINK_TAGS: Final = re.compile(r"</?think(?:ing)?>|\[/?THINK\]")
_TAGS: Final = re.compile(r"</?[^\s<>]{1,30}>|\[/?[A-Z_]{2,30}\]")


@dataclass(frozen=True)
class Leaf:
    """One text of a row: its place (`what` names it in errors), and the mark that replaces it.
    `variants` are the forms in which a template may print it.
    """

    message: int | None  # None: in the tools
    what: str
    mark: str
    variants: tuple[str, ...]
    is_repeatable: bool = False  # a tool's answer may repeat a call's name


class Marking:
    """Replaces every leaf with a mark that is unique and absent from the real rendering."""

    def __init__(self, template: ChatTemplate, *texts: str) -> None:
        self._template = template
        self.leaves: list[Leaf] = []
        salt = 0
        while template.holds(f"Qx{salt}m") or any(f"Qx{salt}m" in text for text in texts):
            salt += 1
        self._word = f"Qx{salt}m"
        number = 70000
        while any(str(number) in text for text in texts):
            number += 1
        self._number = str(number)

    def mark_message(self, index: int, message: Mapping[str, Any]) -> dict[str, Any]:
        """A copy of the message with marks instead of leaves."""
        marked = dict(message)
        for key in ("reasoning_content", "content"):
            if isinstance(marked.get(key), str):
                has_thoughts = key == "content" and message["role"] == "assistant"
                marked[key] = self._mark_text(index, f"`{key}`", marked[key], has_thoughts)
        calls = []
        for call in marked.get("tool_calls") or ():
            function = call["function"]
            what = f"call of `{function['name']}`"
            name = self._add(index, f"the {what}", function["name"], is_repeatable=True)
            arguments = self._mark_value(index, f"the {what}", function["arguments"])
            calls.append(call | {"function": function | {"name": name, "arguments": arguments}})
        if calls:
            marked["tool_calls"] = calls
        return marked

    def mark_tool(self, tool: Mapping[str, Any]) -> dict[str, Any]:
        """A copy of the tool with marks instead of its name and its description."""
        function = tool.get("function")
        if not isinstance(function, Mapping):
            return dict(tool)
        marked = dict(function)
        for key in ("name", "description"):
            if isinstance(marked.get(key), str) and marked[key].strip():
                what = f"the {key} of the tool `{function.get('name')}`"
                marked[key] = self._add(None, what, marked[key], is_repeatable=True)
        return {**tool, "function": marked}

    def _mark_text(self, index: int, what: str, text: str, has_thoughts: bool) -> str:
        """The text with its tags and the whitespace around its pieces, and a mark for each piece.

        Think tags divide an assistant's content only; anywhere else they are words. A text that
        consists only of other tags is one piece, or its absence would not be noticed.
        """
        tags = [
            span
            for span in self._find_tags(text)
            if has_thoughts or not THINK_TAGS.fullmatch(text, *span)
        ]
        if not (has_thoughts and THINK_TAGS.search(text)) and not _cut_out(text, tags).strip():
            tags = []
        parts: list[str] = []
        position = 0
        for start, end in [*tags, (len(text), len(text))]:
            piece = text[position:start]
            core = piece.strip()
            if core:
                begin = piece.index(core)
                is_thought = text.startswith(("</think", "[/THINK"), start)
                name = f"the think block in the {what}" if is_thought else what
                mark = self._add(index, name, core)
                piece = piece[:begin] + mark + piece[begin + len(core) :]
            parts += [piece, text[start:end]]
            position = end
        return "".join(parts)

    def _find_tags(self, text: str) -> Iterator[tuple[int, int]]:
        """The tags at which templates split contents: think tags, and tags in the template's source
        that are not special tokens.
        """
        for tag in _TAGS.finditer(text):
            name = tag.group()
            is_known = self._template.holds(name) and not self._template.is_special(name)
            if THINK_TAGS.fullmatch(name) or is_known:
                yield tag.span()

    def _mark_value(self, index: int, what: str, value: Any) -> Any:
        if isinstance(value, str):
            core = value.strip()
            if not core:
                return value
            begin = value.index(core)
            mark = self._add(index, what, core)
            return value[:begin] + mark + value[begin + len(core) :]
        if isinstance(value, bool) or value is None:
            return value
        if isinstance(value, int | float):
            mark = f"{self._number}{len(self.leaves):05}"
            self.leaves.append(Leaf(index, what, mark, (json.dumps(value), str(value))))
            return int(mark)
        if isinstance(value, Mapping):
            return {
                key: self._mark_value(index, f"argument `{key}` of {what}", item)
                for key, item in value.items()
            }
        return [self._mark_value(index, what, item) for item in value]

    def _add(self, index: int | None, what: str, text: str, *, is_repeatable: bool = False) -> str:
        mark = f"{self._word}{len(self.leaves)}xQ"
        self.leaves.append(Leaf(index, what, mark, _list_variants(text), is_repeatable))
        return mark


def _cut_out(text: str, spans: Sequence[tuple[int, int]]) -> str:
    """The text without these spans, which are in ascending order."""
    ends = [0, *(end for _, end in spans)]
    starts = [*(start for start, _ in spans), len(text)]
    return "".join(text[end:start] for end, start in zip(ends, starts, strict=True))


def _list_variants(text: str) -> tuple[str, ...]:
    """The text as it is, and escaped as JSON once or twice, in Unicode or in ASCII."""
    once = json.dumps(text, ensure_ascii=False)[1:-1]
    in_ascii = json.dumps(text)[1:-1]
    twice = (json.dumps(once, ensure_ascii=False)[1:-1], json.dumps(in_ascii)[1:-1])
    return tuple(dict.fromkeys((text, once, in_ascii, *twice)))
