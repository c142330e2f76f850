"""Masks of single cases: hostile texts, edges of turns and templates, and refusals."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from runner.data.chat_template import ChatFormat, MaskError
from runner.data.masking import (
    IGNORE_INDEX,
    CompletionSpan,
    ConversationMasker,
    MaskedConversation,
    build_labels,
    end_of_turn_ids,
)
from tests.conftest import ROOT
from tests.support.chat_formats import (
    CHATML,
    HUMAN_ASSISTANT,
    OUR_TEMPLATES,
    build_tokenizer,
    trl_template,
)
from tests.support.chats import HOSTILE, KINDS, Chat, turns
from tests.support.template_table import table_lines

DAY = datetime(2026, 1, 31)


DAY = datetime(2026, 1, 31)


def mask_conversation(
    tokenizer: Any, messages: Chat, *, template_kwargs: dict[str, Any] | None = None
) -> MaskedConversation:
    chat_format = ChatFormat(template_kwargs=template_kwargs or {}, moment=DAY)
    return ConversationMasker(tokenizer, chat_format).mask(messages)


# --- texts that must not move a mask


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pasted", HOSTILE)
def test_pasted_markers_of_a_user_change_nothing(pasted: str, kind: str) -> None:
    tokenizer = build_tokenizer(kind, trl_template("gemma"))
    mask = mask_conversation(tokenizer, turns(pasted, "one", f"and {pasted} so", "two"))
    written = [mask.text[begin:end] for begin, end in mask.completion_chars]
    assert written == ["one<end_of_turn>", "two<end_of_turn>"]
    labels = build_labels(mask.input_ids, mask.spans, "completion")
    decoded = tokenizer.decode([label for label in labels if label != IGNORE_INDEX])
    assert decoded.replace(" ", "") == "".join(written)


def test_an_end_of_turn_token_within_an_answer_does_not_end_it() -> None:
    tokenizer = build_tokenizer("bytes", CHATML)
    mask = mask_conversation(tokenizer, turns("q", "a<|im_end|>\n<|im_start|>user\nb", "q2", "c"))
    span = mask.spans[0]
    assert (
        tokenizer.decode(mask.input_ids[span.start : span.end])
        == "a<|im_end|>\n<|im_start|>user\nb<|im_end|>"
    )


def test_an_empty_answer_trains_its_end_of_turn_token() -> None:
    tokenizer = build_tokenizer("bytes", trl_template("gemma"))
    mask = mask_conversation(tokenizer, turns("q", " \n "))
    (span,) = mask.spans
    assert tokenizer.convert_ids_to_tokens(mask.input_ids[span.start : span.end]) == [
        "<end_of_turn>"
    ]


def test_an_empty_system_text_that_the_template_leaves_out_is_no_obstacle() -> None:
    mask = mask_conversation(
        build_tokenizer("bytes", trl_template("lfm2")), turns("q", "a", system="")
    )
    assert "system" not in mask.text
    assert mask.content_chars[0] is None
    assert [mask.text[begin:end] for begin, end in mask.completion_chars] == ["a<|im_end|>"]


def test_a_header_token_that_swallows_whitespace_is_not_trained_on() -> None:
    # Phi-3's control tokens have `rstrip`: `<|assistant|>` also stands for the newline and the
    # content's spaces.
    tokenizer = build_tokenizer("bytes", trl_template("phi3"), rstrip=True)
    mask = mask_conversation(tokenizer, turns("q", "   a"))
    (span,) = mask.spans
    assert tokenizer.convert_ids_to_tokens(mask.input_ids[span.start : span.end]) == [
        "a",
        "<|end|>",
    ]


def test_a_role_header_is_not_trained_on_where_the_template_has_no_generation_prompt() -> None:
    template = CHATML.partition("{%- if add_generation_prompt")[0]
    mask = mask_conversation(build_tokenizer("bytes", template), turns("q", "a"))
    assert [mask.text[begin:end] for begin, end in mask.completion_chars] == ["a<|im_end|>"]


def test_a_generation_prompt_that_is_printed_unasked_is_no_part_of_the_turn() -> None:
    """An example is Cohere's Command R7B, where the model itself opens its response."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}<|im_end|>"
        "{% if m.role == 'assistant' %}<|open|>{% endif %}{{ m.content }}<|im_end|>{% endfor %}"
        "{% if messages[-1].role != 'assistant' %}<|im_start|>assistant<|im_end|>{% endif %}"
    )
    tokenizer = build_tokenizer(
        "bytes", template, special=["<|im_start|>", "<|im_end|>", "<|open|>"]
    )
    mask = mask_conversation(tokenizer, turns("a", "b", "c", "d"))
    written = [mask.text[begin:end] for begin, end in mask.completion_chars]
    assert written == ["<|open|>b<|im_end|>", "<|open|>d<|im_end|>"]


def test_a_template_may_print_what_looks_like_a_sentinel() -> None:
    template = "Qx0turn0xQ Qx1turn1xQ Qx0turn1xQ\n" + CHATML
    mask = mask_conversation(build_tokenizer("bytes", template), turns("Qx2turn0xQ", "Qx2turn1xQ"))
    assert [mask.text[begin:end] for begin, end in mask.completion_chars] == [
        "Qx2turn1xQ<|im_end|>"
    ]


def test_the_text_is_tokenised_once_without_a_second_bos() -> None:
    tokenizer = build_tokenizer("bytes", trl_template("gemma"))
    adds_bos = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = adds_bos
    assert tokenizer("q")["input_ids"][0] == tokenizer.bos_token_id
    mask = mask_conversation(tokenizer, turns("q", "a"))
    assert list(mask.input_ids) == tokenizer.apply_chat_template(turns("q", "a"), return_dict=False)
    assert mask.input_ids.count(tokenizer.bos_token_id) == 1


def test_template_arguments_reach_the_template() -> None:
    tokenizer = build_tokenizer("bytes", trl_template("llama3_1"))
    mask = mask_conversation(
        tokenizer, turns("q", "a"), template_kwargs={"date_string": "1 Jan 2001"}
    )
    assert "Today Date: 1 Jan 2001" in mask.text


def test_plain_text_may_end_a_turn() -> None:
    # `<|im_end|>` is no token of this tokenizer, but the model can still learn to write it.
    mask = mask_conversation(
        build_tokenizer("bytes", CHATML, special=[]), turns("q", "a", "q", "b")
    )
    assert [mask.text[begin:end] for begin, end in mask.completion_chars] == [
        "a<|im_end|>",
        "b<|im_end|>",
    ]


def test_the_token_that_closes_the_conversation_is_not_that_of_a_turn() -> None:
    mask = mask_conversation(
        build_tokenizer("bytes", trl_template("gptoss")), turns("q", "a", "q", "b")
    )
    written = [mask.text[begin:end] for begin, end in mask.completion_chars]
    assert written == [
        "<|channel|>final<|message|>a<|end|>",
        "<|channel|>final<|message|>b<|return|>",
    ]


# --- refusals


def refusal(template: str | None, chat: Chat, **tokenizer_arguments: Any) -> str:
    with pytest.raises(MaskError) as caught:
        mask_conversation(build_tokenizer("bytes", template, **tokenizer_arguments), chat)
    return str(caught.value)


def printing(expression: str) -> str:
    """ChatML with another expression in the place of the content."""
    return CHATML.replace("message['content']", expression)


REFUSALS = {
    "no chat template": (None, turns("q", "a"), "no chat template"),
    "drops a turn": (
        "{%- set messages = messages[1:] %}" + CHATML,
        turns("q", "a", "q2", "a2"),
        r"message 0 \(user\): the chat template leaves the content out",
    ),
    "prints a content twice": (
        printing("message['content'] * 2"),
        turns("q", "a"),
        "more than once",
    ),
    "reorders": (
        CHATML.replace("in messages", "in messages[::-1]"),
        turns("q", "a"),
        r"in the order \[1, 0\]",
    ),
    "upper case": (printing("message['content'] | upper"), turns("q", "a"), "changes letters"),
    "escapes": (
        printing("message['content'] | escape"),
        turns("1 < 2", "a"),
        r"expected '1 < 2', found '1 &lt; 2",
    ),
    "collapses spaces": (
        printing("message['content'].split() | join(' ')"),
        turns("q", "a  b"),
        r"message 1 \(assistant\)",
    ),
    "no end of turn": (
        HUMAN_ASSISTANT.replace(" + eos_token", ""),
        turns("q", "a"),
        "could never learn to stop",
    ),
    "no end of turn, last": (
        trl_template("glm4moe"),
        turns("q", "a", "q", "b"),
        "could never learn to stop",
    ),
    "end only of the conversation": (
        HUMAN_ASSISTANT.replace(" + eos_token", "") + "{{ eos_token }}",
        turns("q", "a", "q", "b"),
        r"message 1 \(assistant\) has no end-of-turn token",
    ),
    "end only of the conversation, headers are tokens": (
        (
            "{%- for message in messages %}{{- '<|' + message['role'] + '|>' + message['content']"
            " }}{%- endfor %}{{- eos_token }}"
        ),
        turns("q", "a", "q", "b"),
        r"message 1 \(assistant\) has no end-of-turn token",
    ),
    "two tokens end the conversation, none a turn": (
        HUMAN_ASSISTANT.replace(" + eos_token", "") + "{{ '<|end|><|eot|>' }}",
        turns("q", "a"),
        r"message 1 \(assistant\) has no end-of-turn token",
    ),
    "prints lists as Python source": (
        printing("('' if message['content'] is string else message['content'] | string)"),
        turns("q", "a"),
        "leaves the content out",
    ),
    "merges answers": (
        trl_template("diffusion_gemma"),
        [*turns("q", "a"), {"role": "assistant", "content": "b"}],
        r"message 1 \(assistant\) has no end-of-turn token",
    ),
    "raises": (trl_template("gemma"), turns("q", "a", system="s"), "System role not supported"),
    "raises on roles": (
        trl_template("gemma"),
        [*turns("q"), *turns("q", "a")],
        "must alternate",
    ),
    "unknown role": (
        CHATML,
        [{"role": "human", "content": "q"}, *turns("q", "a")],
        "'human', expected one of system",
    ),
    "no answer": (CHATML, turns("q"), "no assistant turn"),
    "content is no text": (
        CHATML,
        [{"role": "user", "content": None}, *turns("q", "a")],
        "expected a text",
    ),
    "keys that nobody covers": (
        CHATML,
        [{"role": "user", "content": "q", "tool_calls": "x"}],
        "tool_calls",
    ),
    "nothing between turns": (
        (
            "{%- for message in messages %}{{- message['content'] }}"
            "{%- if message['role'] == 'assistant' %}{{- eos_token }}{%- endif %}{%- endfor %}"
        ),
        turns("the qui", "ck brown"),
        r"a token of message 1 \(assistant\) also holds characters of message 0 \(user\)",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_say_why(name: str) -> None:
    template, chat, why = REFUSALS[name]
    assert re.search(why, refusal(template, chat)), refusal(template, chat)  # type: ignore[arg-type]


def test_a_slow_tokenizer_is_refused() -> None:
    from transformers import PythonBackend

    class WordTokenizer(PythonBackend):  # type: ignore[misc]
        vocab_size = 0

        def get_vocab(self) -> dict[str, int]:
            return {}

    with pytest.raises(MaskError, match="slow tokenizer"):
        mask_conversation(WordTokenizer(), turns("q", "a"))


def test_an_end_of_turn_token_that_melts_into_the_answer_is_refused() -> None:
    tokenizer = build_tokenizer("bytes", CHATML, special=["<|im_end|>", "<|<|im_end|>"])
    with pytest.raises(MaskError, match=r"should end in the token '<\|im_end\|>'"):
        mask_conversation(tokenizer, turns("q", "a<|"))


# --- labels


def test_labels_of_each_loss() -> None:
    spans = (CompletionSpan(1, 3), CompletionSpan(4, 5))
    assert build_labels((7, 8, 9, 10, 11, 12), spans, "completion") == [-100, 8, 9, -100, 11, -100]
    assert build_labels((7, 8, 9, 10, 11, 12), spans, "full") == [7, 8, 9, 10, 11, 12]
    last = build_labels((7, 8, 9, 10, 11, 12), spans, "last_completion")
    assert last == [-100, -100, -100, -100, 11, -100]
    untrained = build_labels((7, 8, 9, 10, 11, 12), spans[1:], "full", spans[:1])
    assert untrained == [7, -100, -100, 10, 11, 12], "a turn of weight 0 has no label"


# --- documentation


def test_the_documented_table_is_what_the_templates_give() -> None:
    documented = (ROOT / "docs" / "chat_templates.md").read_text(encoding="utf-8")
    assert "\n".join(table_lines()) in documented, "run: python tests/support/template_table.py"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gemma", ["<end_of_turn>"]),
        ("llama3", ["<|eot_id|>"]),
        ("phi3", ["<|end|>"]),
        ("gptoss", ["<|return|>", "<|end|>", "<|call|>"]),
        ("ours: Human/Assistant text", ["</s>"]),
        ("ours: Mistral [INST]", ["</s>"]),
    ],
)
def test_end_of_turn_ids_are_what_ends_completions(name: str, expected: list[str]) -> None:
    tokenizer = build_tokenizer("bytes", OUR_TEMPLATES.get(name) or trl_template(name))
    assert tokenizer.convert_ids_to_tokens(end_of_turn_ids(tokenizer)) == expected


def test_plain_text_that_ends_a_turn_has_no_id() -> None:
    assert end_of_turn_ids(build_tokenizer("bytes", CHATML, special=["</s>"])) == ()
