"""Masks against ground truths that are not of the code under test: TRL's marked templates, and
renderers by hand.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from runner.data.chat_template import MaskError
from runner.data.masking import (
    MaskedConversation,
)
from tests.support.chat_formats import (
    CHATML,
    HUMAN_ASSISTANT,
    LLAMA_2,
    MISTRAL,
    MISTRAL_SYSTEM_LAST,
    trl_template,
    trl_template_names,
)
from tests.support.chats import HOSTILE, KINDS, Chat, masker, tokenizer_of, trained_tokens, turns

Pieces = list[tuple[str, bool]]  # text, is it trained on
FEW = settings(
    max_examples=12, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
)

# What TRL's markers enclose at either end of a completion beyond our definition (the turn from
# where the generation prompt ends, to its end-of-turn token). Taken off their intervals, and never
# anything else:
# - a newline behind the end-of-turn token: nobody generates it, generation has stopped;
# - Phi-3's `\n<eos>` behind `<|end|>`: it ends the text, not the turn (a turn in the middle has
# none);
# - Qwen2.5's newline of the role header, the whole header of DeepSeek, GPT-OSS and Muse: the
# generation prompt's;
# - Qwen3.5's opened think block: likewise in the generation prompt;
# - Nemotron's empty think block: it stands where the generation prompt opens a real one, so no
# model is asked for it.
NEWLINE = ("", "\n")
TRL_EXCESS: dict[str, tuple[str, str]] = {
    "cohere": ("", ""),
    "cohere2": ("", ""),
    "deepseek_r1_distill": ("<｜Assistant｜>", ""),
    "deepseekv3": ("<｜Assistant｜>", ""),
    "diffusion_gemma": NEWLINE,
    "gemma": NEWLINE,
    "gemma3": NEWLINE,
    "glm4moe": ("", ""),
    "gptoss": ("<|start|>assistant", ""),
    "idefics3": NEWLINE,
    "lfm2": NEWLINE,
    "lfm2_v2": NEWLINE,
    "llama3": ("", ""),
    "llava_next": ("", ""),
    "muse_glimmer": ("<|start|>assistant", ""),
    "nemotron_3_5_lightning": ("<think></think>", "\n"),
    "nemotron_3_nano": ("<think></think>", "\n"),
    "nemotron_3_super": ("<think></think>", "\n"),
    "nemotron_3_ultra": ("<think></think>", "\n"),
    "phi3": ("", "\n</s>"),
    "phi3_5": ("", "\n</s>"),
    "qwen2_5": ("\n", "\n"),
    "qwen2_5_vl": NEWLINE,
    "qwen3": NEWLINE,
    "qwen3_5_nothink": ("<think>\n\n</think>\n\n", "\n"),
    "qwen3_5_think": ("<think>\n", "\n"),
    "qwen3_6": ("<think>\n", "\n"),
    "qwen3_8": ("<think>\n", "\n"),
    "qwen3_instruct_2507": NEWLINE,
    "qwen3_vl": NEWLINE,
    "smolvlm": NEWLINE,
}
EXACT = [family for family, excess in TRL_EXCESS.items() if excess == ("", "")]
# Templates of vision models that print nothing of a plain string.
PARTS_ONLY = {"idefics3", "llava_next", "smolvlm"}
NO_SYSTEM = {"gemma"}
UNICODE = [
    "😀",
    "👩🏽‍🚀",
    "e\u0301",
    "\u0301",
    "你好，世界",
    "שלום",
    "مرحبا\u200f",
    "\u2028",
    "ﬁ",
    "\u00a0",
    "ℌ",
    "\x00",
    "�",
]
EDGES = ["", "", "", " ", "\n", "\t \n", "  \n\n", "\u2003"]


def contents() -> st.SearchStrategy[str]:
    """Texts as nobody would wish them: empty, whitespace at the ends, markers of every format, any
    script.
    """
    words = st.one_of(
        st.sampled_from(["Hello", " world", "the quick", "fox.", "1 + 1", "\n", " "]),
        st.sampled_from(HOSTILE),
        st.sampled_from(UNICODE),
        st.text(max_size=6),
    )
    middle = st.lists(words, max_size=4).map("".join)
    return st.tuples(st.sampled_from(EDGES), middle, st.sampled_from(EDGES)).map("".join)


@st.composite
def chats(draw: st.DrawFn, has_system: bool = True) -> Chat:
    """An optional system turn, one to three exchanges, sometimes a user's turn without an
    answer.
    """
    chat = (
        [{"role": "system", "content": draw(contents())}]
        if has_system and draw(st.booleans())
        else []
    )
    for _ in range(draw(st.integers(1, 3))):
        chat += [{"role": role, "content": draw(contents())} for role in ("user", "assistant")]
    if draw(st.integers(0, 4)) == 0:
        chat.append({"role": "user", "content": draw(contents())})
    return chat


# --- ground truths


def tokens_touching(mask: MaskedConversation, intervals: list[tuple[int, int]]) -> list[int]:
    """The tokens that cover at least one character of the intervals, found in the slow and obvious
    way.
    """
    return [
        index
        for index, (start, end) in enumerate(mask.offsets)
        if any(start < stop and begin < end for begin, stop in intervals)
    ]


def trl_intervals(family: str, tokenizer: Any, chat: Chat) -> tuple[str, list[tuple[int, int]]]:
    """The text of TRL's training copy and the characters that its markers enclose, less the known
    excess.
    """
    messages: list[Any] = list(chat)
    if family in PARTS_ONLY:
        messages = [
            {**message, "content": [{"type": "text", "text": message["content"]}]}
            for message in chat
        ]
    texts, intervals = render_jinja_template(
        conversations=[messages],
        chat_template=tokenizer.chat_template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    text: str = texts[0]
    merged: list[list[int]] = []
    for start, end in intervals[0]:
        if merged and merged[-1][1] == start:  # blocks for the parts of one turn
            merged[-1][1] = end
        else:
            merged.append([start, end])
    head, tail = TRL_EXCESS[family]
    trimmed = []
    for start, end in merged:
        excess = tail if text[start:end].endswith(tail) else tail.removesuffix("</s>")
        assert text[start:end].startswith(head) and text[start:end].endswith(excess), (
            head,
            tail,
            text[start:end],
        )
        trimmed.append((start + len(head), end - len(excess)))
    return text, trimmed


def is_refused_by_right(family: str, chat: Chat) -> bool:
    """Rows whose rendering depends on what the contents say, in a way that leaves no place for a
    proof.
    """
    answers = [message["content"] for message in chat if message["role"] == "assistant"]
    if family == "glm4moe":
        # Leaves out the newline before an empty answer, too.
        return any(not answer.strip() for answer in answers)
    if family == "gptoss":
        return any("<|channel|>" in answer for answer in answers)  # raises on its own markup
    if family == "diffusion_gemma":
        # Removes its own markup.
        return any(re.search(r"<\|channel>|<channel\|>", answer) for answer in answers)
    return False


def test_every_training_copy_of_trl_is_covered() -> None:
    assert {
        name.removesuffix("_training")
        for name in trl_template_names()
        if name.endswith("_training")
    } == set(TRL_EXCESS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", sorted(TRL_EXCESS))
def test_masks_equal_those_of_the_marked_templates(family: str, kind: str) -> None:
    marked = trl_template(f"{family}_training")
    num_same_text = 0

    @FEW
    @given(chats(has_system=family not in NO_SYSTEM))
    def check(chat: Chat) -> None:
        nonlocal num_same_text
        assume(not is_refused_by_right(family, chat))
        mask = masker(marked, kind).mask(chat)
        text, intervals = trl_intervals(family, tokenizer_of(marked, kind), chat)
        assert mask.text == text
        assert trained_tokens(mask) == tokens_touching(mask, intervals)
        # The original prints nothing after an answer; see the test of refusals.
        if family == "glm4moe":
            return
        original = masker(trl_template(family), kind).mask(chat)
        # Training copies of thinking models print more than the originals.
        if original.text == text:
            num_same_text += 1
            assert (original.input_ids, original.spans) == (mask.input_ids, mask.spans)

    check()
    assert num_same_text > 0 or family == "glm4moe"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", EXACT)
def test_masks_equal_those_of_transformers_where_the_definitions_agree(
    family: str, kind: str
) -> None:
    template = trl_template(f"{family}_training")

    @FEW
    @given(chats(has_system=family not in NO_SYSTEM))
    def check(chat: Chat) -> None:
        assume(not is_refused_by_right(family, chat))
        messages: list[Any] = list(chat)
        if family in PARTS_ONLY:
            messages = [
                {**message, "content": [{"type": "text", "text": message["content"]}]}
                for message in chat
            ]
        theirs = tokenizer_of(template, kind).apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True
        )
        mask = masker(template, kind).mask(chat)
        assert list(mask.input_ids) == theirs["input_ids"]
        assert trained_tokens(mask) == [
            index for index, is_trained in enumerate(theirs["assistant_masks"]) if is_trained
        ]

    check()


# --- ground truths by hand: each writes the text of a conversation down and says what of it is
# trained on


def chatml_by_hand(chat: Chat, default_system: str = "") -> Pieces:
    pieces: Pieces = (
        [] if chat[0]["role"] == "system" or not default_system else [(default_system, False)]
    )
    for message in chat:
        is_trained = message["role"] == "assistant"
        pieces += [
            (f"<|im_start|>{message['role']}\n", False),
            (message["content"] + "<|im_end|>", is_trained),
            ("\n", False),
        ]
    return pieces


def qwen2_5_by_hand(chat: Chat) -> Pieces:
    default = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    return chatml_by_hand(chat, f"<|im_start|>system\n{default}<|im_end|>\n")


def qwen3_by_hand(chat: Chat) -> Pieces:
    """The last answer gets an empty think block, which the model writes, and loses its first
    newlines.
    """
    pieces: Pieces = []
    for number, message in enumerate(chat):
        is_trained, content = message["role"] == "assistant", message["content"]
        if is_trained and number == len(chat) - 1:
            content = "<think>\n\n</think>\n\n" + content.lstrip("\n")
        pieces += [
            (f"<|im_start|>{message['role']}\n", False),
            (content + "<|im_end|>", is_trained),
            ("\n", False),
        ]
    return pieces


def gemma_by_hand(chat: Chat) -> Pieces:
    pieces: Pieces = [("<s>", False)]
    for message in chat:
        role = {"assistant": "model"}.get(message["role"], message["role"])
        pieces += [
            (f"<start_of_turn>{role}\n", False),
            (message["content"].strip() + "<end_of_turn>", role == "model"),
            ("\n", False),
        ]
    return pieces


def llama3_1_by_hand(chat: Chat) -> Pieces:
    """A system block is always there; it states two dates, and then the system text, if there is
    one.
    """
    system = chat[0]["content"].strip() if chat[0]["role"] == "system" else ""
    dates = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    pieces: Pieces = [("<s>" + header.format("system") + dates + system + "<|eot_id|>", False)]
    for message in chat[chat[0]["role"] == "system" :]:
        pieces += [
            (header.format(message["role"]), False),
            (message["content"].strip() + "<|eot_id|>", message["role"] == "assistant"),
        ]
    return pieces


def phi3_by_hand(chat: Chat) -> Pieces:
    pieces: Pieces = []
    for message in chat:
        is_trained = message["role"] == "assistant"
        pieces += [
            (f"<|{message['role']}|>\n", False),
            (message["content"] + "<|end|>", is_trained),
            ("\n", False),
        ]
    return [*pieces, ("</s>", False)]


def mistral_by_hand(chat: Chat) -> Pieces:
    """The prompt ends in `[/INST]`, so the space before an answer is the model's to write."""
    pieces: Pieces = [("<s>", False)]
    for message in chat:
        is_trained = message["role"] == "assistant"
        text = message["content"]
        pieces.append((f" {text}</s>" if is_trained else f"[INST] {text} [/INST]", is_trained))
    return pieces


def mistral_system_last_by_hand(chat: Chat) -> Pieces:
    system = chat[0]["content"] + "\n\n" if chat[0]["role"] == "system" else ""
    chat = chat[1:] if system else chat
    last_user = max(number for number, message in enumerate(chat) if message["role"] == "user")
    pieces: Pieces = [("<s>", False)]
    for number, message in enumerate(chat):
        if message["role"] == "user":
            pieces.append(
                (
                    f"[INST] {system if number == last_user else ''}{message['content']}[/INST]",
                    False,
                )
            )
        else:
            # Only where the text goes on from the prompt does the model write the space. It does
            # not where the prompt carried the system text, which a later turn has taken over.
            is_continued = not system or number > last_user
            pieces += [(" ", is_continued), (message["content"].strip() + "</s>", True)]
    return pieces


def human_assistant_by_hand(chat: Chat) -> Pieces:
    """The generation prompt is `Assistant:`, so the space behind it is the model's to write."""
    pieces: Pieces = []
    for message in chat:
        text = message["content"]
        if message["role"] == "assistant":
            pieces += [("Assistant:", False), (f" {text}</s>", True), ("\n\n", False)]
        else:
            pieces.append(
                (f"Human: {text}\n\n" if message["role"] == "user" else f"{text}\n\n", False)
            )
    return pieces


def llama_2_by_hand(chat: Chat) -> Pieces:
    system = chat[0]["content"] if chat[0]["role"] == "system" else ""
    block = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else ""
    pieces: Pieces = []
    for number, message in enumerate(chat[1:] if system else chat):
        text = message["content"].strip()
        if message["role"] == "assistant":
            pieces.append((f" {text} </s>", True))
        else:
            pieces.append((f"<s>[INST] {block if number == 0 else ''}{text} [/INST]", False))
    return pieces


BY_HAND: dict[str, tuple[str, Callable[[Chat], Pieces]]] = {
    "ChatML": (CHATML, chatml_by_hand),
    "Gemma": (trl_template("gemma"), gemma_by_hand),
    "Human/Assistant": (HUMAN_ASSISTANT, human_assistant_by_hand),
    "Llama 2": (LLAMA_2, llama_2_by_hand),
    "Llama 3.1": (trl_template("llama3_1"), llama3_1_by_hand),
    "Mistral": (MISTRAL, mistral_by_hand),
    "Mistral, system last": (MISTRAL_SYSTEM_LAST, mistral_system_last_by_hand),
    "Phi-3": (trl_template("phi3"), phi3_by_hand),
    "Qwen2.5": (trl_template("qwen2_5"), qwen2_5_by_hand),
    "Qwen3": (trl_template("qwen3"), qwen3_by_hand),
}
WITHOUT_SYSTEM = {"Gemma", "Mistral"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(BY_HAND))
def test_masks_equal_those_written_by_hand(name: str, kind: str) -> None:
    template, write = BY_HAND[name]

    @settings(FEW, max_examples=30)
    @given(chats(has_system=name not in WITHOUT_SYSTEM))
    def check(chat: Chat) -> None:
        # These templates take an empty system text for a user's turn.
        if name in ("Llama 2", "Mistral, system last"):
            assume(chat[0]["role"] != "system" or chat[0]["content"])
        pieces = write(chat)
        mask = masker(template, kind).mask(chat)
        assert mask.text == "".join(text for text, _ in pieces)
        intervals, position = [], 0
        for text, is_trained in pieces:
            if is_trained:
                intervals.append((position, position + len(text)))
            position += len(text)
        assert trained_tokens(mask) == tokens_touching(mask, intervals)
        assert len(mask.spans) == sum(message["role"] == "assistant" for message in chat)

    check()


@pytest.mark.parametrize(
    "name", sorted(name for name in trl_template_names() if not name.startswith("glm4moe"))
)
def test_no_text_at_all_makes_a_wrong_mask(name: str) -> None:
    """Think tags and tool markup, which templates take apart: the mask is right, or the row is
    refused.
    """
    markup = [
        "<think>",
        "</think>",
        "<think>\nwhy\n</think>\n\n",
        "<tool_call>",
        "<tool_response>",
        "</tool_response>",
    ]
    texts = st.lists(
        st.sampled_from([*markup, "Hello", "\n", " ", "<|channel|>final<|message|>"]), max_size=4
    ).map("".join)

    @settings(FEW, max_examples=10)
    @given(st.lists(texts, min_size=4, max_size=4))
    def check(contents: list[str]) -> None:
        chat = turns(*contents)
        try:
            mask = masker(trl_template(name), "bytes").mask(chat)
        except MaskError:
            return
        starts = [start for start, _ in mask.completion_chars]
        for message, start, (begin, end) in zip(
            chat[1::2], starts, mask.content_chars[1::2], strict=True
        ):  # type: ignore[misc]
            assert start <= begin
            if mask.method.startswith("sentinel"):
                assert mask.text[begin:end].strip() == message["content"].strip()
        # A template that takes thoughts apart may lay other whitespace around them.
        for message, (start, end) in zip(chat[1::2], mask.completion_chars, strict=True):
            assert "".join(message["content"].split()) in "".join(mask.text[start:end].split())

    check()
