"""Labels: the tokens of a chat that are trained on, proven from the chat template or refused.

Owns the step from messages to `input_ids`, completion spans and `labels`, in pure Python. Does not
own the source of the messages, truncation, or batching. A *completion* is one assistant turn up to
and including its end-of-turn token.

A mask is found by rendering the template with a unique sentinel for every content. That yields the
template's own text between the contents, the skeleton (`skeleton`). A row is accepted only if its
real rendering is exactly the skeleton and the contents laid end to end. Every position is then a
sum of known lengths: no content is ever searched, so no text of a user can move the mask. Rows with
tools, calls or thoughts, and contents that a template splits, have a second proof of the same kind
(`structure_proof`). `docs/chat_templates.md` explains both in detail.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Final

from runner.data.chat_template import (
    ANY_MOMENTS,
    ChatFormat,
    ChatTemplate,
    MaskError,
    Messages,
    Tools,
    common_prefix,
    describe,
    describe_difference,
    get_chat_format,
    quote,
)
from runner.data.skeleton import Shape, Skeleton, Skeletons
from runner.data.structure_proof import ProvenText, ProvenTurn, UnprintedError, prove_structure
from runner.recipe.schema import Loss
from runner.strict import list_texts

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
    """One assistant turn among the tokens. `contents` are, for each text of the row, the tokens
    that hold at least one byte of it. `num_bytes` counts the bytes of these texts as printed,
    without those of the conversation's first token. The rest of `span` is the template's text.

    `rewritten` is None if the template prints the turn, apart from its end, as it does when the
    conversation ends there; otherwise it describes the difference.
    """

    message: int
    span: CompletionSpan
    contents: tuple[CompletionSpan, ...]
    num_bytes: int
    rewritten: str | None = None


@dataclass(frozen=True)
class MaskedConversation:
    """One tokenized chat and its completions.

    For viewers, all half open: `offsets[i]` are the characters of `text` that token i represents,
    `content_chars[i]` those of message i (None for an empty one that the template leaves out), and
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
    """One label per token: its id if it is trained on, otherwise `IGNORE_INDEX`. `untrained` turns,
    those of weight 0, have no labels under any loss.

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


def list_trained(
    num_tokens: int,
    spans: Sequence[CompletionSpan],
    loss: Loss,
    untrained: Sequence[CompletionSpan] = (),
) -> list[Interval]:
    """The ascending, disjoint intervals in which `build_labels` has labels.

    >>> list_trained(8, [CompletionSpan(1, 3)], "full", [CompletionSpan(4, 6)])
    [(0, 4), (6, 8)]
    >>> list_trained(8, [CompletionSpan(1, 3), CompletionSpan(5, 8)], "completion")
    [(1, 3), (5, 8)]
    """
    if loss != "full":
        kept = spans[-1:] if loss == "last_completion" else spans
        return [(span.start, span.end) for span in kept]
    trained, position = [], 0
    for span in untrained:
        trained.append((position, span.start))
        position = span.end
    return [(start, end) for start, end in [*trained, (position, num_tokens)] if start < end]


def end_of_turn_ids(tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end an assistant's turn under the tokenizer's chat template: the last tokens
    of completions, including completions that end in a call.

    There are two if the template ends a conversation in another way than a turn (GPT-OSS), and none
    if plain text ends a turn.

    Raises: MaskError, if the template has no end of turn, or there is no chat template.
    """
    template = ChatTemplate(tokenizer)
    skeletons = Skeletons(template)
    pair: Shape = (("user", None), ("assistant", None))
    turns = list(skeletons.find(pair).turns)
    with suppress(MaskError):  # a template may accept single questions only
        turns += skeletons.find(pair + pair).turns
    if turns[1].refusal:
        raise turns[1].refusal
    ends: dict[str | None, None] = dict.fromkeys(turn.end_token for turn in turns)
    with suppress(MaskError):  # a template without calls
        ends |= dict.fromkeys(
            turn.end_token for turn in prove_structure(template, _CALLING, (_TOOL,), (1,)).turns
        )
    tokens = [token for token in ends if token is not None]
    return tuple(int(tokenizer.convert_tokens_to_ids(token)) for token in tokens)


_TOOL: Final = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks a word up.",
        "parameters": {
            "type": "object",
            "properties": {"word": {"type": "string", "description": "The word."}},
            "required": ["word"],
        },
    },
}
_CALL: Final = {
    "type": "function",
    "id": "call00000",  # Mistral's are nine letters and digits
    "function": {"name": "look_up", "arguments": {"word": "tree"}},
}
_CALLING: Final = (
    {"role": "user", "content": "What is a tree?"},
    {"role": "assistant", "content": "", "tool_calls": [_CALL]},
)


class ConversationMasker:
    """Masks conversations under one tokenizer and its current chat template, in one format, by
    default the tokenizer's (`load_tokenizer`).
    """

    def __init__(self, tokenizer: Any, chat_format: ChatFormat | None = None) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise MaskError(
                f"{type(tokenizer).__name__} is a slow tokenizer, which does not report the"
                " characters of a token",
                hint=(
                    "add a tokenizer.json to the model,"
                    " which AutoTokenizer.from_pretrained(model) then loads"
                ),
            )
        self._tokenizer = tokenizer
        self._added_ids = frozenset(tokenizer.added_tokens_decoder)
        chat_format = chat_format or get_chat_format(tokenizer)
        moments = ANY_MOMENTS if chat_format.moment is None else (chat_format.moment,)
        self._template, *others = [
            ChatTemplate(tokenizer, replace(chat_format, moment=moment)) for moment in moments
        ]
        # The template on another day.
        self._other = others[0] if others and self._template.reads_clock else None
        self._skeletons = Skeletons(self._template)
        # Holds each number once: the tokenizer makes an object of 28 bytes for every token.
        self._numbers: dict[int, int] = {}

    def mask(
        self,
        messages: Messages,
        tools: Tools = (),
        *,
        turns: Collection[int] | None = None,
        untrained: Collection[int] = (),
    ) -> MaskedConversation:
        """The tokens and proven completions of one conversation.

        `tools` are the functions that the assistant may call, as JSON schemas. `turns` are the
        indices of the assistant messages that are completions, None for all of them. The others are
        context, whose thoughts the template may leave out. `untrained` are context messages of the
        assistant whose places are needed nevertheless.

        Raises: MaskError.
        """
        _check_messages(messages, self._describe_roles)
        for tool in tools:
            _check_characters(tool, "a tool")
        wanted = _list_wanted(messages, turns, untrained)
        if tools or any(set(message) - {"role", "content"} for message in messages):
            proven = prove_structure(self._template, messages, tools, wanted, untrained)
        else:
            proven = self._prove_texts(messages, wanted, untrained)
        masked = self._tokenize(messages, proven)
        self._refuse_dates(proven)
        return masked

    def _refuse_dates(self, proven: ProvenText) -> None:
        """Raises: MaskError, if the template prints the date in this conversation, and the recipe
        does not set one.
        """
        if self._other is None:
            return
        other = proven.render(self._other)
        if other == proven.text:
            return
        begin = max(0, len(common_prefix(proven.text, other)) - 20)
        raise MaskError(
            f"the chat template prints today's date ({quote(proven.text[begin:], 40)} on one day,"
            f" {quote(other[begin:], 40)} on another), so the same recipe would train on other"
            " tokens tomorrow",
            hint="fix the date: `model.template_date: '2026-01-01'`, or any other day",
        )

    def _describe_roles(self) -> str:
        """The roles that the chat template renders in their usual place, found by trying."""
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
                self._skeletons.find(tuple((each, None) for each in usual[role]))
                accepted.append(role)
        return f"this chat template accepts {', '.join(accepted) or 'none of them'}"

    def _prove_texts(
        self, messages: Messages, wanted: Sequence[int], untrained: Collection[int]
    ) -> ProvenText:
        """The first proof, for conversations of plain texts."""
        skeleton = self._skeletons.find(tuple((message["role"], None) for message in messages))
        text = self._template.render(messages, skeleton.method)
        try:
            contents = _prove(skeleton, messages, text)
        except MaskError as refusal:
            # Templates leave a system block out if its text is empty. A blank message has no
            # characters to place, so the skeleton may contain it as it is. This does not hold for
            # an assistant's message, whose end of turn must be placed.
            blank = [m["role"] != "assistant" and not m["content"].strip() for m in messages]
            if not any(blank):
                return self._prove_otherwise(messages, wanted, untrained, refusal)
            skeleton = self._skeletons.find(
                tuple(
                    (m["role"], m["content"] if blank[index] else None)
                    for index, m in enumerate(messages)
                )
            )
            try:
                contents = _prove(skeleton, messages, text)
            except MaskError as still:
                return self._prove_otherwise(messages, wanted, untrained, still)
        places: dict[int, Interval] = {}
        turns = []
        for turn, (start, end) in zip(skeleton.turns, contents, strict=True):
            places[turn.message] = (start, end)
            if turn.message not in wanted:
                continue
            if turn.refusal is not None:
                raise turn.refusal
            turns.append(
                ProvenTurn(
                    message=turn.message,
                    start=start - turn.num_lead_chars,
                    end=end + turn.num_tail_chars,
                    texts=((start, end),),
                    end_token=turn.end_token,
                    rewritten=turn.rewritten,
                )
            )
        content_chars = tuple(places.get(index) for index in range(len(messages)))
        method = skeleton.method
        return ProvenText(
            text,
            method,
            tuple(turns),
            content_chars,
            lambda template: template.render(messages, method),
        )

    def _prove_otherwise(
        self,
        messages: Messages,
        wanted: Sequence[int],
        untrained: Collection[int],
        refusal: MaskError,
    ) -> ProvenText:
        """The second proof, for texts that the template splits. Raises: the refusal of the first
        proof, unless the second can name a text that is not printed.
        """
        try:
            return prove_structure(self._template, messages, (), wanted, untrained)
        except UnprintedError:
            raise
        except MaskError:
            raise refusal from None

    def _tokenize(self, messages: Messages, proven: ProvenText) -> MaskedConversation:
        """Tokens of the whole text, tokenized once, and the completions among them."""
        text = proven.text
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
        starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
        completions: list[Completion] = []
        for turn in proven.turns:
            first, last = bisect_right(ends, turn.start), bisect_left(starts, turn.end)
            # A header token that absorbs whitespace to its right (`rstrip`) extends into the
            # completion, but is still part of the header.
            while (
                first < last and starts[first] < turn.start and input_ids[first] in self._added_ids
            ):
                first += 1
            span = CompletionSpan(first, last)
            previous_end = completions[-1].span.end if completions else 0
            self._check_span(span, turn, messages, input_ids, previous_end)
            seen = (starts[first], ends[last - 1])
            self._check_others(messages, turn.message, seen, proven.content_chars)
            contents = tuple(_find_tokens(said, span, starts, ends) for said in turn.texts)
            # The first token of a conversation is not predicted.
            unscored = 0 if span.start else ends[0]
            num_bytes = sum(
                len(text[max(begin, unscored) : end].encode()) for begin, end in turn.texts
            )
            completions.append(Completion(turn.message, span, contents, num_bytes, turn.rewritten))
        return MaskedConversation(
            input_ids=tuple(map(self._numbers.setdefault, input_ids, input_ids)),
            spans=tuple(completion.span for completion in completions),
            method=proven.method,
            text=text,
            offsets=tuple(offsets),
            content_chars=proven.content_chars,
            completion_chars=tuple((turn.start, turn.end) for turn in proven.turns),
            completions=tuple(completions),
        )

    @staticmethod
    def _check_others(
        messages: Messages, index: int, seen: Interval, contents: Sequence[Interval | None]
    ) -> None:
        """Raises: MaskError, if characters of another message are among those of a completion's
        tokens.
        """
        for other, content in enumerate(contents):
            if content is None or other == index or content[0] == content[1]:
                continue
            if seen[0] < content[1] and content[0] < seen[1]:
                raise MaskError(
                    f"a token of {describe(messages, index)} also holds characters of"
                    f" {describe(messages, other)}: the chat template prints nothing between them"
                    " that separates the tokens",
                    hint=(
                        "in the chat template, put a special token or a newline between the turns"
                    ),
                )

    def _check_span(
        self,
        span: CompletionSpan,
        turn: ProvenTurn,
        messages: Messages,
        input_ids: Sequence[int],
        previous_end: int,
    ) -> None:
        """Raises: MaskError, unless the span has tokens that belong to no other turn, and ends with
        the end-of-turn token.
        """
        who = describe(messages, turn.message)
        if not previous_end <= span.start < span.end:
            raise MaskError(f"{who} shares all of its tokens with another turn")
        if turn.end_token is None:
            return
        expected = self._tokenizer.convert_tokens_to_ids(turn.end_token)
        if input_ids[span.end - 1] != expected:
            found = self._tokenizer.convert_ids_to_tokens(input_ids[span.end - 1])
            raise MaskError(
                f"{who} should end in the token {turn.end_token!r} (id {expected}),"
                f" but the tokenizer turns the text there into {found!r}",
                hint=(
                    f"register {turn.end_token!r} as a special token, and check the last"
                    " characters of the content"
                ),
            )


def _find_tokens(
    said: Interval, span: CompletionSpan, starts: Sequence[int], ends: Sequence[int]
) -> CompletionSpan:
    """The tokens of a completion that hold one of its texts; an empty text has none."""
    first = min(max(bisect_right(ends, said[0]), span.start), span.end)
    last = max(first, min(bisect_left(starts, said[1]), span.end))
    return CompletionSpan(first, first if said[0] == said[1] else last)


_HALF_CHARACTER: Final = re.compile("[\ud800-\udfff]")


def _list_wanted(
    messages: Messages, turns: Collection[int] | None, untrained: Collection[int]
) -> list[int]:
    """The assistant messages whose places must be proven, in order."""
    assistants = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    if not assistants:
        raise MaskError(
            "the conversation has no assistant turn, so there is no completion to train on"
        )
    if turns is None:
        return assistants
    assert {*turns, *untrained} <= set(assistants), "completions are the assistant's"
    return sorted({*turns, *untrained})


# Keys of a message in addition to role and content -> the types of their values.
_KEYS: Final[Mapping[str, type | tuple[type, ...]]] = {
    "reasoning_content": str,
    "tool_calls": (list, tuple),
    "tool_call_id": str,
    "name": str,
}


def _check_messages(messages: Messages, describe_roles: Callable[[], str]) -> None:
    """Raises: MaskError, if a message is not a known role and a text, or has something that no mask
    covers.
    """
    for index, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise MaskError(
                f"message {index} has the role {role!r},"
                f" expected one of {', '.join(ROLES)}; {describe_roles()}",
                hint=(
                    "rename the role in the data, for example to `user` for a speaker who uses a"
                    " tool or sets a scene"
                ),
            )
        if not isinstance(content, str):
            raise MaskError(
                f"{describe(messages, index)} has the content"
                f" {quote(repr(content))}, expected a text"
            )
        _check_characters(message, describe(messages, index))
        _check_keys(messages, index)


def _check_characters(value: Any, what: str) -> None:
    halves = (_HALF_CHARACTER.search(text) for text in list_texts(value))
    half = next((found for found in halves if found), None)
    if half is not None:
        raise MaskError(
            f"{what} holds {half.group()!r}, half of a character, which is not text",
            hint="write the file again: its text was cut or decoded wrongly",
        )


def _check_keys(messages: Messages, index: int) -> None:
    message = messages[index]
    wrong = sorted(
        key
        for key in set(message) - {"role", "content"}
        if key not in _KEYS or not isinstance(message[key], _KEYS[key])
    )
    if message["role"] != "assistant":
        wrong += sorted({"tool_calls", "reasoning_content"} & set(message) - set(wrong))
    if wrong:
        raise MaskError(
            f"{describe(messages, index)} has the keys {', '.join(wrong)},"
            " which a mask does not cover there",
            hint=(
                "use only `reasoning_content` (a text) and `tool_calls` (a list) for the assistant,"
                " `tool_call_id` (a text) for a tool, and `name` (a text) for any role"
            ),
        )


def _prove(skeleton: Skeleton, messages: Messages, text: str) -> list[Interval]:
    """The characters of each turn's content, in printed order, if `text` is exactly the skeleton
    and the contents laid end to end.

    Raises: MaskError, naming the first place that differs.
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
    """The refusal of a text that does not follow its skeleton; shows both from shortly before they
    differ.
    """
    return MaskError(
        f"{what}: the chat template prints this conversation differently from others with the same"
        f" roles, so no mask can be proven; {describe_difference(expected, found)}",
        hint=(
            "change the row or the template: the template treats some content (think tags, tool"
            " markup, an empty turn) differently"
        ),
    )
