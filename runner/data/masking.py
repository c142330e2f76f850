"""Labels: which tokens of a chat are trained on, proven from the chat template itself or refused.

Owns the step from messages to `input_ids`, completion spans and `labels`, in pure Python. Does not
own where the messages come from, truncation, or batching. A *completion* is one assistant turn up
to and including its end-of-turn token.

A mask is found by rendering the template with a unique sentinel for every content. That yields the
template's own text between the contents, the skeleton (`chat_template`). A row is accepted only if
its real rendering is exactly skeleton and contents laid end to end. Every position is then a sum of
known lengths: no content is ever searched, so nothing that a user writes can move the mask.
`docs/chat_templates.md` explains it at length.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from runner.data.chat_template import (
    ChatTemplate,
    MaskError,
    Messages,
    Shape,
    Skeleton,
    Turn,
    common_prefix,
    describe,
    quote,
)
from runner.recipe.schema import Loss

IGNORE_INDEX = -100
ROLES = ("system", "developer", "user", "assistant", "tool")

Interval = tuple[int, int]


@dataclass(frozen=True)
class CompletionSpan:
    """Token indices, half open, of one assistant turn: its content and its end-of-turn token."""

    start: int
    end: int


@dataclass(frozen=True)
class Completion:
    """One assistant turn among the tokens. `content` are the tokens that hold at least one byte of
    what the row says, `num_bytes` the bytes that they were printed as; the rest of `span` is the
    template's.

    `rewritten` is None where the template prints the turn as it prints it when the conversation
    ends there, but for its end; else it says what differs.
    """

    message: int
    span: CompletionSpan
    content: CompletionSpan
    num_bytes: int
    rewritten: str | None = None


@dataclass(frozen=True)
class MaskedConversation:
    """One tokenised chat and its completions.

    For viewers, all half open: `offsets[i]` are the characters of `text` that token i stands for,
    `content_chars[i]` those of message i (None for an empty one that the template leaves out),
    `completion_chars[k]` those of completion k.
    """

    input_ids: tuple[int, ...]
    spans: tuple[CompletionSpan, ...]
    method: str
    text: str
    offsets: tuple[Interval, ...]
    content_chars: tuple[Interval | None, ...]
    completion_chars: tuple[Interval, ...]
    completions: tuple[Completion, ...] = ()


def build_labels(
    input_ids: Sequence[int],
    spans: Sequence[CompletionSpan],
    loss: Loss,
    untrained: Sequence[CompletionSpan] = (),
) -> list[int]:
    """One label per token: its id where it is trained on, `IGNORE_INDEX` elsewhere. `untrained`
    turns, those of weight 0, have none under any loss.

    >>> build_labels([5, 6, 7, 8], [CompletionSpan(1, 3)], "completion")
    [-100, 6, 7, -100]
    >>> build_labels([5, 6, 7, 8], [CompletionSpan(1, 3)], "full")
    [5, 6, 7, 8]
    >>> build_labels([5, 6, 7, 8], [CompletionSpan(0, 1), CompletionSpan(3, 4)], "last_completion")
    [-100, -100, -100, 8]
    """
    if loss == "full":
        labels = list(input_ids)
        for span in untrained:
            labels[span.start : span.end] = [IGNORE_INDEX] * (span.end - span.start)
        return labels
    labels = [IGNORE_INDEX] * len(input_ids)
    for span in spans[-1:] if loss == "last_completion" else spans:
        labels[span.start : span.end] = input_ids[span.start : span.end]
    return labels


def end_of_turn_ids(tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end an assistant's turn under the tokenizer's chat template: the last ones of
    completions.

    Two where a template closes a conversation otherwise than a turn (GPT-OSS); none where plain
    text ends a turn.

    Raises: MaskError, if the template has no end of turn, or no chat template is there.
    """
    template = ChatTemplate(tokenizer)
    pair: Shape = (("user", None), ("assistant", None))
    turns = list(template.skeleton(pair).turns)
    with suppress(MaskError):  # a template for single questions is one too
        turns += template.skeleton(pair + pair).turns
    tokens = dict.fromkeys(turn.end_token for turn in turns if turn.end_token is not None)
    return tuple(int(tokenizer.convert_tokens_to_ids(token)) for token in tokens)


class ConversationMasker:
    """Masks conversations under one tokenizer and its chat template, as it is at this moment.

    `template_kwargs` go to the template as they are (`enable_thinking`, `date_string`, ...).
    `reads_clock` says that the template can print today's date, which makes the same row another
    one tomorrow.
    """

    def __init__(self, tokenizer: Any, *, template_kwargs: Mapping[str, Any] | None = None) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise MaskError(
                f"{type(tokenizer).__name__} is a slow tokenizer: it cannot tell which characters a"
                " token stands for",
                hint=(
                    "give the model a tokenizer.json,"
                    " which AutoTokenizer.from_pretrained(model) then loads"
                ),
            )
        self._tokenizer = tokenizer
        self._added_ids = frozenset(tokenizer.added_tokens_decoder)
        self._template = ChatTemplate(tokenizer, template_kwargs)
        self.reads_clock = self._template.reads_clock

    def mask(
        self,
        messages: Messages,
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        turns: Sequence[int] | None = None,
    ) -> MaskedConversation:
        """The tokens and proven completions of one conversation. Raises: MaskError."""
        _check_messages(messages, self._describe_roles)
        try:
            return self._mask(messages)
        except MaskError:
            if not self.reads_clock:
                raise
        # Midnight may lie between the skeleton's rendering and the row's: render both anew, once.
        self._template.forget()
        return self._mask(messages)

    def _describe_roles(self) -> str:
        """The roles that the chat template renders in a place where they are usual, found by
        trying.
        """
        usual = {
            "system": ("system", "user", "assistant"),
            "developer": ("developer", "user", "assistant"),
            "user": ("user", "assistant"),
            "assistant": ("user", "assistant"),
            "tool": ("user", "assistant", "tool", "assistant"),
        }
        accepted = []
        for role in ROLES:
            with suppress(MaskError):
                self._template.skeleton(tuple((each, None) for each in usual[role]))
                accepted.append(role)
        return f"this chat template takes {', '.join(accepted) or 'none of them'}"

    def _mask(self, messages: Messages) -> MaskedConversation:
        skeleton = self._template.skeleton(tuple((message["role"], None) for message in messages))
        text = self._template.render(messages, skeleton.method)
        try:
            contents = _prove(skeleton, messages, text)
        except MaskError:
            # Templates leave a system block out when its text is empty. Such a message has no
            # characters to place: it may stand as it is in the skeleton. Not so an assistant's,
            # whose end of turn must be placed.
            blank = [m["role"] != "assistant" and not m["content"].strip() for m in messages]
            if not any(blank):
                raise
            skeleton = self._template.skeleton(
                tuple(
                    (m["role"], m["content"] if blank[index] else None)
                    for index, m in enumerate(messages)
                )
            )
            contents = _prove(skeleton, messages, text)
        return self._tokenise(skeleton, messages, text, contents)

    def _tokenise(
        self, skeleton: Skeleton, messages: Messages, text: str, contents: Sequence[Interval]
    ) -> MaskedConversation:
        """Tokens of the whole text, tokenised once, and the completions among them."""
        encoding = self._tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        input_ids: list[int] = encoding["input_ids"]
        offsets: list[Interval] = [(start, end) for start, end in encoding["offset_mapping"]]
        if any(left[0] > right[0] or left[1] > right[1] for left, right in pairwise(offsets)):
            raise MaskError(
                "the tokenizer reports characters out of order,"
                " so tokens cannot be placed in the text"
            )
        masked = [
            (start - turn.num_lead_chars, end + turn.num_tail_chars, turn)
            for turn, (start, end) in zip(skeleton.turns, contents, strict=True)
            if messages[turn.message]["role"] == "assistant"
        ]
        others = [
            (*interval, turn.message)
            for turn, interval in zip(skeleton.turns, contents, strict=True)
            if messages[turn.message]["role"] != "assistant"
        ]
        starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
        spans: list[CompletionSpan] = []
        for start, end, turn in masked:
            first, last = bisect_right(ends, start), bisect_left(starts, end)
            # A header token that swallows whitespace to its right (`rstrip`) reaches into the
            # completion: still a header.
            while first < last and starts[first] < start and input_ids[first] in self._added_ids:
                first += 1
            span = CompletionSpan(first, last)
            self._check_span(span, turn, messages, input_ids, spans[-1].end if spans else 0)
            for other_start, other_end, other in others:
                if (
                    other_start < other_end
                    and starts[first] < other_end
                    and other_start < ends[last - 1]
                ):
                    raise MaskError(
                        f"a token of {describe(messages, turn.message)} also holds characters of"
                        f" {describe(messages, other)}: the chat template prints nothing between"
                        " that keeps them apart",
                        hint=(
                            "in the chat template, put a special token"
                            " or a newline between the turns"
                        ),
                    )
            spans.append(span)
        by_message = {
            turn.message: interval for turn, interval in zip(skeleton.turns, contents, strict=True)
        }
        return MaskedConversation(
            input_ids=tuple(input_ids),
            spans=tuple(spans),
            method=skeleton.method,
            text=text,
            offsets=tuple(offsets),
            content_chars=tuple(by_message.get(index) for index in range(len(messages))),
            completion_chars=tuple((start, end) for start, end, _ in masked),
            completions=tuple(
                self._build_completion(turn, span, by_message[turn.message], text, starts, ends)
                for (_, _, turn), span in zip(masked, spans, strict=True)
            ),
        )

    @staticmethod
    def _build_completion(
        turn: Turn,
        span: CompletionSpan,
        content: Interval,
        text: str,
        starts: Sequence[int],
        ends: Sequence[int],
    ) -> Completion:
        """The completion with the tokens of its content, of which an empty content has none."""
        first = min(max(bisect_right(ends, content[0]), span.start), span.end)
        last = max(first, min(bisect_left(starts, content[1]), span.end))
        if content[0] == content[1]:
            last = first
        num_bytes = len(text[content[0] : content[1]].encode())
        return Completion(turn.message, span, CompletionSpan(first, last), num_bytes)

    def _check_span(
        self,
        span: CompletionSpan,
        turn: Turn,
        messages: Messages,
        input_ids: Sequence[int],
        previous_end: int,
    ) -> None:
        """Raises: MaskError, unless the span has tokens of its own and its last one is the
        end-of-turn token.
        """
        who = describe(messages, turn.message)
        if not previous_end <= span.start < span.end:
            raise MaskError(f"{who} has no token that it does not share with another turn")
        if turn.end_token is None:
            return
        expected = self._tokenizer.convert_tokens_to_ids(turn.end_token)
        if input_ids[span.end - 1] != expected:
            found = self._tokenizer.convert_ids_to_tokens(input_ids[span.end - 1])
            raise MaskError(
                f"{who} should end in the token {turn.end_token!r} (id {expected}),"
                f" but the tokenizer makes {found!r} of the text there",
                hint=(
                    f"register {turn.end_token!r} as a special token, and look at the last"
                    " characters of the content"
                ),
            )


def _check_messages(messages: Messages, describe_roles: Callable[[], str]) -> None:
    """Raises: MaskError, if a message is not a known role and a text, or if nobody is the
    assistant.
    """
    for index, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise MaskError(
                f"message {index} has the role {role!r},"
                f" expected one of {', '.join(ROLES)}; {describe_roles()}",
                hint="rename the role in the data; who uses a tool or sets a scene can be a user",
            )
        if not isinstance(content, str):
            raise MaskError(
                f"{describe(messages, index)} has the content"
                f" {quote(repr(content))}, expected a text"
            )
        if (
            surrogate := next((char for char in content if "\ud800" <= char <= "\udfff"), None)
        ) is not None:
            raise MaskError(
                f"{describe(messages, index)} holds {surrogate!r},"
                " half of a character, which is no text",
                hint=(
                    "the file was written from text that was cut or decoded wrongly: write it again"
                ),
            )
        extra = sorted(set(message) - {"role", "content"})
        if extra:
            raise MaskError(
                f"{describe(messages, index)} has the keys {', '.join(extra)},"
                " which a mask does not cover",
                hint="put everything that is to be trained on in `content`",
            )
    if all(message["role"] != "assistant" for message in messages):
        raise MaskError(
            "the conversation has no assistant turn, so there is no completion to train on"
        )


def _prove(skeleton: Skeleton, messages: Messages, text: str) -> list[Interval]:
    """The characters of each turn's content, in printed order, if `text` is skeleton and contents
    laid end to end.

    Raises: MaskError, naming the first place where it is not.
    """
    contents: list[Interval] = []
    position = 0
    for template_text, turn in zip(skeleton.texts, skeleton.turns, strict=False):
        content = turn.printed(messages[turn.message]["content"])
        for piece, what in ((template_text, "the template's text before "), (content, "")):
            if not text.startswith(piece, position):
                raise _mismatch(what + describe(messages, turn.message), piece, text[position:])
            position += len(piece)
        contents.append((position - len(content), position))
    if text[position:] != skeleton.texts[-1]:
        raise _mismatch(
            "the template's text after the last message", skeleton.texts[-1], text[position:]
        )
    return contents


def _mismatch(what: str, expected: str, found: str) -> MaskError:
    """The refusal of a text that does not follow its skeleton, showing both from shortly before
    they part.
    """
    begin = max(0, len(common_prefix(expected, found)) - 20)
    return MaskError(
        f"{what}: the chat template does not print this conversation as it prints others of the"
        f" same roles, so no mask can be proven; expected {quote(expected[begin:])}, found"
        f" {quote(found[begin:])}",
        hint=(
            "the template looks into the content (think tags, tool markup, an empty turn): change"
            " the row or template"
        ),
    )
