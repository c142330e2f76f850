"""Conversations of sentinel words, and a small real tokenizer for any chat template: what the
oracle of `mask_oracle.py` puts before a masker.

Owns the words, who said each of them, and the guess which strings of a template are special tokens.
Knows no template and nothing of how masks are found.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, tzinfo
from functools import cache
from itertools import product
from typing import Any, Final

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

MAX_RENDERED_CHARACTERS: Final = 1_000_000
MOMENT: Final = datetime(2026, 1, 2, 3, 4, 5)  # the clock of all templates is frozen there

# Markup in the usual brackets of control tokens; tags in lower case, such as <think>, are text.
_CONTROL: Final = re.compile(
    r"<\|[^<>|\s'\"+~]{1,40}\|>"
    r"|<｜[^<>｜'\"+~]{1,40}｜>"
    r"|<\|[^<>|\s'\"+~]{1,30}>|<[^<>|\s'\"+~/]{1,30}\|>"
    r"|</?s>|<(?:bos|eos|pad|unk|sop|eop|eod|image|video|audio|im_end|im_start)>"
    r"|<(?:start|end|begin|beginning)_of_[a-z]+>|<[A-Z][A-Z_]{2,}>|<extra_id_\d+>|<reserved_\d+>|<SPECIAL_\d+>"
    r"|<seed:[a-z_]+>|\]~b\]|\]~!b\[|\[e~\[|\[\|[a-z]+\|\]|<(?:sep|step|eo[a-z])>|</?assistant>"
    r"|\[/?[A-Z][A-Z_]{2,}\]|\[gMASK\]"
)
# Added to the vocabulary of some models as they are, but no control tokens there.
_ADDED_TEXT: Final = ("<think>", "</think>", "<tool_call>", "</tool_call>")
# Brackets around capitals are control tokens from the third Mistral tokenizer on; plain before.
_MISTRAL_CONTROL: Final = ("[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[SYSTEM_PROMPT]")


@dataclass(frozen=True)
class Word:
    """A sentinel word, the message that says it (None: a tool's description) and as what."""

    text: str
    message: int | None
    part: str


@dataclass(frozen=True)
class Call:
    """A call's name and argument keys, which the tools' descriptions repeat, and the words that are
    its argument values.
    """

    message: int
    names: tuple[str, ...]
    value: str


@dataclass
class Conversation:
    """Messages and tools in the row's own form; `turns` are the assistant messages to train, None
    all of them.
    """

    name: str
    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)
    turns: tuple[int, ...] | None = None
    functions: list[dict[str, Any]] = field(default_factory=list)
    words: list[Word] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)

    @property
    def wanted(self) -> tuple[int, ...]:
        """The assistant messages to train."""
        if self.turns is not None:
            return self.turns
        return tuple(n for n, each in enumerate(self.messages) if each["role"] == "assistant")

    def words_of(self, message: int) -> list[str]:
        return [word.text for word in self.words if word.message == message]


def _word(index: int) -> str:
    """A word of nine letters that no other index has and no template says.

    >>> _word(0), _word(21)
    ('zukbababa', 'zukbabane')
    """
    vowels, consonants = "aeiou", "bdfgklmnprstvz"
    syllables = []
    for _ in range(3):
        index, rest = divmod(index, len(vowels) * len(consonants) // 3)
        syllables.append(consonants[rest % len(consonants)] + vowels[rest % len(vowels)])
    return "zuk" + "".join(reversed(syllables))


class _Writer:
    """Builds one conversation from short names of its turns."""

    def __init__(self, name: str, turns: tuple[int, ...] | None) -> None:
        self.chat = Conversation(name, turns=turns)
        self._count = 0
        self._open_calls: list[tuple[str, str]] = []

    def _new_word(self, part: str, message: int | None = None, *, is_shared: bool = False) -> str:
        text = _word(self._count)
        self._count += 1
        if not is_shared:
            self.chat.words.append(Word(text, message, part))
        return text

    def _text(self, part: str, join: str = " and ") -> str:
        """Two words, so that a mask that loses either end is seen."""
        message = len(self.chat.messages)
        return self._new_word(part, message) + join + self._new_word(part, message)

    def add_tools(self, *, are_offered: bool) -> None:
        """Two functions to call. Where the row does not offer them, nobody says their words."""
        for _ in range(2):
            key = self._new_word("key", is_shared=True)
            parameters = {
                "type": "object",
                "properties": {
                    key: {"type": "string", "description": self._new_word("parameter") + " text"}
                },
                "required": [key],
            }
            function = {
                "name": "get_" + self._new_word("name", is_shared=True),
                "description": self._new_word("tool") + " it.",
                "parameters": parameters,
            }
            self.chat.functions.append(function)
            if are_offered:
                self.chat.tools.append({"type": "function", "function": function})
        if not are_offered:
            self.chat.words.clear()

    def say(self, role: str, join: str, edges: str) -> None:
        self.chat.messages.append(
            {"role": role, "content": edges + self._text(role, join) + edges[::-1]}
        )

    def answer(self, parts: Sequence[str], join: str, edges: str) -> None:
        """An assistant turn: any of `think`, `tags`, `text` and kinds of calls (`_call`)."""
        index = len(self.chat.messages)
        message: dict[str, Any] = {"role": "assistant", "content": ""}
        if "think" in parts:
            message["reasoning_content"] = self._text("thought", join)
        if "tags" in parts:
            message["content"] = f"<think>\n{self._text('thought in tags')}\n</think>\n\n"
        if "text" in parts or "tags" in parts:
            message["content"] += edges + self._text("answer", join) + edges[::-1]
        calls = [part for part in parts if part not in ("think", "tags", "text")]
        if calls:
            message["tool_calls"] = [
                self._call(index, number, kind) for number, kind in enumerate(calls)
            ]
        self.chat.messages.append(message)

    def _call(self, message: int, number: int, kind: str) -> dict[str, Any]:
        """The call of a tool: the n-th one as the n-th `call`, the first one as `again`, with
        `nested` arguments, or with a value that is `hard` to write in JSON.
        """
        function = self.chat.functions[0 if kind == "again" else number]
        (key,) = function["parameters"]["properties"]
        value = self._new_word("argument", message)
        arguments: dict[str, Any] = {key: value}
        if kind == "nested":
            arguments["more"] = {"flag": True, "list": [1, self._new_word("argument", message)]}
        if kind == "hard":
            arguments[key] = f'{value} "é"\n<b>\'\\{self._new_word("argument", message)}'
        self.chat.calls.append(Call(message, (function["name"], key), value))
        call_id = f"call{message:02d}{number:03d}"  # nine letters and digits, as Mistral wants
        self._open_calls.append((call_id, function["name"]))
        return {
            "type": "function",
            "id": call_id,
            "function": {"name": function["name"], "arguments": arguments},
        }

    def return_result(self, is_json: bool) -> None:
        call_id, name = self._open_calls.pop(0)
        text = self._text("tool result")
        self.chat.messages.append(
            {
                "role": "tool",
                "name": name,
                "tool_call_id": call_id,
                "content": json.dumps({"result": text}) if is_json else text,
            }
        )


_ROLES: Final = {"s": "system", "d": "developer", "u": "user"}

# name: (turns, options). A turn is s, d, u, t (a tool's result), or a with its parts.
_TEXT_CHATS: Final[dict[str, str]] = {
    "single": "u a",
    "two rounds": "u a u a",
    "three rounds": "u a u a u a",
    "system": "s u a",
    "system, two rounds": "s u a u a",
    "developer": "d u a",
    "two users": "u u a",
    "two assistants": "u a a",
    "two assistants, then a user": "u a a u a",
    "assistant first": "a u a",
}
_REASONING_CHATS: Final[dict[str, str]] = {
    "reasoning": "u a:think,text",
    "reasoning, two rounds": "u a:think,text u a:think,text",
    "reasoning, last round only": "u a u a:think,text",
    "reasoning, first round only": "u a:think,text u a",
    "system, reasoning": "s u a:think,text",
    "think tags": "u a:tags",
    "think tags, two rounds": "u a:tags u a:tags",
    "think tags, last round only": "u a u a:tags",
}
_TOOL_CHATS: Final[dict[str, str]] = {
    "tools offered": "u a",
    "call": "u a:call",
    "text and call": "u a:text,call",
    "call, result, answer": "u a:call t a",
    "text and call, result, answer": "u a:text,call t a",
    "system, call, result, answer": "s u a:call t a",
    "two calls": "u a:call,call",
    "two calls, results, answer": "u a:call,call t t a",
    "call after call": "u a:call t a:call t a",
    "call, answer, another round": "u a:call t a u a",
    "the same tool twice": "u a:call,again t t a",
    "nested arguments": "u a:nested t a",
    "hard arguments": "u a:hard t a",
    "result in JSON": "u a:call t:json a",
    "reasoning and call": "u a:think,call t a",
    "reasoning and call, reasoned answer": "u a:think,call t a:think,text",
    "reasoning, text and call": "u a:think,text,call t a:think,text",
    "think tags and call": "u a:tags,call t a:tags",
}
_CHOSEN: Final = {  # conversation: the assistant messages that are trained
    "two rounds": ((3,), (1,)),
    "three rounds": ((1, 5),),
    "two assistants": ((2,),),
    "reasoning, two rounds": ((3,),),
    "think tags, two rounds": ((3,),),
    "call, result, answer": ((3,), (1,)),
    "call, answer, another round": ((5,), (1, 3)),
    "reasoning and call, reasoned answer": ((3,), (1,)),
    "call after call": ((3,), (5,)),
}


def _write(
    name: str,
    plan: str,
    *,
    tools: bool,
    turns: tuple[int, ...] | None = None,
    join: str = " and ",
    edges: str = "",
) -> Conversation:
    writer = _Writer(name, turns)
    writer.add_tools(are_offered=tools)
    for step in plan.split():
        kind, _, parts = step.partition(":")
        if kind in _ROLES:
            writer.say(_ROLES[kind], join, edges)
        elif kind == "t":
            writer.return_result(parts == "json")
        else:
            writer.answer((parts or "text").split(","), join, edges)
    return writer.chat


def conversations() -> Iterator[Conversation]:
    """Every conversation of the oracle, each with words of its own."""
    for plans, tools in ((_TEXT_CHATS, False), (_REASONING_CHATS, False), (_TOOL_CHATS, True)):
        for name, plan in plans.items():
            yield _write(name, plan, tools=tools)
            for turns in _CHOSEN.get(name, ()):
                label = f"{name}, trained {', '.join(map(str, turns))}"
                yield _write(label, plan, tools=tools, turns=turns)
    yield _write("call of a tool that is not offered", "u a:call t a", tools=False)
    yield _write("blanks at the ends", "s u a u a", tools=False, edges=" \n")
    yield _write("paragraphs", "u a u a", tools=False, join="\n\n- ")
    yield _write("reasoning in paragraphs", "u a:think,text", tools=False, join="\n\n- ")


# --- rendering

# Forms of texts and arguments that a template may need: plain, as parts, and as JSON text.
FORMS: Final = tuple(product(("text", "parts"), ("mapping", "json")))
Form = tuple[str, str]


def in_form(messages: Sequence[Mapping[str, Any]], form: Form) -> list[dict[str, Any]]:
    """The messages with contents as texts or parts, and arguments as mappings or JSON."""
    shaped = []
    for message in messages:
        copy = dict(message)
        if form[0] == "parts":
            copy["content"] = [{"type": "text", "text": message["content"]}]
        if form[1] == "json" and "tool_calls" in message:
            copy["tool_calls"] = [
                {
                    **call,
                    "function": {
                        **call["function"],
                        "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
                    },
                }
                for call in message["tool_calls"]
            ]
        shaped.append(copy)
    return shaped


class _StoppedClock(datetime):
    @classmethod
    def now(cls, tz: tzinfo | None = None) -> _StoppedClock:
        return cls.fromtimestamp(MOMENT.timestamp(), tz)


@contextmanager
def _clock_stopped() -> Iterator[None]:
    """Transformers' own `strftime_now`, which takes no other clock, at `MOMENT`."""
    clock = chat_template_utils.datetime
    chat_template_utils.datetime = _StoppedClock
    try:
        yield
    finally:
        chat_template_utils.datetime = clock


@dataclass(frozen=True)
class Setting:
    """The template's arguments in a recipe, and the token that ends an answer if the template
    prints none.
    """

    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    end_of_turn: str | None = None


def render(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    form: Form,
    setting: Setting,
    *,
    add_generation_prompt: bool = False,
) -> str:
    """The template's own rendering. Raises whatever the template raises, and ValueError where it
    prints far more than it was given.
    """
    with _clock_stopped():
        text: str = tokenizer.apply_chat_template(
            in_form(messages, form),
            tools=list(tools) or None,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **setting.template_kwargs,
        )
    if len(text) > MAX_RENDERED_CHARACTERS:
        raise ValueError(f"renders {len(text):,} characters")
    if setting.end_of_turn and not add_generation_prompt and messages[-1]["role"] == "assistant":
        text += setting.end_of_turn
    return text


# --- tokenizers


@cache
def _trained_bpe() -> str:
    """A byte-level BPE as JSON whose merges cross blanks, newlines, headers and sentinel words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [f"{_word(index)} and {_word(index + 1)}\n\n" for index in range(60)]
    texts += ["user\nassistant\nUser: Assistant: system tool name arguments function\n"] * 20
    tokenizer.train_from_iterator(texts, trainer)
    return str(tokenizer.to_str())


def _build(template: str, bos: str, eos: str, control: Sequence[str]) -> Any:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained_bpe()), bos_token=bos, eos_token=eos
    )
    tokens = [AddedToken(name, special=True, normalized=False) for name in control]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    added = [name for name in _ADDED_TEXT if name in template]
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in added])
    tokenizer.chat_template = template
    return tokenizer


def control_tokens(text: str) -> list[str]:
    """The strings of a text that look like control tokens, each once.

    >>> control_tokens("<s><|im_start|>user\\nhi <b><think><|im_end|>")
    ['<s>', '<|im_start|>', '<|im_end|>']
    """
    return list(dict.fromkeys(_CONTROL.findall(text)))


def build_tokenizer(template: str, bos: str = "", eos: str = "") -> Any:
    """A small fast tokenizer that carries the template and knows the control tokens that it prints.

    Where the template's origin is silent about BOS or EOS, the usual ones stand in.
    """
    if not bos:
        bos = next(
            (
                name
                for name in ("<|begin_of_text|>", "<bos>", "<|startoftext|>")
                if name in template
            ),
            "<bos>" if "<start_of_turn>" in template else "<s>",
        )
    guessed = eos or ("</s>" if "eos_token" in template else "<|endoftext|>")
    bare = _build(template, bos, guessed, [])
    seen = template
    for chat in conversations():
        if chat.name in ("system", "two rounds", "two calls, results, answer", "reasoning"):
            for form in FORMS[:2]:
                try:
                    seen += render(bare, chat.messages, chat.tools, form, Setting())
                except Exception:  # any template may refuse any conversation
                    continue
    control = [name for name in control_tokens(seen) if name not in (bos, guessed)]
    if not any(name in seen for name in _MISTRAL_CONTROL):
        control = [name for name in control if not re.fullmatch(r"\[/?[A-Z_]+\]", name)]
    return _build(template, bos, guessed, control)
