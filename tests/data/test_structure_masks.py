"""Masks of conversations with tools, calls and thoughts: their trained texts, written out, and
refusals by name.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from runner.data.chat_template import ChatFormat, MaskError
from runner.data.masking import ConversationMasker, MaskedConversation, build_labels
from runner.data.tasks.base import Example
from runner.data.tasks.conversations import ConversationsTask
from tests.support.chat_formats import (
    CHATML,
    HUMAN_ASSISTANT,
    SPECIAL_TOKENS,
    build_tokenizer,
    trl_template,
)
from tests.support.chats import turns

CASES = Path(__file__).parent / "cases"
DAY = datetime(2026, 1, 31)

# Llama Guard-like: as ChatML, and calls as JSON behind the content.
CALLS_CHATML = CHATML.replace(
    "message['content'] + '<|im_end|>\\n' }}",
    "message['content'] }}{% for call in message.tool_calls or [] %}"
    "{{- call.function | tojson }}{% endfor %}{{- '<|im_end|>\\n' }}",
)
TOOLS_CHATML = "{{- tools | tojson if tools else '' }}" + CALLS_CHATML


def read_case(name: str) -> list[Example]:
    """The rows of a file of cases, as the task `conversations` reads them."""
    lines = (CASES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [(f"{name} line {n}", json.loads(line)) for n, line in enumerate(lines, start=1)]
    return list(ConversationsTask(name="conversations").build_examples(rows).examples)


def mask(
    template: str,
    messages: Sequence[Any],
    tools: Sequence[Any] = (),
    *,
    turns: Sequence[int] | None = None,
    untrained: Sequence[int] = (),
    **chat_format: Any,
) -> MaskedConversation:
    tokenizer = build_tokenizer("bytes", template, special=[*SPECIAL_TOKENS, "<|observation|>"])
    masker = ConversationMasker(tokenizer, ChatFormat(**{"moment": DAY, **chat_format}))
    masked = masker.mask(messages, tools, turns=turns, untrained=untrained)
    # The trained tokens are exactly these characters.
    for completion, (start, end) in zip(masked.completions, masked.completion_chars, strict=True):
        labels = build_labels(masked.input_ids, [completion.span], "completion")
        trained = [label for label in labels if label >= 0]
        assert tokenizer.decode(trained) == masked.text[start:end]
    return masked


def trained(masked: MaskedConversation) -> list[str]:
    return [masked.text[start:end] for start, end in masked.completion_chars]


def refusal(template: str, messages: Sequence[Any], tools: Sequence[Any] = (), **kw: Any) -> str:
    with pytest.raises(MaskError) as caught:
        mask(template, messages, tools, **kw)
    return str(caught.value)


QWEN_CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
LLAMA_CALL = '{"name": "get_weather", "parameters": {"city": "Oslo"}}'
NEMOTRON_CALL = (
    "<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n</function>\n"
    "</tool_call>"
)
EXPECTED_CALLS = {
    "qwen2_5": (QWEN_CALL + "<|im_end|>", "{}<|im_end|>"),
    "qwen3": (QWEN_CALL + "<|im_end|>", "<think>\n\n</think>\n\n{}<|im_end|>"),
    "llama3_1": (LLAMA_CALL + "<|eot_id|>", "{}<|eot_id|>"),
    "gptoss": (
        ' to=functions.get_weather<|channel|>commentary json<|message|>{{"city": "Oslo"}}<|call|>',
        "<|channel|>final<|message|>{}<|return|>",
    ),
    "nemotron_3_nano": ("<think></think>\n" + NEMOTRON_CALL + "\n<|im_end|>", "{}<|im_end|>"),
    "qwen3_6": ("\n</think>\n\n" + NEMOTRON_CALL + "<|im_end|>", "\n</think>\n\n{}<|im_end|>"),
}
ANSWERS = {
    "tool_calls_empty_content": "It is 4 C.",
    "tool_calls_null_content": "20 C.",
    "sharegpt_tools": "4 C.",
}


@pytest.mark.parametrize("case", ANSWERS)
@pytest.mark.parametrize("name", EXPECTED_CALLS)
def test_a_call_is_trained_and_the_tools_answer_is_not(name: str, case: str) -> None:
    example = read_case(case)[0]
    masked = mask(trl_template(name), example.messages, example.tools)
    call, answer = EXPECTED_CALLS[name]
    expected = call if name != "gptoss" else call.format()
    assert trained(masked) == [expected, answer.format(ANSWERS[case])]
    assert [completion.message for completion in masked.completions] == [1, 3]
    content = masked.content_chars[2]
    assert content is not None and masked.text[slice(*content)] == example.messages[2]["content"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen2_5", f"Let me look.\n{QWEN_CALL}<|im_end|>"),
        ("nemotron_3_nano", f"<think></think>Let me look.\n{NEMOTRON_CALL}\n<|im_end|>"),
    ],
)
def test_a_call_behind_a_text_is_trained_with_it(name: str, expected: str) -> None:
    example = read_case("tool_calls_with_text")[0]
    found = trained(mask(trl_template(name), example.messages, example.tools))[0]
    # Nemotron's answer does not go on from the prompt: it begins with what the row says.
    assert found == expected.removeprefix("<think></think>")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen3", ["<think>\n{0}\n</think>\n\n{1}<|im_end|>"]),
        ("qwen3_6", ["{0}\n</think>\n\n{1}<|im_end|>"]),
        ("nemotron_3_nano", ["{0}\n</think>\n{1}<|im_end|>"]),
        ("lfm2_2_5", ["<think>{0}</think>{1}<|im_end|>"]),
        ("qwen3_5_nothink", ["<think>\n{0}\n</think>\n\n{1}<|im_end|>"]),
        (
            "gptoss",
            [
                "<|channel|>analysis<|message|>{0}<|end|><|start|>assistant"
                "<|channel|>final<|message|>{1}<|return|>"
            ],
        ),
    ],
)
def test_a_thought_is_trained_before_its_answer(name: str, expected: list[str]) -> None:
    for example, thought, answer in zip(
        read_case("reasoning_key"),
        ("A week has 7 days, so 2 x 7.", "3 x 7"),
        ("14", "21"),
        strict=False,
    ):
        found = trained(mask(trl_template(name), example.messages))
        assert found == [text.format(thought, answer) for text in expected]


def test_think_tags_in_a_content_are_a_thought() -> None:
    examples = read_case("reasoning_tags")
    qwen3 = trl_template("qwen3")
    assert trained(mask(qwen3, examples[0].messages)) == [
        "<think>\nadd them\n</think>\n\n5<|im_end|>"
    ]
    assert trained(mask(qwen3, examples[1].messages)) == ["<think>\n\n</think>\n\n8<|im_end|>"]
    # Of several rounds, Qwen3 prints the thoughts of the last.
    rounds = examples[2].messages
    assert trained(mask(qwen3, rounds, turns=[3])) == [
        "<think>\ntwo and one\n</think>\n\n3<|im_end|>"
    ]
    found = refusal(qwen3, rounds)
    assert "does not print the think block in the `content` of message 1 (assistant)" in found
    assert "`data.turns: split`" in found
    # As context, or where it is not trained on, it may lack them.
    assert trained(mask(qwen3, rounds, turns=[3], untrained=[1]))[0] == "2<|im_end|>"


def test_an_earlier_turn_is_rewritten_where_it_is_not_printed_as_it_was_written() -> None:
    chat = turns("q", "a", "q", "b")
    qwen3 = [one.rewritten for one in mask(trl_template("qwen3"), chat).completions]
    assert qwen3[1] is None
    assert qwen3[0] is not None and "<think>\\n\\n</think>" in qwen3[0]
    for name in ("gemma", "llama3_1", "gptoss", "qwen2_5", "phi3"):
        masked = mask(trl_template(name), chat)
        assert [one.rewritten for one in masked.completions] == [None, None], name
    # The second proof says the same.
    example = read_case("tool_calls_empty_content")[0]
    calls = mask(trl_template("qwen3"), example.messages, example.tools).completions
    assert "<think>" in str(calls[0].rewritten) and calls[1].rewritten is None


def test_the_contents_of_a_turn_are_its_texts_and_nothing_of_the_template() -> None:
    """So its bits per byte are comparable across templates with different text around thoughts and
    calls.
    """
    chat = [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "Let me look.",
            "reasoning_content": "Fjords: é.",
            "tool_calls": [call_of("get_weather", city="Oslo")],
        },
    ]
    for name in ("qwen3", "nemotron_3_nano", "glm4moe_training"):
        masked = mask(trl_template(name), chat, [TOOL])
        (turn,) = masked.completions
        texts = [
            masked.text[masked.offsets[span.start][0] : masked.offsets[span.end - 1][1]]
            for span in turn.contents
        ]
        said = ["Fjords: é.", "Let me look.", "get_weather", "Oslo"]
        assert [text.strip() for text in texts] == said, name
        assert turn.num_bytes == len("".join(said).encode()), name
    start, end = masked.content_chars[1] or (0, 0)
    assert masked.text[start:end].startswith("Fjords") and masked.text[start:end].endswith("Oslo")


def test_arguments_are_given_as_json_text_where_the_template_takes_no_mapping() -> None:
    # DeepSeek's adds them to a text.
    template = "{{- tools | tojson }}" + CHATML.replace(
        "message['content'] + '<|im_end|>\\n' }}",
        "message['content'] }}{% for call in message.tool_calls or [] %}"
        "{{- call.function.name + ' ' + call.function.arguments }}{% endfor %}"
        "{{- '<|im_end|>\\n' }}",
    )
    example = read_case("tool_calls_empty_content")[0]
    expected = 'get_weather {"city": "Oslo"}<|im_end|>'
    assert trained(mask(template, example.messages, example.tools))[0] == expected
    # Another prints a mapping as Python does, which is no JSON.
    template = template.replace("' ' + call.function.arguments", "' ' ~ call.function.arguments")
    assert trained(mask(template, example.messages, example.tools))[0] == expected


def call_of(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "id": "c1", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize(
    "value",
    ['say "x"', "back\\slash", "é 😀", "a\nb", "", "  ", 7, -1.5, True, None, ["p", {"q": 2}]],
)
def test_any_value_is_proven_as_the_template_prints_it(value: Any) -> None:
    chat = [
        *turns("q"),
        {"role": "assistant", "content": "", "tool_calls": [call_of("f", x=value)]},
    ]
    printed = json.dumps({"name": "f", "arguments": {"x": value}}, ensure_ascii=False)
    masked = mask(CALLS_CHATML, chat)
    assert trained(masked) == [printed + "<|im_end|>"]


def test_several_calls_of_one_turn_are_all_trained() -> None:
    calls = [call_of("f", x="one"), call_of("g"), call_of("f", x="two")]
    chat = [*turns("q"), {"role": "assistant", "content": "So: ", "tool_calls": calls}]
    printed = "".join(json.dumps(call["function"]) for call in calls)
    assert trained(mask(CALLS_CHATML, chat)) == [f"So: {printed}<|im_end|>"]
    # GPT-OSS's prints the first only.
    bare = [*turns("q"), {"role": "assistant", "content": "", "tool_calls": calls}]
    assert "does not print the call of `g`" in refusal(trl_template("gptoss"), bare)


TOOL_ROW = {"name": "get_weather", "description": "Weather.", "parameters": {"type": "object"}}
TOOL = {"type": "function", "function": TOOL_ROW}
CALLING = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": "", "tool_calls": [call_of("get_weather", city="Oslo")]},
]
THINKING = [
    {"role": "user", "content": "2 x 7?"},
    {"role": "assistant", "content": "14", "reasoning_content": "twice"},
]
REFUSALS: dict[str, tuple[str, Sequence[Any], Sequence[Any], list[str]]] = {
    "drops a call": (
        "{{- tools | tojson }}" + CHATML,
        CALLING,
        [TOOL],
        ["does not print the call of `get_weather` of message 1 (assistant)"],
    ),
    "drops a call, and has no tools": (
        CHATML,
        CALLING,
        [],
        ["does not print the call of `get_weather` of message 1 (assistant)"],
    ),
    "drops the tools": (
        CALLS_CHATML,
        CALLING,
        [TOOL],
        ["does not print the name of the tool `get_weather`", "data.ignore: [tools]"],
    ),
    "drops a thought": (
        CHATML,
        THINKING,
        [],
        [
            "does not print `reasoning_content` of message 1 (assistant)",
            "data.ignore: [messages.reasoning_content]",
        ],
    ),
    "drops a think block": (
        trl_template("deepseek_r1_distill"),
        turns("q", "<think>\nwhy\n</think>\n\nso"),
        [],
        ["does not print the think block in the `content` of message 1 (assistant)"],
    ),
    "drops the tags of a think block": (
        CHATML.replace(
            "message['content']",
            "message['content'] | replace('<think>', '') | replace('</think>', '')",
        ),
        turns("q", "<think>why</think>so"),
        [],
        ["does not print the", "think> in the `content` of message 1 (assistant)"],
    ),
    "a turn that says nothing": (
        TOOLS_CHATML,
        [*turns("q"), {"role": "assistant", "content": ""}],
        [TOOL],
        ["message 1 (assistant) has neither text nor call nor thought"],
    ),
    "renders nothing without tools": (
        "{% for tool in tools %}{{- tool | tojson }}{% endfor %}" + CHATML,
        turns("q", "a"),
        [],
        ["renders no conversation without `tools`", "give each row a `tools` column"],
    ),
    "prints a thought twice": (
        CHATML.replace(
            "message['content']", "(message.reasoning_content or '') * 2 + message.content"
        ),
        THINKING,
        [],
        ["prints `reasoning_content` more than once"],
    ),
    "changes an argument": (
        CALLS_CHATML.replace("| tojson", "| tojson | upper | replace('QX0M', 'Qx0m')"),
        CALLING,
        [],
        ["does not print"],
    ),
    "escapes an argument": (
        CALLS_CHATML.replace("| tojson", "| tojson | replace('&', '&amp;')"),
        [
            *turns("q"),
            {"role": "assistant", "content": "", "tool_calls": [call_of("f", x="a & b")]},
        ],
        [],
        ["expected 'a & b', found 'a &amp; b"],
    ),
    "prints arguments as Python source": (
        "{{- tools | tojson }}"
        + CHATML.replace(
            "message['content'] + '<|im_end|>\\n' }}",
            "message['content'] }}{% for call in message.tool_calls or [] %}"
            "{% for key, value in call.function.arguments.items() %}{% endfor %}"
            "{{- call.function | string }}{% endfor %}{{- '<|im_end|>\\n' }}",
        ),
        CALLING,
        [TOOL],
        ["prints the arguments of a call as Python source"],
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_name_what_is_not_printed(name: str) -> None:
    template, chat, tools, expected = REFUSALS[name]
    found = refusal(template, chat, tools)
    assert all(text in found for text in expected), found


def test_an_earlier_thought_that_is_dropped_is_refused_where_it_would_be_trained() -> None:
    chat = [*THINKING, *THINKING]
    template = trl_template("qwen3")
    found = refusal(template, chat)
    assert "does not print `reasoning_content` of message 1 (assistant)" in found
    assert "`data.turns: split` to train each turn that way, or `data.turns: last`" in found
    assert trained(mask(template, chat, turns=[3])) == ["<think>\ntwice\n</think>\n\n14<|im_end|>"]


# --- ends of turns


def test_a_generation_prompt_behind_every_answer_is_no_end() -> None:
    """Cohere's Command R7B prints the next header behind the last answer, too."""
    template = (
        "{%- for message in messages %}{{- '<|START_OF_TURN_TOKEN|>' + ('<|USER_TOKEN|>' if"
        " message.role == 'user' else '<|CHATBOT_TOKEN|>') + message.content"
        " + '<|END_OF_TURN_TOKEN|>' }}{%- endfor %}"
        "{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}"
    )
    chat = turns("q", "a", "q", "b")
    stops = frozenset({"<|END_OF_TURN_TOKEN|>"})
    expected = ["a<|END_OF_TURN_TOKEN|>", "b<|END_OF_TURN_TOKEN|>"]
    assert trained(mask(template, chat, stop_tokens=stops)) == expected
    found = refusal(template, chat)
    assert "the beginning of the next one" in found
    assert "`model.end_of_turn: '<|END_OF_TURN_TOKEN|>'`" in found
    assert trained(mask(template, chat, end_of_turn="<|END_OF_TURN_TOKEN|>")) == expected


def test_an_end_that_the_template_does_not_print_is_appended() -> None:
    glm = trl_template("glm4moe")
    found = refusal(glm, turns("q", "a", "q", "b"))
    assert '`model.end_of_turn: "<|user|>"` appends it' in found
    masked = mask(glm, turns("q", "a", "q", "b"), end_of_turn="<|user|>")
    assert trained(masked) == ["\n<think></think>\na<|user|>", "\n<think></think>\nb<|user|>"]
    assert masked.text.endswith("b<|user|>") and masked.text.count("<|user|>") == 3
    # A call stops at the header of the tool.
    example = read_case("tool_calls_empty_content")[0]
    masked = mask(glm, example.messages, example.tools, end_of_turn="<|user|>")
    assert [text.rpartition("<|")[2] for text in trained(masked)] == ["observation|>", "user|>"]


def test_an_end_that_the_template_prints_is_not_appended() -> None:
    masked = mask(CHATML, turns("q", "a"), end_of_turn="<|im_end|>")
    assert masked.text.endswith("a<|im_end|>\n")


def test_of_several_tokens_at_the_end_one_that_stops_the_model_is_the_end() -> None:
    template = HUMAN_ASSISTANT.replace(" + eos_token", "") + (
        "{% if not add_generation_prompt %}{{ '<|end|>' + eos_token + '<|eot|>' }}{% endif %}"
    )
    assert trained(mask(template, turns("q", "a"))) == [" a\n\n<|end|></s>"]


def test_what_closes_a_call_is_no_end() -> None:
    # GLM prints nothing behind a call at the end.
    example = read_case("tool_calls_empty_content")[0]
    assert "could never learn to stop" in refusal(
        trl_template("glm4moe"), example.messages[:2], example.tools
    )


# --- the date


def test_the_date_is_refused_only_where_a_row_shows_it() -> None:
    template = (
        "{%- if messages[0].role != 'system' %}{{- 'Today: ' + strftime_now('%d %B %Y') + '\\n' }}"
        "{%- endif %}" + CHATML
    )
    found = refusal(template, turns("q", "a"), moment=None)
    assert "prints today's date" in found and "model.template_date: " in found
    assert trained(mask(template, turns("q", "a", system="s"), moment=None)) == ["a<|im_end|>"]
    masked = mask(template, turns("q", "a"), moment=DAY)
    assert masked.text.startswith("Today: 31 January 2026\n<|im_start|>user")


@pytest.mark.parametrize(
    "directives", ["%Y-%m-%d", "%A %d %B %Y", "%-d.%-m.%y", "%H:%M", "100%% %j", "%a %b %e"]
)
def test_a_frozen_date_is_printed_as_the_clock_would(directives: str) -> None:
    template = "\n  {{ strftime_now('" + directives + "') }}\n" + CHATML
    masked = mask(template, turns("q", "a"), moment=DAY)
    assert masked.text.startswith(f"\n  {DAY.strftime(directives)}<|im_start|>")


def test_the_clock_of_others_goes_on() -> None:
    template = "{{ strftime_now('%Y') }}" + CHATML
    tokenizer = build_tokenizer("bytes", template)
    ConversationMasker(tokenizer, ChatFormat(moment=datetime(1999, 1, 1))).mask(turns("q", "a"))
    text = tokenizer.apply_chat_template(turns("q", "a"), tokenize=False)
    assert text.startswith(str(datetime.now().year))


@pytest.mark.parametrize("question", ["<think>", "Why <think>?</think>", "<tool_response>", "a"])
@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("nemotron_3_nano", "<think></think>\n" + NEMOTRON_CALL + "\n<|im_end|>"),
        ("qwen3", "<think>\n\n</think>\n\n" + QWEN_CALL + "<|im_end|>"),
    ],
)
def test_a_tag_in_a_question_begins_no_turn(template: str, expected: str, question: str) -> None:
    call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}
    chat = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    assert trained(mask(trl_template(template), chat)) == [expected]


@pytest.mark.parametrize("thought", ["<tool_call>", "<tool_response></tool_response>", "<think>"])
def test_a_thought_that_is_nothing_but_a_tag_is_missed_where_it_is_not_printed(
    thought: str,
) -> None:
    chat = [
        {"role": "user", "content": "2 x 7?"},
        {"role": "assistant", "content": "14", "reasoning_content": thought},
    ]
    assert trained(mask(trl_template("qwen3"), chat)) == [
        f"<think>\n{thought}\n</think>\n\n14<|im_end|>"
    ]
    found = refusal(trl_template("qwen2_5"), chat)
    assert "does not print `reasoning_content` of message 1 (assistant)" in found


def test_half_a_character_in_a_tool_is_refused() -> None:
    function = {"name": "f", "description": "x \ud800", "parameters": {}}
    found = refusal(
        trl_template("qwen3"), turns("q", "a"), [{"type": "function", "function": function}]
    )
    assert "a tool holds '\\ud800', half of a character" in found


def test_the_first_token_of_a_text_is_scored_by_nobody_and_its_bytes_do_not_count() -> None:
    bare = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    (completion,) = mask(bare, [{"role": "assistant", "content": "abc"}]).completions
    assert (completion.span.start, completion.num_bytes) == (0, 2)
    completions = mask(bare, turns("q", "abc")).completions
    assert [one.num_bytes for one in completions] == [3]
