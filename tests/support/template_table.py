"""Prints the table of docs/chat_templates.md: what the masks make of every chat template that TRL
ships, and of ours.

    python tests/support/template_table.py

A test compares the committed table with what this prints.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from runner.data.chat_template import ChatFormat, MaskError
from runner.data.masking import ConversationMasker
from tests.support.chat_formats import (
    CALL_STOPS,
    CALL_TOKENS,
    LOOK_UP,
    OUR_TEMPLATES,
    SPECIAL_TOKENS,
    build_tokenizer,
    call_look_up,
    trl_template,
    trl_template_names,
)

CHATS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {
    "single": (
        [{"role": "user", "content": "Question"}, {"role": "assistant", "content": "Answer"}],
        [],
    ),
}
_USER, _ANSWER = CHATS["single"][0]
CHATS["rounds"] = ([_USER, _ANSWER, _USER, _ANSWER], [])
CHATS["system"] = ([{"role": "system", "content": "Rules"}, _USER, _ANSWER], [])
CHATS["call"] = (
    [
        _USER,
        {"role": "assistant", "content": "", "tool_calls": [call_look_up(word="tree")]},
        {"role": "tool", "name": "look_up", "tool_call_id": "call00001", "content": "A plant."},
        _ANSWER,
    ],
    [LOOK_UP],
)
CHATS["thought"] = ([_USER, {**_ANSWER, "reasoning_content": "Thought"}], [])


def describe(
    masker: ConversationMasker, chat: list[dict[str, Any]], tools: list[dict[str, Any]]
) -> tuple[bool, str]:
    """True and the last completion for an accepted conversation; else False and the refusal."""
    try:
        mask = masker.mask(chat, tools)
    except MaskError as error:
        return False, error.message
    start, end = mask.completion_chars[-1]
    return True, mask.text[start:end]


def prints_date(tokenizer: Any) -> bool:
    """True if a plain conversation shows the date, so that `model.template_date` is required."""
    is_accepted, refusal = describe(ConversationMasker(tokenizer), *CHATS["single"])
    return not is_accepted and "prints today's date" in refusal


def code(text: str) -> str:
    """Text as inline code of one table cell."""
    return f"`{text.replace(chr(10), '⏎').replace('|', chr(92) + '|')}`"


def table_lines() -> Iterator[str]:
    templates = {name: trl_template(name) for name in trl_template_names()} | OUR_TEMPLATES
    yield (
        "| chat template | single turn | two rounds | with a system turn | a call | a thought |"
        " the last completion, or why refused |"
    )
    yield "|---|---|---|---|---|---|---|"
    for name, template in templates.items():
        tokenizer = build_tokenizer("bytes", template, special=[*SPECIAL_TOKENS, *CALL_TOKENS])
        chat_format = ChatFormat(moment=datetime(2026, 1, 31), stop_tokens=CALL_STOPS)
        masker = ConversationMasker(tokenizer, chat_format)
        found = {kind: describe(masker, *chat) for kind, chat in CHATS.items()}
        verdicts = ["yes" if is_accepted else "refused" for is_accepted, _ in found.values()]
        notes = [code(found["rounds"][1])] if found["rounds"][0] else []
        plain = [found[kind] for kind in ("single", "rounds", "system")]
        notes += [text.replace("|", "\\|") for is_accepted, text in plain if not is_accepted][:1]
        if prints_date(tokenizer):
            notes.append("prints the date")
        yield f"| {name} | {' | '.join(verdicts)} | {'; '.join(notes)} |"


if __name__ == "__main__":
    sys.stdout.write("\n".join(table_lines()) + "\n")
