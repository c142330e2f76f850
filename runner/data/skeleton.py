"""The skeleton of a sequence of roles: a chat template's own text around plain contents, found by
rendering sentinels in their place.

Owns the text between contents, the whitespace stripped from them, and the start of a completion.
Does not own the proof that a row follows its skeleton: that is `masking.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final

from runner.data.chat_template import (
    METHOD_PARTS,
    METHOD_TEXT,
    PROBE,
    ChatTemplate,
    MaskError,
    Messages,
    common_prefix,
    describe,
    quote,
)
from runner.data.turn_ends import TurnText, find_end

# Whitespace around a sentinel shows what the template strips. The outermost character is a newline,
# so `strip()` and `strip('\n')` leave different remains.
_LEFT_PAD, _RIGHT_PAD = "\n \t", " \t\n"
# Arguments of str.lstrip and str.rstrip: nothing, all whitespace, newlines only.
_STRIP_CHARS: Final[tuple[str | None, ...]] = ("", None, "\n")

# One entry per message: its role, and its content, or None if a sentinel replaces the content.
Shape = tuple[tuple[str, str | None], ...]


@dataclass(frozen=True)
class Turn:
    """One message's place in a skeleton, and the amount of template text around its content that is
    trained on.

    `refusal` is the reason why an assistant's turn cannot be trained on. `rewritten` describes the
    difference from the same turn at the end of a conversation, if there is one.
    """

    message: int
    strip_left: str | None = ""
    strip_right: str | None = ""
    num_lead_chars: int = 0
    num_tail_chars: int = 0
    end_token: str | None = None
    rewritten: str | None = None
    refusal: MaskError | None = None

    def printed(self, content: str) -> str:
        """The content as the template prints it.

        >>> Turn(0, strip_left=None).printed("  hi ")
        'hi '
        """
        return content.lstrip(self.strip_left).rstrip(self.strip_right)


@dataclass(frozen=True)
class Skeleton:
    """The template's own text around n contents: `texts[0]`, content, `texts[1]`, ..., content,
    `texts[n]`.
    """

    texts: tuple[str, ...]
    turns: tuple[Turn, ...]
    method: str


class Skeletons:
    """The skeletons of one chat template found so far, one per sequence of roles."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._found: dict[Shape, Skeleton] = {}

    def find(self, shape: Shape) -> Skeleton:
        """The skeleton of a sequence of roles, computed once. Raises: MaskError, if the template
        has none.
        """
        if shape not in self._found:
            self._found[shape] = self._find(shape)
        return self._found[shape]

    def _find(self, shape: Shape) -> Skeleton:
        try:
            return self._build(shape, METHOD_TEXT)
        except MaskError as error:
            refusal = error
        # Templates of vision models print nothing for a plain string. A template that prints a list
        # as Python source is not one of them.
        try:
            skeleton = self._build(shape, METHOD_PARTS)
        except MaskError:
            raise refusal from None
        if any("'type': 'text'" in text for text in skeleton.texts):
            raise refusal
        return skeleton

    def _build(self, shape: Shape, method: str) -> Skeleton:
        salt = 0
        while self._template.holds(f"Qx{salt}turn"):
            salt += 1
        marks = [f"Qx{salt}turn{index}xQ" for index in range(len(shape))]
        chat = [
            {"role": role, "content": mark if literal is None else literal}
            for mark, (role, literal) in zip(marks, shape, strict=True)
        ]
        text = self._template.render(chat, method)
        order = _find_order(
            text, chat, [marks[n] if shape[n][1] is None else None for n in range(len(shape))]
        )
        texts = _gaps(text, [marks[index] for index in order])
        turns = self._find_strips(chat, marks, order, texts, method)
        for rank, turn in enumerate(turns):
            if chat[turn.message]["role"] == "assistant":
                place = TurnText(
                    chat, turn.message, marks[turn.message], texts[rank], texts[rank + 1], method
                )
                start = text.index(marks[turn.message])
                gap = (start - len(texts[rank]), start)
                turns[rank] = self._find_bounds(turn, place, text, gap)
        return Skeleton(texts, tuple(turns), method)

    def _find_bounds(self, turn: Turn, place: TurnText, text: str, gap: tuple[int, int]) -> Turn:
        """The assistant turn with the parts of the template's text that belong to it."""
        try:
            num_tail_chars, end_token = find_end(self._template, place)
        except MaskError as refusal:
            return replace(turn, refusal=refusal)
        return replace(
            turn,
            num_lead_chars=self._num_lead_chars(place.chat, turn.message, text, gap, place.method),
            num_tail_chars=num_tail_chars,
            end_token=end_token,
            rewritten=self._find_rewriting(place),
        )

    def _find_rewriting(self, place: TurnText) -> str | None:
        """Describe the difference from the same turn at the end of a conversation; None if there is
        none.
        """
        if place.index == len(place.chat) - 1:
            return None
        with suppress(MaskError):
            text = self._template.render(place.chat[: place.index + 1], place.method)
            found = text.partition(place.mark)[0]
            # The text between the message printed before and this one.
            ends = [
                found.rfind(message["content"]) + len(message["content"])
                for message in place.chat[: place.index]
                if message["content"].strip() and message["content"] in found
            ]
            alone = found[max(ends, default=0) :]
            if place.mark in text and alone != place.before:
                return describe_rewriting(place.before, alone)
        return None

    def _find_strips(
        self,
        chat: Messages,
        marks: Sequence[str],
        order: Sequence[int],
        texts: tuple[str, ...],
        method: str,
    ) -> list[Turn]:
        """The turns in printed order, with the whitespace that the template strips from each, found
        with padded sentinels.

        Every second turn is padded at a time, so a gap between sentinels shows the remains of only
        one pad. A template that treats whitespace in any other way counts as verbatim here; the
        proof of each row decides.
        """
        turns = [Turn(index) for index in order]
        for parity in (0, 1):
            padded = [dict(message) for message in chat]
            for index in order[parity::2]:
                padded[index]["content"] = _LEFT_PAD + marks[index] + _RIGHT_PAD
            text = self._template.render(padded, method)
            if any(text.count(marks[index]) != 1 for index in order):
                continue
            gaps = _gaps(text, [marks[index] for index in order])
            for rank in range(parity, len(order), 2):
                left = gaps[rank].removeprefix(texts[rank])
                right = gaps[rank + 1].removesuffix(texts[rank + 1])
                turns[rank] = replace(
                    turns[rank],
                    strip_left=next(
                        (chars for chars in _STRIP_CHARS if _LEFT_PAD.lstrip(chars) == left), ""
                    ),
                    strip_right=next(
                        (chars for chars in _STRIP_CHARS if _RIGHT_PAD.rstrip(chars) == right), ""
                    ),
                )
        return turns

    def _num_lead_chars(
        self, chat: Messages, index: int, text: str, gap: tuple[int, int], method: str
    ) -> int:
        """The number of characters before an assistant content that the model writes itself; `gap`
        is the text before it.

        Generation starts after the generation prompt, so the model writes the text between the
        prompt and the content (an empty think block, a channel header). If the template has no
        generation prompt, that text can only be a space: anything else is a role header. If the
        rendering does not continue the generation prompt, the completion starts with its content.
        """
        try:
            prompt = self._template.render(chat[:index], method, add_generation_prompt=True)
            without = self._template.render(chat[:index], method)
        except MaskError:
            return 0
        if not (text.startswith(prompt) and gap[0] <= len(prompt) <= gap[1]):
            return 0
        lead = text[len(prompt) : gap[1]]
        if lead.isspace() or not without.startswith(prompt):
            return len(lead)
        has_prompt = prints_prompt_unasked(
            lambda chat: self._template.render(chat, method), chat[:index]
        )
        return len(lead) if has_prompt else 0


def prints_prompt_unasked(render: Callable[[Messages], str], chat: Messages) -> bool:
    """True if a template ends a conversation with its generation prompt although none was requested
    (Cohere's Command R7B and Command A). The text after the last content then changes as soon as a
    user speaks next.
    """
    last = chat[-1]["content"] if chat else ""
    try:
        alone = render(chat)
        followed = render([*chat, {"role": "user", "content": PROBE}])
    except MaskError:
        return False
    end = alone.rfind(last) + len(last)
    return bool(last.strip()) and end <= len(common_prefix(alone, followed)) < len(alone)


def describe_rewriting(here: str, alone: str) -> str:
    """Both printed forms of a turn, here and at the end of a conversation, from shortly before they
    differ.

    >>> describe_rewriting("<a>x", "<a><think>x")
    "it is printed as '<a>x', but at the end of a conversation as '<a><think>x'"
    """
    begin = max(0, len(common_prefix(here, alone)) - 20)
    return (
        f"it is printed as {quote(here[begin:])},"
        f" but at the end of a conversation as {quote(alone[begin:])}"
    )


def _gaps(text: str, marks: Sequence[str]) -> tuple[str, ...]:
    """The texts before, between and after sentinels that occur in `text` once each, in this order.

    >>> _gaps("<u>A<m>B.", ["A", "B"])
    ('<u>', '<m>', '.')
    """
    gaps = []
    for mark in marks:
        gap, _, text = text.partition(mark)
        gaps.append(gap)
    return (*gaps, text)


def _find_order(text: str, chat: Messages, marks: Sequence[str | None]) -> list[int]:
    """The messages that have a sentinel, in the order in which the template prints them; a system
    text may move.

    Raises: MaskError, if one is missing, changed or printed twice, or if the others are not in
    order.
    """
    marked = [(index, mark) for index, mark in enumerate(marks) if mark is not None]
    for index, mark in marked:
        if text.count(mark) == 1:
            continue
        if text.count(mark) > 1:
            what = "prints the content more than once"
        elif mark.lower() in text.lower():
            what = "changes letters of the content"
        else:
            what = "leaves the content out, or changes it beyond recognition"
        raise MaskError(
            f"{describe(chat, index)}: the chat template {what},"
            " so its place in the text cannot be proven",
            hint="use a chat template that prints every content exactly once and unchanged",
        )
    order = [index for index, _ in sorted(marked, key=lambda item: text.index(item[1]))]
    fixed = [index for index in order if chat[index]["role"] not in ("system", "developer")]
    if fixed != sorted(fixed):
        raise MaskError(
            f"the chat template prints the messages in the order {fixed}:"
            " a completion would not follow its prompt",
            hint="use a chat template that keeps the order of the turns",
        )
    return order
