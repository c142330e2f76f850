"""Masks of random conversations with tools, calls, thoughts and weights, under every template of
TRL's that prints them, against what any right mask has in common.
"""

from __future__ import annotations

import json
from collections import Counter
from datetime import datetime
from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runner.data.chat_template import METHOD_TEXT, ChatFormat, MaskError
from runner.data.masking import ConversationMasker
from tests.support.chat_formats import (
    CALL_STOPS,
    CALL_TOKENS,
    LOOK_UP,
    SPECIAL_TOKENS,
    build_tokenizer,
    call_look_up,
    trl_template,
    trl_template_names,
)
from tests.support.chats import HOSTILE

DAY = datetime(2026, 1, 31)
FEW = settings(
    max_examples=12, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
)
SPECIAL = [*SPECIAL_TOKENS, *CALL_TOKENS]

# TRL's templates that print calls, and those that print thoughts.
PRINTING_CALLS = [
    *("diffusion_gemma", "gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4", "gemma4_v5"),
    *("glm4moe", "gptoss", "lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl", "lfm2_v2"),
    *("llama3_1", "llama3_2", "muse_glimmer", "nemotron_3_5_lightning", "nemotron_3_nano"),
    *("nemotron_3_super", "nemotron_3_ultra", "qwen2_5", "qwen3", "qwen3_5_nothink"),
    *("qwen3_5_think", "qwen3_6", "qwen3_8", "qwen3_instruct_2507", "qwen3_vl"),
]
PRINTING_THOUGHTS = [
    *("diffusion_gemma", "gemma4_v5", "glm4moe", "gptoss", "lfm2_2_5", "lfm2_2_5_v2"),
    *("lfm2_2_5_vl", "muse_glimmer", "nemotron_3_5_lightning", "nemotron_3_nano"),
    *("nemotron_3_super", "nemotron_3_ultra", "qwen3", "qwen3_5_nothink", "qwen3_5_think"),
    *("qwen3_6", "qwen3_8"),
]
Chat = list[dict[str, Any]]


@cache
def masker(name: str) -> ConversationMasker:
    end_of_turn = "<|user|>" if name == "glm4moe" else None
    chat_format = ChatFormat(moment=DAY, end_of_turn=end_of_turn, stop_tokens=CALL_STOPS)
    return ConversationMasker(
        build_tokenizer("bytes", trl_template(name), special=SPECIAL), chat_format
    )


CALLING: Chat = [
    {"role": "user", "content": "A tree?"},
    {"role": "assistant", "content": "", "tool_calls": [call_look_up(word="tree")]},
    {"role": "tool", "name": "look_up", "tool_call_id": "call00001", "content": "a plant"},
    {"role": "assistant", "content": "A plant."},
]
THINKING: Chat = [
    {"role": "user", "content": "2 x 7?"},
    {"role": "assistant", "content": "14", "reasoning_content": "twice seven"},
]


def is_masked(name: str, chat: Chat, tools: list[Any]) -> bool:
    try:
        masker(name).mask(chat, tools)
    except MaskError:
        return False
    return True


def test_the_templates_that_print_calls_and_thoughts_are_these() -> None:
    names = [name for name in trl_template_names() if not name.endswith("_training")]
    assert [name for name in names if is_masked(name, CALLING, [LOOK_UP])] == PRINTING_CALLS
    assert [name for name in names if is_masked(name, THINKING, [])] == PRINTING_THOUGHTS


# --- random conversations: every text begins with a unique word

texts = st.lists(
    st.one_of(
        st.sampled_from(["Hello", " world", "fox.", "\n", " ", "é 😀", 'say "x"', "back\\slash"]),
        st.sampled_from([text for text in HOSTILE if "<|channel|>" not in text]),
        st.text(max_size=5),
    ),
    max_size=3,
).map("".join)


@st.composite
def conversations(draw: st.DrawFn, has_calls: bool, has_thoughts: bool) -> tuple[Chat, set[int]]:
    """A chat of one to three rounds, and the assistant's messages of weight 0."""
    chat: Chat = []

    def word() -> str:
        return f"zq{len(chat)}w{draw(texts)}"

    def answer(**more: Any) -> None:
        message = {"role": "assistant", "content": "", **more}
        if has_thoughts and draw(st.booleans()):
            message["reasoning_content"] = f"thought{word()}"
        chat.append(message)

    for _ in range(draw(st.integers(1, 3))):
        chat.append({"role": "user", "content": word()})
        if has_calls and draw(st.booleans()):
            answer(tool_calls=[call_look_up(word=word())])
            tool = {"role": "tool", "name": "look_up", "tool_call_id": "call00001"}
            chat.append({**tool, "content": word()})
        answer(content=word())
    assistants = [n for n, message in enumerate(chat) if message["role"] == "assistant"]
    untrained = set(draw(st.lists(st.sampled_from(assistants), max_size=2)))
    return chat, untrained - {assistants[-1]}


def says(text: str, wanted: str) -> bool:
    """True if a text holds another one, as it is or escaped as JSON, ignoring outer whitespace."""
    wanted = wanted.strip()
    return any(
        form in text
        for form in (wanted, json.dumps(wanted, ensure_ascii=False)[1:-1], json.dumps(wanted)[1:-1])
    )


def leaves(message: dict[str, Any]) -> list[str]:
    calls = [one["function"]["arguments"]["word"] for one in message.get("tool_calls", ())]
    return [
        text for text in (message["content"], message.get("reasoning_content", ""), *calls) if text
    ]


def find_prompt_end(name: str, before: Chat, tools: list[Any], text: str) -> int:
    """The place where the model begins to write; 0 if the text does not continue the prompt."""
    prompt = masker(name)._template.render(
        before, METHOD_TEXT, tools=tools, add_generation_prompt=True
    )
    return len(prompt) if text.startswith(prompt) else 0


def check_mask(
    name: str, chat: Chat, tools: list[Any], wanted: list[int], weight_0: set[int]
) -> bool:
    """True if the conversation is accepted; asserts properties that every correct mask has."""
    try:
        mask = masker(name).mask(chat, tools, turns=wanted, untrained=weight_0)
    except MaskError:
        return False
    assert [one.message for one in mask.completions] == sorted({*wanted, *weight_0})
    tokenizer = masker(name)._tokenizer
    assert list(mask.input_ids) == tokenizer(mask.text, add_special_tokens=False)["input_ids"]
    previous = 0
    for one, (start, end) in zip(mask.completions, mask.completion_chars, strict=True):
        assert previous <= one.span.start < one.span.end
        for content in one.contents:
            assert one.span.start <= content.start < content.end <= one.span.end
        previous = one.span.end
        said = mask.text[start:end]
        assert start >= find_prompt_end(name, chat[: one.message], tools, mask.text)
        if one.message in wanted:
            assert all(says(said, text) for text in leaves(chat[one.message])), said
        for other, message in enumerate(chat):
            if other != one.message:
                assert f"zq{other}w" not in said
                assert not any(says(said, text) for text in leaves(message) if len(text) > 8)
        last = tokenizer.convert_ids_to_tokens(mask.input_ids[one.span.end - 1])
        assert last in SPECIAL or last == "</s>", last
        # Each label is a token that the characters of the completion hold.
        assert mask.offsets[one.span.end - 1][1] == end
    return True


def check_template(name: str, tools: list[Any], *kinds: str) -> None:
    """Look at random conversations as `data.turns: all` and `split` make rows of them; each kind of
    turn is to be accepted somewhere, or nothing would have been looked at.
    """
    accepted: Counter[str] = Counter()

    @FEW
    @given(conversations(has_calls=bool(tools), has_thoughts=name in PRINTING_THOUGHTS))
    def check(drawn: tuple[Chat, set[int]]) -> None:
        chat, weight_0 = drawn
        turns = [n for n, one in enumerate(chat) if one["role"] == "assistant"]
        turns = [n for n in turns if n not in weight_0]
        accepted["all turns"] += check_mask(name, chat, tools, turns, weight_0)
        for turn in turns:
            before = {n for n in weight_0 if n < turn}
            if check_mask(name, chat[: turn + 1], tools, [turn], before):
                said = chat[turn]
                accepted["calls"] += "tool_calls" in said
                accepted["thoughts"] += "reasoning_content" in said
                accepted["weights"] += bool(before)

    check()
    assert all(accepted[kind] for kind in ("all turns", *kinds)), accepted


@pytest.mark.parametrize("name", PRINTING_CALLS)
def test_masks_of_calls_hold_what_the_assistant_says_and_nothing_else(name: str) -> None:
    thoughts = ["thoughts"] if name in PRINTING_THOUGHTS else []
    check_template(name, [LOOK_UP], "calls", "weights", *thoughts)


@pytest.mark.parametrize("name", PRINTING_THOUGHTS)
def test_masks_of_thoughts_hold_what_the_assistant_says_and_nothing_else(name: str) -> None:
    check_template(name, [], "thoughts", "weights")
