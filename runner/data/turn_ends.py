"""The end of an assistant's turn under a chat template: the token at which the model must stop.

It is found by rendering, never by searching a content: the template prints the end of a turn after
its last text, both if the conversation stops there and if someone speaks next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from runner.data.chat_template import (
    PROBE,
    ChatTemplate,
    MaskError,
    Messages,
    Tools,
    common_prefix,
    describe,
    quote,
)


@dataclass(frozen=True)
class TurnText:
    """One assistant turn in a rendered conversation of sentinels.

    `mark` is the sentinel of its last text. `before` is the text between the previous message and
    its own first text. `own` is the text after the mark, up to the next message's text.
    """

    chat: Messages
    index: int
    mark: str
    before: str
    own: str
    method: str
    tools: Tools = ()


def find_end(template: ChatTemplate, turn: TurnText) -> tuple[int, str | None]:
    """The number of characters of `turn.own` that belong to the turn, and the special token that
    ends it; None as token if plain text ends the turn.

    The token is the last one that two renderings have in common: one in which the conversation
    stops after the turn, and one in which it continues. The text after it is a separator, the end
    of the whole text, or the next header. A token that is known to stop the model takes precedence.

    Raises: MaskError, if nothing ends the turn, or the end is ambiguous.
    """
    is_last = turn.index == len(turn.chat) - 1
    ending = turn.own if is_last else _text_after(template, turn, turn.chat[: turn.index + 1])
    witness = _find_witness(template, turn) if is_last else ending
    common = template.find_specials(common_prefix(turn.own, witness or ""))
    known = [special for special in common if special.group() in template.stop_tokens]
    ends = (known or common)[-1:]
    if len(common) > 1 and not known:
        _refuse_generation_prompt(template, turn, ending or "", [one.group() for one in common])
    if not ends and is_last:
        # The end of a conversation may differ from the end of a turn (GPT-OSS). A single special
        # token is unambiguous.
        candidates = template.find_specials(turn.own)
        ends = candidates if len(candidates) == 1 else []
    elif not ends and template.find_specials(ending or ""):
        ends = _find_user_end(template, turn)
    if not ends:
        # A token that stops the model may also be the next speaker's header (GLM, Gemma 4). If the
        # recipe states this for the end of an answer, a call ends with the tool's header.
        here = template.find_specials(turn.own)
        stops = [one for one in here if one.group() in template.stop_tokens]
        is_call = bool(turn.chat[turn.index].get("tool_calls"))
        ends = here[:1] if template.appends_end and is_call else stops[:1]
    if ends:
        return ends[0].end(), ends[0].group()
    plain = (ending or "").rstrip()
    if plain and not template.find_specials(plain) and turn.own.startswith(plain):
        # The closing text of a call is not an end, because it does not stop the model.
        closing = _find_plain_end(template, turn)
        if not turn.chat[turn.index].get("tool_calls") or (closing and plain.endswith(closing)):
            return len(plain), None
    raise _refuse_endless(template, turn)


def _find_witness(template: ChatTemplate, turn: TurnText) -> str | None:
    """The text after the turn if someone speaks next: a tool after a call, otherwise a user."""
    following: list[dict[str, Any]] = [{"role": "user", "content": PROBE}]
    calls = turn.chat[turn.index].get("tool_calls")
    if calls:
        answer = {"role": "tool", "content": PROBE, "name": calls[-1]["function"]["name"]}
        if "id" in calls[-1]:
            answer["tool_call_id"] = calls[-1]["id"]
        following.insert(0, answer)
    found = [
        _text_after(template, turn, [*turn.chat[: turn.index + 1], message])
        for message in following
    ]
    for text in found:
        if text is not None and template.find_specials(common_prefix(turn.own, text)):
            return text
    return next((text for text in found if text is not None), None)


def _find_user_end(template: ChatTemplate, turn: TurnText) -> list[Any]:
    """The end of a turn, found from the user's turns: within a conversation, the turns of both
    roles end in the same way.
    """
    users = [n for n in range(turn.index) if turn.chat[n]["role"] == "user"]
    if not users:
        return []
    asked = [*turn.chat[: users[-1]], {"role": "user", "content": PROBE}]
    closing = _text_after(template, turn, asked, PROBE)
    return template.find_specials(common_prefix(turn.own, closing or ""))[-1:]


def _refuse_generation_prompt(
    template: ChatTemplate, turn: TurnText, ending: str, common: list[str]
) -> None:
    """Raises: MaskError, if the template prints the next answer's header after the last one and no
    token is known to stop the model. The last special token would then be part of a header.
    """
    shared = common_prefix(ending[::-1], turn.before[::-1])[::-1]
    if not template.find_specials(shared):
        return
    names = " or ".join(f"`model.end_of_turn: {quote(name)}`" for name in common[:-1])
    raise MaskError(
        f"{describe(turn.chat, turn.index)}: the chat template prints {quote(turn.own)} after every"
        " answer, which is the beginning of the next one, and neither the tokenizer nor the"
        " generation config names one of these tokens as a stop",
        hint=f"name the token that ends an answer: {names}",
    )


def _find_plain_end(template: ChatTemplate, turn: TurnText) -> str:
    """The text that the template prints after a plain answer at the end of a conversation, without
    whitespace around it.
    """
    answered = [*turn.chat[: turn.index], {"role": "assistant", "content": PROBE}]
    return (_text_after(template, turn, answered, PROBE) or "").strip()


def _refuse_endless(template: ChatTemplate, turn: TurnText) -> MaskError:
    """The refusal of a turn without an end; its hint has a line to paste if one may help."""
    hint = (
        "in the chat template, print {{ eos_token }}, or another special token of the"
        " tokenizer, right after every assistant content"
    )
    if template.format.end_of_turn is None and not _find_plain_end(template, turn):
        answered = [
            {"role": "user", "content": PROBE * 2},
            {"role": "assistant", "content": PROBE * 3},
            {"role": "user", "content": PROBE * 2},
        ]
        behind = (_text_after(template, turn, answered, PROBE * 3) or "").lstrip()
        between = [one.group() for one in template.find_specials(behind) if one.start() == 0]
        found = "".join(f"{token!r} is printed there if a user speaks next; " for token in between)
        token = between[0] if between else template.eos_token
        if between or turn.index == len(turn.chat) - 1:
            hint = (
                f'{found}`model.end_of_turn: "{token}"` appends it to the last answer; or, {hint}'
            )
    return MaskError(
        f"{describe(turn.chat, turn.index)} has no end-of-turn token: the template continues with"
        f" {quote(turn.own)}, so a model trained on the completion could never learn to stop",
        hint=hint,
    )


def _text_after(
    template: ChatTemplate, turn: TurnText, chat: Messages, mark: str | None = None
) -> str | None:
    """The text that the template prints after a sentinel; None if it refuses the chat, or does not
    print the sentinel.
    """
    mark = mark or turn.mark
    try:
        text = template.render(chat, turn.method, tools=turn.tools)
    except MaskError:
        return None
    return text.partition(mark)[2] if mark.strip() and mark in text else None
