"""The chat template of one tokenizer, rendered as the recipe says.

Owns the arguments, the date and the appended end of turn that every rendering shares, and the
errors for conversations that a template refuses. Does not own the facts found by rendering:
`skeleton.py` finds the text around contents, `structure_proof.py` the text around calls and
thoughts, and `turn_ends.py` the end of a turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from typing import Any, Final

from runner.errors import DataError

METHOD_TEXT: Final = "sentinel"
METHOD_PARTS: Final = "sentinel, content as a list of parts"
MAX_RENDERED_CHARACTERS: Final = 1_000_000  # in addition to the contents
PROBE: Final = "Qprobe"

# Two moments that differ in every part: a text that both produce is the same on any day.
ANY_MOMENTS: Final = (
    datetime(2001, 2, 3, 4, 5, 6, 789),
    datetime(2022, 11, 18, 19, 47, 58, 901234),
)
# The directives of strftime, those without padding first: `%-d` must not be read as `%` and `-d`.
_DIRECTIVES: Final = (
    *("-d", "-e", "-H", "-I", "-j", "-m", "-M", "-S", "-y"),
    *"aAbBcCdDeFgGhHIjklmMnprRsStTuUVwWxXyYzZf",
)
# A tool for checking whether a template only renders conversations with tools.
_ANY_TOOL: Final = {
    "type": "function",
    "function": {
        "name": "lookup",
        "description": "Looks a word up.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}},
    },
}

Message = Mapping[str, Any]
Messages = Sequence[Message]
Tools = Sequence[Mapping[str, Any]]


class MaskError(DataError):
    """A conversation whose completions cannot be proven under its tokenizer's chat template."""


@dataclass(frozen=True)
class ChatFormat:
    """The recipe's settings for rendering chats, apart from the template itself. `load_tokenizer`
    stores it in the tokenizer as `chat_format`, where every rendering finds it.

    `moment` is the fixed time for `strftime_now`; None uses the clock. `end_of_turn` is appended if
    the template prints none after the last answer. `stop_tokens` are known to stop the model, in
    addition to eos.
    """

    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    moment: datetime | None = None
    end_of_turn: str | None = None
    stop_tokens: frozenset[str] = frozenset()


def get_chat_format(tokenizer: Any) -> ChatFormat:
    """The format stored in the tokenizer; if there is none, one that adds nothing."""
    chat_format: ChatFormat | None = getattr(tokenizer, "chat_format", None)
    return chat_format or ChatFormat()


class ChatTemplate:
    """The chat template of one tokenizer, rendered in one format, by default the tokenizer's."""

    def __init__(self, tokenizer: Any, chat_format: ChatFormat | None = None) -> None:
        if not tokenizer.chat_template:
            raise MaskError(
                "the tokenizer has no chat template, so there is no chat format to train on",
                hint="name a chat template in the model card (chat_template: chat/<name>.jinja)",
            )
        self._tokenizer = tokenizer
        self.format = chat_format or get_chat_format(tokenizer)
        # A tokenizer may have a separate template for conversations with tools.
        self._sources: dict[bool, str] = {
            False: tokenizer.get_chat_template(),
            True: tokenizer.get_chat_template(tools=[_ANY_TOOL]),
        }
        special = {
            token.content for token in tokenizer.added_tokens_decoder.values() if token.special
        }
        self._special = special | set(tokenizer.all_special_tokens)
        longest_first = sorted(self._special, key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self.reads_clock = any("strftime_now" in source for source in self._sources.values())
        self.stop_tokens = self.format.stop_tokens | {
            token for token in (tokenizer.eos_token, self.format.end_of_turn) if token is not None
        }
        self._appended: str | None = None
        self._appended = self._find_appended()

    @property
    def eos_token(self) -> str | None:
        """The tokenizer's end-of-text token."""
        token: str | None = self._tokenizer.eos_token
        return token

    @property
    def appends_end(self) -> bool:
        """True if the recipe's end of turn is appended because the template prints none."""
        return self._appended is not None

    def holds(self, text: str) -> bool:
        """True if the template's source contains the text."""
        return any(text in source for source in self._sources.values())

    def is_special(self, text: str) -> bool:
        """True if the text is a special token."""
        return text in self._special

    def find_specials(self, text: str) -> list[re.Match[str]]:
        """The special tokens of a text, in order."""
        return list(self._special_pattern.finditer(text))

    def render(
        self,
        messages: Messages,
        method: str,
        *,
        tools: Tools = (),
        add_generation_prompt: bool = False,
    ) -> str:
        """The rendered text. Any error of the template becomes a MaskError with the template's own
        message.
        """
        chat = [dict(message) for message in messages]
        if method == METHOD_PARTS:
            for message in chat:
                if "content" in message:
                    message["content"] = [{"type": "text", "text": message["content"]}]
        try:
            text = self._apply(chat, tools, add_generation_prompt)
        except Exception as error:  # a template is foreign code and can raise anything
            raise self._explain(error, chat, tools, add_generation_prompt) from error
        if len(text) > MAX_RENDERED_CHARACTERS:
            said = len(repr(messages)) + len(repr(tools))
            if len(text) > MAX_RENDERED_CHARACTERS + 8 * said:
                raise MaskError(
                    f"the chat template prints {len(text):,} characters"
                    " for a conversation that is far shorter",
                    hint="name another chat template in `model.chat_template`",
                )
        if self._appended and not add_generation_prompt and chat[-1]["role"] == "assistant":
            text += self._appended
        return text

    def _apply(self, chat: list[dict[str, Any]], tools: Tools, add_generation_prompt: bool) -> str:
        source = self._sources[bool(tools)]
        if self.format.moment is not None and "strftime_now" in source:
            source = _freeze_clock(self.format.moment) + source
        text: str = self._tokenizer.apply_chat_template(
            chat,
            tools=[dict(tool) for tool in tools] or None,
            chat_template=source,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **self.format.template_kwargs,
        )
        return text

    def _explain(
        self, error: Exception, chat: list[dict[str, Any]], tools: Tools, has_prompt: bool
    ) -> MaskError:
        """The refusal in the template's words, or in ours if only tools are missing."""
        if not tools:
            with suppress(Exception):
                self._apply(chat, [_ANY_TOOL], has_prompt)
                return MaskError(
                    f"the chat template renders no conversation without `tools`: {error}",
                    hint=(
                        "give each row a `tools` column,"
                        " or name another template in `model.chat_template`"
                    ),
                )
        roles = ", ".join(message["role"] for message in chat)
        return MaskError(
            f"the chat template refuses a conversation with the roles {roles}: {error}",
            hint=(
                "change the roles in the data (a system text can open the first user turn),"
                " or name another template in `model.chat_template`"
            ),
        )

    def _find_appended(self) -> str | None:
        """The end of turn to append; None if the template already prints it."""
        wanted = self.format.end_of_turn
        if wanted is None:
            return None
        chat = [{"role": "user", "content": PROBE}, {"role": "assistant", "content": PROBE * 2}]
        for method in (METHOD_TEXT, METHOD_PARTS):
            with suppress(MaskError):
                text = self.render(chat, method)
                if PROBE * 2 in text:
                    return None if wanted in text.rpartition(PROBE * 2)[2] else wanted
        return wanted


@cache
def _freeze_clock(moment: datetime) -> str:
    """A template prefix that fixes `strftime_now` at one moment.

    Transformers passes templates a function that reads the clock, and accepts no replacement. A
    macro of the same name hides it, in this rendering only.
    """
    values = [("%%", "\ue000")]
    values += [(f"%{directive}", moment.strftime(f"%{directive}")) for directive in _DIRECTIVES]
    values += [("\ue000", "%")]
    replaced = "".join(f" | replace({json.dumps(a)}, {json.dumps(b)})" for a, b in values)
    # Jinja drops the newline after the macro, so the template's own first line stays unchanged.
    return f"{{%- macro strftime_now(format) -%}}{{{{- format{replaced} -}}}}{{%- endmacro %}}\n"


def describe(messages: Messages, index: int) -> str:
    """The name of a message in errors.

    >>> describe([{"role": "user"}, {"role": "assistant"}], 1)
    'message 1 (assistant)'
    """
    return f"message {index} ({messages[index]['role']})"


def quote(text: str, limit: int = 60) -> str:
    """The beginning of a text, as a Python literal, because whitespace matters in these errors.

    >>> quote("a\\n" * 9, limit=3)
    "'a\\\\na'..."
    """
    return repr(text) if len(text) <= limit else repr(text[:limit]) + "..."


def describe_difference(expected: str, found: str) -> str:
    """Both texts, from shortly before they differ.

    >>> describe_difference("<a>x", "<a>y")
    "expected '<a>x', found '<a>y'"
    """
    begin = max(0, len(common_prefix(expected, found)) - 20)
    return f"expected {quote(expected[begin:])}, found {quote(found[begin:])}"


def common_prefix(left: str, right: str) -> str:
    """The common beginning of two texts.

    >>> common_prefix("<end><user>", "<end>")
    '<end>'
    """
    length = next(
        (n for n, pair in enumerate(zip(left, right, strict=False)) if pair[0] != pair[1]), None
    )
    return min(left, right, key=len) if length is None else left[:length]
