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
    OUR_TEMPLATES,
    build_tokenizer,
    trl_template,
    trl_template_names,
)

SHAPES = {
    "single": ["user", "assistant"],
    "rounds": ["user", "assistant", "user", "assistant"],
    "system": ["system", "user", "assistant"],
}
WORDS = {"system": "Rules", "user": "Question", "assistant": "Answer"}


def describe(masker: ConversationMasker, roles: list[str]) -> tuple[bool, str]:
    """Whether a conversation of these roles is accepted; the text of its last completion, or the
    refusal.
    """
    try:
        mask = masker.mask([{"role": role, "content": WORDS[role]} for role in roles])
    except MaskError as error:
        return False, error.message
    start, end = mask.completion_chars[-1]
    return True, mask.text[start:end]


def prints_date(tokenizer: Any) -> bool:
    """Whether a plain conversation shows the date, so that `model.template_date` must be said."""
    is_accepted, refusal = describe(ConversationMasker(tokenizer), SHAPES["single"])
    return not is_accepted and "prints today's date" in refusal


def code(text: str) -> str:
    """Text as inline code of one table cell."""
    return f"`{text.replace(chr(10), '⏎').replace('|', chr(92) + '|')}`"


def table_lines() -> Iterator[str]:
    templates = {name: trl_template(name) for name in trl_template_names()} | OUR_TEMPLATES
    yield (
        "| chat template | single turn | two rounds | with a system turn | the last completion, or"
        " why refused |"
    )
    yield "|---|---|---|---|---|"
    for name, template in templates.items():
        tokenizer = build_tokenizer("bytes", template)
        masker = ConversationMasker(tokenizer, ChatFormat(moment=datetime(2026, 1, 31)))
        found = {shape: describe(masker, roles) for shape, roles in SHAPES.items()}
        verdicts = ["yes" if is_accepted else "refused" for is_accepted, _ in found.values()]
        notes = [code(found["rounds"][1])] if found["rounds"][0] else []
        notes += [
            text.replace("|", "\\|") for is_accepted, text in found.values() if not is_accepted
        ][:1]
        if prints_date(tokenizer):
            notes.append("prints the date")
        yield f"| {name} | {' | '.join(verdicts)} | {'; '.join(notes)} |"


if __name__ == "__main__":
    sys.stdout.write("\n".join(table_lines()) + "\n")
