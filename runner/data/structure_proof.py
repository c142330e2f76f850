"""The second proof of a mask: for conversations with tools, calls and thoughts, and for contents
that a template splits.

Every text of a row is a *leaf*: a content, a thought, a call's name, each value of its arguments.
The conversation is rendered a second time with a sentinel, a *mark*, in the place of each leaf. The
text between the marks is the template's own. The row's real rendering must be that text and the
leaves laid end to end, each leaf as it is or escaped as JSON. Every place is then a sum of known
lengths, as in the first proof: the texts of a row are never searched.

A completion begins where the generation prompt ends: the rendering of the messages before the turn,
with the generation prompt, is the beginning of the whole. It ends where `turn_ends` says.
Whitespace around a leaf, and the tags at which a template splits contents (`<think>`), are not
changed in the rendering of marks, so the template treats both renderings in the same way.

If the template does not print a text of a turn to train, the row is refused, and the error names
that text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

from runner.data.chat_template import (
    METHOD_PARTS,
    METHOD_TEXT,
    PROBE,
    ChatTemplate,
    MaskError,
    Message,
    Messages,
    Tools,
    common_prefix,
    describe,
    describe_difference,
    quote,
)
from runner.data.leaves import THINK_TAGS, Leaf, Marking
from runner.data.skeleton import describe_rewriting, prints_prompt_unasked
from runner.data.turn_ends import TurnText, find_end
from runner.strict import thaw

METHOD_MARKS: Final = "marks in every text, call and thought"

# Leaves that the recipe can leave out, and their names in `data.ignore`.
_IGNORABLE: Final = {"`reasoning_content`": "messages.reasoning_content"}
_OTHER_TEMPLATE: Final = "name a chat template that prints it in `model.chat_template`"


class UnprintedError(MaskError):
    """The chat template leaves out a text of the row."""


@dataclass(frozen=True)
class ProvenTurn:
    """One completion, in characters of the text; `texts` are the places of the row's texts in
    it.
    """

    message: int
    start: int
    end: int
    texts: tuple[tuple[int, int], ...]
    end_token: str | None
    rewritten: str | None


@dataclass(frozen=True)
class ProvenText:
    """A conversation as the template prints it: the places of its wanted turns, and of each
    message's leaves. `render` prints it under another template in the same way.
    """

    text: str
    method: str
    turns: tuple[ProvenTurn, ...]
    content_chars: tuple[tuple[int, int] | None, ...]
    render: Callable[[ChatTemplate], str]


def prove_structure(
    template: ChatTemplate,
    messages: Messages,
    tools: Tools,
    wanted: Sequence[int],
    untrained: Collection[int] = (),
) -> ProvenText:
    """The places of the wanted turns; the untrained ones among them may lack their thoughts.

    Raises: MaskError, if they cannot be proven; UnprintedError, if the template leaves out a text
        of a turn.
    """
    refusals: list[MaskError] = []
    for method in (METHOD_TEXT, METHOD_PARTS):
        for has_json_arguments in (False, True):
            try:
                return _prove(
                    template, messages, tools, wanted, untrained, method, has_json_arguments
                )
            except MaskError as error:
                refusals.append(error)
            if not any(message.get("tool_calls") for message in messages):
                break
    # A text that is left out is a better reason than an error on another form of the arguments.
    by_name = [refusal for refusal in refusals if isinstance(refusal, UnprintedError)]
    not_raised = [refusal for refusal in refusals if refusal.__cause__ is None]
    raise (by_name or not_raised or refusals)[0]


def _prove(
    template: ChatTemplate,
    messages: Messages,
    tools: Tools,
    wanted: Sequence[int],
    untrained: Collection[int],
    method: str,
    has_json_arguments: bool,
) -> ProvenText:
    shape = (lambda call: json.dumps(call, ensure_ascii=False)) if has_json_arguments else None
    real = [_with_arguments(thaw(message), shape) for message in messages]
    real_tools = [thaw(tool) for tool in tools]
    text = template.render(real, method, tools=real_tools)
    for index, message in enumerate(real):
        if "name" in message and message["role"] != "tool":
            nameless = [dict(one) for one in real]
            del nameless[index]["name"]
            _refuse_unprinted_name(text, template.render(nameless, method, tools=real_tools), index)
    marking = Marking(template, text, repr(real_tools))
    marked = [
        _with_arguments(marking.mark_message(index, thaw(message)), shape)
        for index, message in enumerate(messages)
    ]
    marked_tools = [marking.mark_tool(tool) for tool in real_tools]
    rendered = template.render(marked, method, tools=marked_tools)
    if not has_json_arguments:
        _refuse_python_source(marked, rendered)
    _refuse_unprinted_tools(marking.leaves, rendered)
    if "'type': 'text'" in rendered:
        raise MaskError(
            "the chat template prints a content as Python source",
            hint="name another chat template in `model.chat_template`",
        )
    walk = _Walk(marking.leaves, rendered)
    turns = []
    places = _Places(template, marked, marked_tools, method, walk)
    trained = [index for index in wanted if index not in untrained]
    for index in trained:
        places.require_printed(index, messages[index])
    for index in range(len(messages)):
        if index not in trained:
            places.require_context(index)
    places.require_order()
    walk.follow(text, messages)
    for index in wanted:
        turns.append(places.find_turn(index, text))
    for earlier, later in pairwise(turns):
        if earlier.end > later.start:
            raise MaskError(
                f"the chat template prints {describe(messages, later.message)} before the end of"
                f" {describe(messages, earlier.message)}: their completions would overlap",
                hint="use a chat template that keeps the order of the turns",
            )
    return ProvenText(
        text,
        f"{METHOD_MARKS}{', content as a list of parts' if method == METHOD_PARTS else ''}",
        tuple(turns),
        tuple(walk.find_content(index) for index in range(len(messages))),
        lambda other: other.render(real, method, tools=real_tools),
    )


def _with_arguments(message: dict[str, Any], dump: Callable[[Any], str] | None) -> dict[str, Any]:
    """The message with its calls' arguments converted by `dump`; unchanged if `dump` is None."""
    if dump is None or not message.get("tool_calls"):
        return message
    calls = [
        call | {"function": call["function"] | {"arguments": dump(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return message | {"tool_calls": calls}


def _refuse_python_source(marked: Messages, rendered: str) -> None:
    """Raises: MaskError, if the template prints arguments as a Python dict."""
    for index, message in enumerate(marked):
        for call in message.get("tool_calls") or ():
            arguments = call["function"]["arguments"]
            source = str(arguments)
            if source in rendered and source != json.dumps(arguments, ensure_ascii=False):
                raise MaskError(
                    f"{describe(marked, index)}: the chat template prints the arguments of a call"
                    f" as Python source, {quote(source)}",
                    hint="use a chat template that prints them as JSON",
                )


def _refuse_unprinted_tools(leaves: Sequence[Leaf], rendered: str) -> None:
    for leaf in leaves:
        if leaf.message is None and leaf.mark not in rendered:
            raise UnprintedError(
                f"the chat template does not print {leaf.what}:"
                " the model would not know what it may call",
                hint=f"{_OTHER_TEMPLATE}, or leave the tools out: `data.ignore: [tools]`",
            )


def _refuse_unprinted_name(text: str, without: str, index: int) -> None:
    if text == without:
        raise UnprintedError(
            f"the chat template does not print the `name` of message {index}",
            hint=f"{_OTHER_TEMPLATE}, or leave it out: `data.ignore: [messages.name]`",
        )


@dataclass(frozen=True)
class _Piece:
    """One mark in the rendering of marks, and the template's text before it."""

    before: str
    leaf: Leaf
    start: int  # of the mark in the rendering of marks
    end: int


class _Walk:
    """The rendering of marks split into pieces, and the real text matched against them."""

    def __init__(self, leaves: Sequence[Leaf], rendered: str) -> None:
        self.rendered = rendered
        by_mark = {leaf.mark: leaf for leaf in leaves}
        pattern = re.compile("|".join(map(re.escape, by_mark)) or "(?!)")
        self.pieces: list[_Piece] = []
        position = 0
        for found in pattern.finditer(rendered):
            leaf = by_mark[found.group()]
            self.pieces.append(_Piece(rendered[position : found.start()], leaf, *found.span()))
            position = found.end()
        self.tail = rendered[position:]
        self.leaves = leaves
        self._places: list[tuple[int, int]] = []  # of each piece's leaf in the real text

    def unmark(self, text: str) -> str:
        """The text with an ellipsis for each mark, for errors."""
        for leaf in self.leaves:
            text = text.replace(leaf.mark, "…")
        return text

    def leaves_of(self, index: int) -> list[Leaf]:
        """The leaves of a message."""
        return [leaf for leaf in self.leaves if leaf.message == index]

    def pieces_of(self, index: int) -> list[int]:
        """The pieces of a message's own text, in printed order. A name that a tool's answer repeats
        counts at its first place.
        """
        seen: set[str] = set()
        found = []
        for rank, piece in enumerate(self.pieces):
            if piece.leaf.message == index and piece.leaf.mark not in seen:
                seen.add(piece.leaf.mark)
                found.append(rank)
        return found

    def text_after(self, rank: int) -> str:
        """The template's own text after a piece's mark."""
        return self.pieces[rank + 1].before if rank + 1 < len(self.pieces) else self.tail

    def follow(self, text: str, messages: Messages) -> None:
        """Prove that the text is the template's own text and the leaves, laid end to end.

        Raises: MaskError, naming the first place that differs.
        """
        places: list[tuple[int, int]] = []
        position = 0
        rests = [piece.before for piece in self.pieces[1:]] + [self.tail]
        for piece, rest in zip(self.pieces, rests, strict=True):
            position += self._step(text, position, piece.before, piece.leaf, messages)
            # If one variant is the beginning of another, the text that follows decides.
            fitting = [
                variant
                for variant in piece.leaf.variants
                if text.startswith(variant + rest, position)
            ] or [v for v in piece.leaf.variants if text.startswith(v, position)]
            if not fitting:
                raise _mismatch(piece.leaf, piece.leaf.variants[0], text[position:], messages)
            length = max(map(len, fitting))
            places.append((position, position + length))
            position += length
        if text[position:] != self.tail:
            last = self.pieces[-1].leaf if self.pieces else None
            raise _mismatch(last, self.tail, text[position:], messages)
        self._places = places

    @staticmethod
    def _step(text: str, position: int, own: str, leaf: Leaf, messages: Messages) -> int:
        if not text.startswith(own, position):
            raise _mismatch(leaf, own, text[position:], messages)
        return len(own)

    def translate(self, position: int) -> int:
        """The place in the real text of a place within the template's own text in the rendering of
        marks.
        """
        shift = 0
        for piece, (_, end) in zip(self.pieces, self._places, strict=True):
            if piece.end > position:
                break
            shift = end - piece.end
        return position + shift

    def find_texts(self, index: int) -> tuple[tuple[int, int], ...]:
        """The characters of a message's leaves in the real text."""
        return tuple(self._places[rank] for rank in self.pieces_of(index))

    def find_content(self, index: int) -> tuple[int, int] | None:
        """The characters of the real text from a message's first leaf to its last."""
        texts = self.find_texts(index)
        return (texts[0][0], texts[-1][1]) if texts else None


def _mismatch(leaf: Leaf | None, expected: str, found: str, messages: Messages) -> MaskError:
    where = "the end of the text"
    if leaf is not None:
        where = leaf.what
        if leaf.message is not None:
            where += f" of {describe(messages, leaf.message)}"
    return MaskError(
        f"{where}: the chat template prints this conversation differently from others of the same"
        f" form, so no mask can be proven; {describe_difference(expected, found)}",
        hint="change the row or the template: the template changes some text, or reacts to it",
    )


class _Places:
    """The places of the turns in a rendering of marks."""

    def __init__(
        self,
        template: ChatTemplate,
        chat: list[dict[str, Any]],
        tools: Tools,
        method: str,
        walk: _Walk,
    ) -> None:
        self._template = template
        self._chat = chat
        self._tools = tools
        self._method = method
        self._walk = walk

    def require_printed(self, index: int, message: Message) -> None:
        """Raises: UnprintedError, if the template leaves out a leaf or a think tag of a turn to
        train; MaskError, if it prints one twice.
        """
        leaves = self._walk.leaves_of(index)
        who = describe(self._chat, index)
        if not leaves:
            raise UnprintedError(
                f"{who} has neither text nor call nor thought: only its end would be trained on",
                hint="remove the message from the row",
            )
        rendered = self._walk.rendered
        for leaf in leaves:
            count = rendered.count(leaf.mark)
            if count == 0:
                raise self._refuse_unprinted(index, leaf.what)
            if count > 1 and not leaf.is_repeatable:
                raise MaskError(
                    f"{who}: the chat template prints {leaf.what} more than once, so its place in"
                    " the text cannot be proven",
                    hint="use a chat template that prints every text exactly once",
                )
        ranks = self._walk.pieces_of(index)
        own = "".join(self._walk.pieces[rank].before for rank in range(ranks[0], ranks[-1] + 1))
        own += self._walk.text_after(ranks[-1])
        for tag in set(THINK_TAGS.findall(str(message.get("content", "")))):
            if own.count(tag) < str(message["content"]).count(tag):
                raise self._refuse_unprinted(index, f"the {tag} in the `content`")

    def _refuse_unprinted(self, index: int, what: str) -> UnprintedError:
        hint = f"{_OTHER_TEMPLATE}, or remove it from the rows"
        if what in _IGNORABLE:
            hint = f"{_OTHER_TEMPLATE}, or leave it out: `data.ignore: [{_IGNORABLE[what]}]`"
        if index < len(self._chat) - 1 and self._prints_alone(index):
            hint = (
                "the template prints it if the conversation ends with this turn:"
                " use `data.turns: split` to train each turn that way, or `data.turns: last` to"
                " train only the last one"
            )
        return UnprintedError(
            f"the chat template does not print {what} of {describe(self._chat, index)}",
            hint=hint,
        )

    def _prints_alone(self, index: int) -> bool:
        with suppress(MaskError):
            text = self._render(self._chat[: index + 1])
            return all(leaf.mark in text for leaf in self._walk.leaves_of(index))
        return False

    def require_context(self, index: int) -> None:
        """Raises: UnprintedError, if the template leaves out a text of a message that is not
        trained on. Earlier thoughts may be left out, because they are left out at inference too.
        """
        leaves = [
            leaf
            for leaf in self._walk.leaves_of(index)
            if "think block" not in leaf.what and leaf.what != "`reasoning_content`"
        ]
        for leaf in leaves:
            if leaf.mark not in self._walk.rendered:
                raise UnprintedError(
                    f"the chat template does not print {leaf.what} of"
                    f" {describe(self._chat, index)}",
                    hint=f"{_OTHER_TEMPLATE}, or remove it from the rows",
                )

    def require_order(self) -> None:
        """Raises: MaskError, if the template prints the messages in another order; a system text
        may move.
        """
        order = [
            index
            for index, message in enumerate(self._chat)
            if message["role"] not in ("system", "developer") and self._walk.pieces_of(index)
        ]
        order.sort(key=lambda index: self._walk.pieces_of(index)[0])
        if order != sorted(order):
            raise MaskError(
                f"the chat template prints the messages in the order {order}:"
                " a completion would not follow its prompt",
                hint="use a chat template that keeps the order of the turns",
            )

    def find_turn(self, index: int, text: str) -> ProvenTurn:
        """One completion in the real text, which follows the rendering of marks."""
        walk = self._walk
        ranks = walk.pieces_of(index)
        if not ranks:
            raise UnprintedError(
                f"the chat template prints nothing of {describe(self._chat, index)}",
                hint="remove the message from the row",
            )
        first, last = walk.pieces[ranks[0]], walk.pieces[ranks[-1]]
        others = [
            piece.leaf
            for piece in walk.pieces[ranks[0] : ranks[-1] + 1]
            if piece.leaf.message != index
        ]
        if others:
            raise MaskError(
                f"{describe(self._chat, index)}: the chat template prints another message within"
                " it",
                hint="use a chat template that keeps the order of the turns",
            )
        own = walk.text_after(ranks[-1])
        place = TurnText(
            self._chat, index, last.leaf.mark, first.before, own, self._method, self._tools
        )
        num_tail_chars, end_token = find_end(self._template, place)
        start = self._find_start(index, first)
        texts = walk.find_texts(index)
        return ProvenTurn(
            message=index,
            start=walk.translate(start),
            end=texts[-1][1] + num_tail_chars,
            texts=texts,
            end_token=end_token,
            rewritten=self._find_rewriting(index, first, last),
        )

    def _find_start(self, index: int, first: _Piece) -> int:
        """The start of the turn in the rendering of marks: after the generation prompt, which the
        model is given.

        If the text does not continue the prompt (DeepSeek R1, Nemotron), a turn that begins with
        its content starts there, as in the first proof. A turn that begins with a call or a thought
        starts after the part of the role header that the text and the prompt share.
        """
        rendered = self._walk.rendered
        lowest = first.start - len(first.before)
        prompt = self._render(self._chat[:index], add_generation_prompt=True) if index else ""
        without = self._render(self._chat[:index]) if index else ""
        if rendered.startswith(prompt) and lowest <= len(prompt) <= first.start:
            lead = rendered[len(prompt) : first.start]
            if lead.isspace() or not without.startswith(prompt):
                return len(prompt)
            if prints_prompt_unasked(self._render, self._chat[:index]):
                return len(prompt)
            return len(prompt) + self._find_header(index, lead)
        if first.leaf.what == "`content`":
            return first.start
        shared = len(common_prefix(rendered, prompt))
        # Exclude the message before, which may end with a think tag.
        begin = max(lowest, len(common_prefix(rendered, without)))
        thought = THINK_TAGS.search(rendered, begin, shared)
        shared = thought.start() if thought else shared
        length = self._cut(rendered[lowest:shared])
        if not length:
            raise MaskError(
                f"{describe(self._chat, index)} does not continue the generation prompt, so it is"
                " unknown where the model would begin to write; the prompt ends with"
                f" {quote(prompt[-40:])}, the turn begins with {quote(first.before[-40:])}",
                hint=(
                    "try template arguments that change the prompt, such as"
                    " `model.chat_template_kwargs: {enable_thinking: false}`"
                ),
            )
        return lowest + length

    def _find_header(self, index: int, lead: str) -> int:
        """The length of the role header in the text before a turn's first leaf, under a template
        without a generation prompt: the part that a plain answer has there too.
        """
        plain = [*self._chat[:index], {"role": "assistant", "content": PROBE}]
        text = self._render(plain)
        before = text.partition(PROBE)[0]
        header = before.removeprefix(self._render(self._chat[:index]) if index else "")
        if PROBE not in text or header.isspace() or not header:
            return 0
        if lead.startswith(header):
            return len(header)
        # All turns begin with a role header. If they share nothing, it is earlier in the text.
        shared = self._leave_whole(common_prefix(lead, header), lead, header)
        length = self._cut(shared)
        if shared and not length:
            raise MaskError(
                f"{describe(self._chat, index)}: the chat template has no generation prompt, and"
                " prints this turn with another header than a plain answer",
                hint="use a chat template with a generation prompt",
            )
        return length

    def _leave_whole(self, shared: str, *texts: str) -> str:
        """A common beginning of texts, cut so that it does not end within a special token."""
        for text in texts:
            for special in self._template.find_specials(text):
                if special.start() < len(shared) < special.end():
                    shared = shared[: special.start()]
        return shared

    def _cut(self, shared: str) -> int:
        """The length of a text up to its last whole special token or line; 0 if it has neither."""
        cuts = [found.end() for found in self._template.find_specials(shared)]
        return max([*cuts, shared.rfind("\n") + 1])

    def _find_rewriting(self, index: int, first: _Piece, last: _Piece) -> str | None:
        """Describe the difference from the same turn at the end of a conversation; None if there is
        none.
        """
        if index == len(self._chat) - 1:
            return None
        with suppress(MaskError):
            alone = _Walk(self._walk.leaves, self._render(self._chat[: index + 1]))
            ranks = alone.pieces_of(index)
            if not ranks:
                return None
            begin = alone.pieces[ranks[0]]
            end = alone.pieces[ranks[-1]]
            here = self._walk.rendered[first.start - len(first.before) : last.end]
            there = alone.rendered[begin.start - len(begin.before) : end.end]
            if here != there:
                return describe_rewriting(self._walk.unmark(here), self._walk.unmark(there))
        return None

    def _render(self, chat: Messages, *, add_generation_prompt: bool = False) -> str:
        return self._template.render(
            chat, self._method, tools=self._tools, add_generation_prompt=add_generation_prompt
        )
