"""What ends an assistant's turn under a chat template: the token at which the model must stop.

Found by rendering, never by searching a content: what ends a turn is printed behind its last text
both where the conversation stops there and where somebody speaks next.
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

    `mark` is the sentinel of its last text, `before` what is printed between the message before it
    and its own first text, `own` what is printed behind the mark, up to the next message's text.
    """

    chat: Messages
    index: int
    mark: str
    before: str
    own: str
    method: str
    tools: Tools = ()


def find_end(template: ChatTemplate, turn: TurnText) -> tuple[int, str | None]:
    """How many characters of `turn.own` belong to the turn, and the special token that ends it.

    The token is the last one that what is printed here has in common with what is printed where the
    conversation goes on, or stops: what follows it is a separator, the end of the whole text, or
    the next header. One that is known to stop the model goes before the others. None as token:
    plain text ends the turn.

    Raises: MaskError, where nothing ends the turn, or nobody can tell what does.
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
        # The end of a conversation may differ from the end of a turn (GPT-OSS). One special token
        # leaves no doubt.
        candidates = template.find_specials(turn.own)
        ends = candidates if len(candidates) == 1 else []
    elif not ends and template.find_specials(ending or ""):
        ends = _find_user_end(template, turn)
    if not ends:
        # A token that stops the model and is also the next speaker's header (GLM, Gemma 4). Where
        # the recipe says so of an answer's end, a call ends in the tool's header.
        here = template.find_specials(turn.own)
        stops = [one for one in here if one.group() in template.stop_tokens]
        is_call = bool(turn.chat[turn.index].get("tool_calls"))
        ends = here[:1] if template.appends_end and is_call else stops[:1]
    if ends:
        return ends[0].end(), ends[0].group()
    plain = (ending or "").rstrip()
    if plain and not template.find_specials(plain) and turn.own.startswith(plain):
        # What closes a call is no end: it stops nothing.
        closing = _find_plain_end(template, turn)
        if not turn.chat[turn.index].get("tool_calls") or (closing and plain.endswith(closing)):
            return len(plain), None
    raise _refuse_endless(template, turn)


def _find_witness(template: ChatTemplate, turn: TurnText) -> str | None:
    """What is printed behind the turn where somebody speaks next: a tool after a call, else a
    user.
    """
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
    """The same from the other side: the end of a turn within a conversation is that of the user's
    turns.
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
    """Raises: MaskError, where the template writes the next answer's header behind the last one and
    no token is known to stop the model: the last special token would then be a header's.
    """
    shared = common_prefix(ending[::-1], turn.before[::-1])[::-1]
    if not template.find_specials(shared):
        return
    names = " or ".join(f"`model.end_of_turn: {quote(name)}`" for name in common[:-1])
    raise MaskError(
        f"{describe(turn.chat, turn.index)}: the chat template goes on with {quote(turn.own)} after"
        " every answer, the beginning of the next one, and the tokenizer and the generation config"
        " know none of these tokens as a stop",
        hint=f"say what ends an answer: {names}",
    )


def _find_plain_end(template: ChatTemplate, turn: TurnText) -> str:
    """What the template prints behind a plain answer at the end of a conversation, but for
    whitespace.
    """
    answered = [*turn.chat[: turn.index], {"role": "assistant", "content": PROBE}]
    return (_text_after(template, turn, answered, PROBE) or "").strip()


def _refuse_endless(template: ChatTemplate, turn: TurnText) -> MaskError:
    """The refusal of a turn that nothing ends, and the line to paste where one may help."""
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
        found = "".join(f"{token!r} stands there where a user speaks next; " for token in between)
        token = between[0] if between else template.eos_token
        if between or turn.index == len(turn.chat) - 1:
            hint = (
                f'{found}`model.end_of_turn: "{token}"` appends it to the last answer; or, {hint}'
            )
    return MaskError(
        f"{describe(turn.chat, turn.index)} has no end-of-turn token: the template goes on with"
        f" {quote(turn.own)}, so a model trained on the completion could never learn to stop",
        hint=hint,
    )


def _text_after(
    template: ChatTemplate, turn: TurnText, chat: Messages, mark: str | None = None
) -> str | None:
    """What the template prints after a sentinel; None where it will not render that, or not the
    sentinel.
    """
    mark = mark or turn.mark
    try:
        text = template.render(chat, turn.method, tools=turn.tools)
    except MaskError:
        return None
    return text.partition(mark)[2] if mark.strip() and mark in text else None
