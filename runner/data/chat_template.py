"""What a chat template prints around the contents of a conversation, found by rendering sentinels
in their place.

Owns the questions put to a template: its text between the contents, what it strips from them, where
a completion starts and what ends a turn. Does not own the proof that a row follows the answers, nor
tokens: that is `masking.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from runner.errors import DataError

METHOD_TEXT = "sentinel"
METHOD_PARTS = "sentinel, content as a list of parts"

# Whitespace laid around a sentinel to see what the template strips; the outermost character is a
# newline, so that `strip()` and `strip('\n')` leave different remains.
_LEFT_PAD, _RIGHT_PAD = "\n \t", " \t\n"
MAX_RENDERED_CHARACTERS = 1_000_000  # besides the contents
# Arguments of str.lstrip and str.rstrip: nothing, all whitespace, newlines only.
_STRIP_CHARS: tuple[str | None, ...] = ("", None, "\n")
_PROBE = "Qprobe"

Messages = Sequence[Mapping[str, str]]
# One entry per message: its role, and its content where that stands as it is, None where a sentinel
# stands for it.
Shape = tuple[tuple[str, str | None], ...]


class MaskError(DataError):
    """A conversation whose completions cannot be proven under its tokenizer's chat template."""


@dataclass(frozen=True)
class Turn:
    """One message's place in a skeleton, and how much template text around its content is trained
    on.
    """

    message: int
    strip_left: str | None = ""
    strip_right: str | None = ""
    num_lead_chars: int = 0
    num_tail_chars: int = 0
    end_token: str | None = None

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


class ChatTemplate:
    """The chat template of one tokenizer, with the skeletons found so far, one per sequence of
    roles.
    """

    def __init__(self, tokenizer: Any, template_kwargs: Mapping[str, Any] | None = None) -> None:
        if not tokenizer.chat_template:
            raise MaskError(
                "the tokenizer has no chat template, so there is no chat format to train on",
                hint="name a chat template in the model card (chat_template: chat/<name>.jinja)",
            )
        self._tokenizer = tokenizer
        self._template_kwargs = dict(template_kwargs or {})
        self._source: str = tokenizer.get_chat_template()
        self._skeletons: dict[Shape, Skeleton] = {}
        special = {
            token.content for token in tokenizer.added_tokens_decoder.values() if token.special
        }
        longest_first = sorted(special | set(tokenizer.all_special_tokens), key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self.reads_clock = "strftime_now" in self._source

    def render(
        self, messages: Messages, method: str, *, add_generation_prompt: bool = False
    ) -> str:
        """The rendered text; whatever the template raises becomes a MaskError with the template's
        own words.
        """
        chat: list[dict[str, Any]] = [dict(message) for message in messages]
        if method == METHOD_PARTS:
            for message in chat:
                message["content"] = [{"type": "text", "text": message["content"]}]
        try:
            text: str = self._tokenizer.apply_chat_template(
                chat,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self._template_kwargs,
            )
        except Exception as error:  # a template is a stranger's program: it can raise anything
            roles = ", ".join(message["role"] for message in messages)
            raise MaskError(
                f"the chat template refuses a conversation of the roles {roles}: {error}",
                hint=(
                    "change the roles in the data (a system text can open the first user turn),"
                    " or the chat template"
                ),
            ) from error
        if len(text) > MAX_RENDERED_CHARACTERS + 8 * sum(
            len(message["content"]) for message in messages
        ):
            raise MaskError(
                f"the chat template makes {len(text):,} characters"
                " of a conversation that is far shorter",
                hint="name another chat template in `model.chat_template`",
            )
        return text

    def forget(self) -> None:
        """Drop the skeletons: the template printed something that has changed since, such as the
        date.
        """
        self._skeletons.clear()

    def skeleton(self, shape: Shape) -> Skeleton:
        """The skeleton of a sequence of roles, found once. Raises: MaskError, if the template has
        none.
        """
        if shape not in self._skeletons:
            self._skeletons[shape] = self._find_skeleton(shape)
        return self._skeletons[shape]

    def _find_skeleton(self, shape: Shape) -> Skeleton:
        try:
            return self._build_skeleton(shape, METHOD_TEXT)
        except MaskError as error:
            refusal = error
        # Templates of vision models print nothing of a plain string. One that prints a list as
        # Python source is not theirs.
        try:
            skeleton = self._build_skeleton(shape, METHOD_PARTS)
        except MaskError:
            raise refusal from None
        if any("'type': 'text'" in text for text in skeleton.texts):
            raise refusal
        return skeleton

    def _build_skeleton(self, shape: Shape, method: str) -> Skeleton:
        salt = next(n for n in range(len(self._source) + 1) if f"Qx{n}turn" not in self._source)
        marks = [f"Qx{salt}turn{index}xQ" for index in range(len(shape))]
        chat = [
            {"role": role, "content": mark if literal is None else literal}
            for mark, (role, literal) in zip(marks, shape, strict=True)
        ]
        text = self.render(chat, method)
        order = _find_order(
            text, chat, [marks[n] if shape[n][1] is None else None for n in range(len(shape))]
        )
        texts = _gaps(text, [marks[index] for index in order])
        turns = self._find_strips(chat, marks, order, texts, method)
        for rank, turn in enumerate(turns):
            if chat[turn.message]["role"] == "assistant":
                start = text.index(marks[turn.message])
                gap = (start - len(texts[rank]), start)
                num_lead_chars = self._num_lead_chars(chat, turn.message, text, gap, method)
                num_tail_chars, end_token = self._find_end(
                    chat, turn.message, texts[rank + 1], method
                )
                turns[rank] = replace(
                    turn,
                    num_lead_chars=num_lead_chars,
                    num_tail_chars=num_tail_chars,
                    end_token=end_token,
                )
        return Skeleton(texts, tuple(turns), method)

    def _find_strips(
        self,
        chat: Messages,
        marks: Sequence[str],
        order: Sequence[int],
        texts: tuple[str, ...],
        method: str,
    ) -> list[Turn]:
        """The turns in printed order, with what the template strips of each, seen from padded
        sentinels.

        Every second turn is padded at a time, so that a gap between sentinels shows the remains of
        one pad only. A template that does anything else to whitespace counts as verbatim here; the
        proof of each row decides.
        """
        turns = [Turn(index) for index in order]
        for parity in (0, 1):
            padded = [dict(message) for message in chat]
            for index in order[parity::2]:
                padded[index]["content"] = _LEFT_PAD + marks[index] + _RIGHT_PAD
            text = self.render(padded, method)
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
        """How many characters before an assistant content the model writes itself; `gap` is the
        text before it.

        Generation starts behind the generation prompt, so what the template prints between that and
        the content (an empty think block, a channel header) is the model's to write. Where the
        template has no generation prompt that can only be a space: anything else is a role header.
        Where the text does not go on from the generation prompt, the completion starts with its
        content.
        """
        try:
            prompt = self.render(chat[:index], method, add_generation_prompt=True)
            without = self.render(chat[:index], method)
        except MaskError:
            return 0
        if not (text.startswith(prompt) and gap[0] <= len(prompt) <= gap[1]):
            return 0
        lead = text[len(prompt) : gap[1]]
        return len(lead) if lead.isspace() or not without.startswith(prompt) else 0

    def _find_end(
        self, chat: Messages, index: int, own: str, method: str
    ) -> tuple[int, str | None]:
        """How many characters behind an assistant content belong to its turn, and the special token
        that ends it.

        `own` is what the template prints there. What ends a turn is printed both where the
        conversation stops and where a user speaks next: the end-of-turn token is the last special
        token that the two have in common. What follows it is a separator, the end of the whole
        text, or the next header. None as token: plain text ends the turn.
        """
        is_last = index == len(chat) - 1
        ending = own if is_last else self._text_after(chat[: index + 1], index, method)
        followed = [*chat, {"role": "user", "content": _PROBE}]
        witness = self._text_after(followed, index, method) if is_last else ending
        ends = self._specials(common_prefix(own, witness or ""))[-1:]
        if not ends and is_last:
            # The end of a conversation may differ from the end of a turn (GPT-OSS). One special
            # token leaves no doubt.
            candidates = self._specials(own)
            ends = candidates if len(candidates) == 1 else []
        elif not ends and self._specials(ending or ""):
            # The same from the other side: the end of a turn within a conversation is that of the
            # user's turns.
            users = [n for n in range(index) if chat[n]["role"] == "user"]
            asked = [*chat[: users[-1]], {"role": "user", "content": _PROBE}] if users else []
            closing = self._text_after(asked, users[-1], method) if users else None
            ends = self._specials(common_prefix(own, closing or ""))[-1:]
        if ends:
            return ends[0].end(), ends[0].group()
        plain = (ending or "").rstrip()
        if plain and not self._specials(plain) and own.startswith(plain):
            return len(plain), None
        raise MaskError(
            f"{describe(chat, index)} has no end-of-turn token: the template goes on with"
            f" {quote(own)}, so a model trained on the completion could never learn to stop",
            hint=(
                "in the chat template, print {{ eos_token }}, or another special token of the"
                " tokenizer, right after every assistant content"
            ),
        )

    def _text_after(self, chat: Messages, index: int, method: str) -> str | None:
        """What the template prints after a sentinel; None where it will not render that, or not the
        sentinel once.
        """
        mark = chat[index]["content"]
        try:
            text = self.render(chat, method)
        except MaskError:
            return None
        return text.partition(mark)[2] if mark.strip() and text.count(mark) == 1 else None

    def _specials(self, text: str) -> list[re.Match[str]]:
        return list(self._special_pattern.finditer(text))


def describe(messages: Messages, index: int) -> str:
    """How a message is called in errors.

    >>> describe([{"role": "user"}, {"role": "assistant"}], 1)
    'message 1 (assistant)'
    """
    return f"message {index} ({messages[index]['role']})"


def quote(text: str, limit: int = 60) -> str:
    """The beginning of a text, as a Python literal: whitespace is what errors are about here.

    >>> quote("a\\n" * 9, limit=3)
    "'a\\\\na'..."
    """
    return repr(text) if len(text) <= limit else repr(text[:limit]) + "..."


def common_prefix(left: str, right: str) -> str:
    """What both texts begin with.

    >>> common_prefix("<end><user>", "<end>")
    '<end>'
    """
    length = next(
        (n for n, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1]), None
    )
    return min(left, right, key=len) if length is None else left[:length]


def _gaps(text: str, marks: Sequence[str]) -> tuple[str, ...]:
    """The texts before, between and behind sentinels that stand in `text` once each, in this order.

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
