"""The verdict on one mask, from renderings and sentinel words alone.

Owns what is right: which words must be trained, which must not, where a turn may start and at which
tokens it may end. It asks the template by rendering and never the code that it judges, but for the
mask itself.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from benchmarks.mask_oracle_chats import (
    FORMS,
    Call,
    Conversation,
    Form,
    Setting,
    Word,
    control_tokens,
    conversations,
    render,
)
from runner.errors import DataError

Messages = Sequence[Mapping[str, Any]]
RIGHT: Final = "right"
REFUSED: Final = "refused"
WRONG: Final = "wrong"
NO_END: Final = "no token ends a turn"


@dataclass(frozen=True)
class Verdict:
    """`right`, `refused` or `wrong`, why in a few words, and the particulars.

    `is_avoidable`: refused although the template prints every word once, each turn where generation
    starts it, unchanged by what follows, and ends it at a stop. `notes` tell of right masks what
    a user should hear.
    """

    verdict: str
    why: str = ""
    detail: str = ""
    is_avoidable: bool = False
    notes: tuple[str, ...] = ()


class Oracle:
    """The renderings of one tokenizer's chat template, and what follows from them."""

    def __init__(self, tokenizer: Any, setting: Setting) -> None:
        self.tokenizer = tokenizer
        self.setting = setting
        self.ends = {tokenizer.eos_token, setting.end_of_turn}  # stop the model, wherever printed
        self._errors: dict[Form, str] = {}
        by_length = sorted(tokenizer.all_special_tokens, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, by_length)))
        self._unasked_prompt = self._find_unasked_prompt()
        self.openers = self._find_openers()

    def specials(self, text: str) -> list[str]:
        """The special tokens of a text, in order."""
        return self._pattern.findall(text)

    def try_render(
        self, messages: Messages, tools: Messages, form: Form, *, generate: bool = False
    ) -> str | None:
        """The rendering, None where the template refuses."""
        try:
            return render(
                self.tokenizer,
                messages,
                tools,
                form,
                self.setting,
                add_generation_prompt=generate,
            )
        except Exception as error:  # a template is a stranger's program: it can raise anything
            self._errors[form] = str(error).partition("\n")[0] or type(error).__name__
            return None

    def renderings(self, chat: Conversation) -> dict[str, Form]:
        """The different renderings of a conversation, each with a form that yields it."""
        texts: dict[str, Form] = {}
        for form in FORMS:
            text = self.try_render(chat.messages, chat.tools, form)
            # A template that prints a list as Python source was not meant to be given one.
            if text is not None and not (form[0] == "parts" and "'type': 'text'" in text):
                texts.setdefault(text, form)
        return texts

    def template_error(self) -> str:
        return self._errors.get(FORMS[0], "")

    def _find_openers(self) -> set[str]:
        """The special tokens that open a turn and so can never end one.

        Those of the generation prompt; the last one before a user's text, if it is the same at the
        beginning and behind an answer; and the first two of the whole text, as far as they stand
        before anybody's words: nothing can be closed before something was opened.
        """
        found: set[str] = set()
        # The one with a system text comes last: templates print none of their own before it.
        first: list[str] = []
        for chat in sorted(conversations(), key=lambda chat: chat.name == "system"):
            if chat.name not in ("single", "two rounds", "system"):
                continue
            for text, form in self.renderings(chat).items():
                bare = self.try_render(chat.messages[:-1], [], form)
                prompt = self.try_render(chat.messages[:-1], [], form, generate=True)
                if bare is not None and prompt is not None and prompt.startswith(bare):
                    found |= set(self.specials(prompt[len(bare) :]))
                if any(word.text not in text for word in chat.words):
                    continue
                before = self.specials(text[: min(text.index(word.text) for word in chat.words)])
                first = before[: 2 if before[:1] == [self.tokenizer.bos_token] else 1]
                if chat.name == "two rounds":
                    answer, user = (text.index(chat.words_of(n)[0]) for n in (1, 2))
                    behind = self.specials(text[answer:user])
                    if behind and before[-1:] == behind[-1:]:
                        found.add(behind[-1])
        found |= set(first)
        return found - self.ends

    def stops(self, chat: Conversation, index: int, form: Form) -> set[str]:
        """The special tokens at which the template lets an assistant turn end.

        What stands behind the turn's last word both where the conversation stops and where somebody
        speaks next (a user, or the tool that was called); where the two share nothing, either.
        """
        head = chat.messages[: index + 1]
        message = chat.messages[index]
        probe = "zukprobezuk"
        follower: list[dict[str, Any]] = [{"role": "user", "content": probe}]
        if message.get("tool_calls"):
            follower = [
                {
                    "role": "tool",
                    "name": call["function"]["name"],
                    "tool_call_id": call["id"],
                    "content": probe,
                }
                for call in message["tool_calls"]
            ]
        last = self.try_render(head, chat.tools, form)
        followed = self.try_render([*head, *follower], chat.tools, form)
        ends = []
        for text, stop in ((last, None), (followed, probe)):
            start = _last_end(text or "", chat.words_of(index))
            if text is None or start is None:
                continue
            end = len(text) if stop is None or stop not in text[start:] else text.index(stop, start)
            tail = re.sub(r"\[\{'type': 'text'.*", "", text[start:end])
            ends.append(set(self.specials(tail)) - self.openers)
        both = ends[0] & ends[1] if len(ends) == 2 else set()
        return both or set().union(*ends)

    def is_rewritten(self, chat: Conversation, index: int, text: str, form: Form) -> bool | None:
        """True if the template prints a turn differently than when the conversation ends there;
        None if that cannot be seen, or if only the prompt of the turn differs.
        """
        if index == len(chat.messages) - 1:
            return False
        head = self.try_render(chat.messages[: index + 1], chat.tools, form)
        prompt = self.try_render(chat.messages[:index], chat.tools, form, generate=True)
        words = chat.words_of(index)
        if head is None or prompt is None:
            return None
        if [word for word in words if word in head] != [word for word in words if word in text]:
            return True
        end_head, end_text = _last_end(head, words), _last_end(text, words)
        if not head.startswith(prompt) or end_head is None or end_text is None:
            return None
        if not text[:end_text].endswith(head[len(prompt) : end_head]):
            return True
        return False if text.startswith(head[:end_head]) else None

    def prompt_end(self, chat: Conversation, index: int, text: str, form: Form) -> int | None:
        """The character at which the prompt of a turn ends, None where the rendering does not begin
        with the prompt.
        """
        prompt = self.try_render(chat.messages[:index], chat.tools, form, generate=True)
        words = [text.find(word) for word in chat.words_of(index) if word in text]
        if prompt is None or not text.startswith(prompt) or not words or min(words) < len(prompt):
            return None
        return len(prompt)

    def generation_start(self, chat: Conversation, index: int, text: str, form: Form) -> int | None:
        """As `prompt_end`, but None where the template has no generation prompt: the header of the
        turn follows there.
        """
        end = self.prompt_end(chat, index, text, form)
        bare = self.try_render(chat.messages[:index], chat.tools, form)
        if end is None or bare is None:
            return end
        if text[:end] != bare.removesuffix(self.setting.end_of_turn or ""):
            return end
        return end if self._unasked_prompt and bare.endswith(self._unasked_prompt) else None

    def _find_unasked_prompt(self) -> str:
        """The end of a generation prompt that the template prints always, asked for or not: what
        stands behind a last answer, from where it parts with what a user's turn is opened by, if
        a user's last turn ends so, too.
        """
        for chat in conversations():
            if chat.name == "two rounds":
                for text, form in self.renderings(chat).items():
                    answered = self.try_render(chat.messages[:2], [], form)
                    asked = self.try_render(chat.messages[:3], [], form)
                    own = _last_end(text, chat.words_of(1))
                    if answered is None or asked is None or own is None:
                        continue
                    rest = answered[_num_shared(answered, text) :]
                    if rest and asked.endswith(rest):
                        return rest
        return ""

    # --- the template's effect on a conversation, under any masker

    def why_not(self, chat: Conversation, texts: Mapping[str, Form]) -> str:
        """The reason for which a conversation may be refused, in a few words; empty where each
        turn could be proven by the text before it.
        """
        if not texts:
            return "the template refuses the conversation"
        return min(
            (self._why_not(chat, *each) for each in texts.items()), key=lambda why: why != ""
        )

    def _why_not(self, chat: Conversation, text: str, form: Form) -> str:
        wanted = chat.wanted
        missing = [word for word in chat.words if word.text not in text]
        if own := {word.part for word in missing if word.message in wanted}:
            if any(self.is_rewritten(chat, n, text, form) for n in wanted):
                return "an earlier turn is printed otherwise than it was written"
            return f"the template leaves out the assistant's {_join(own)}"
        if others := _needed_by_others(chat, missing):
            return f"the template leaves out {_join(others)}"
        if any(_place_of_name(chat, call, name, text) is None for call, name in _names(chat)):
            return "the template leaves out the name of a call"
        if any(text.count(word.text) > 1 for word in chat.words):
            return "the template prints a text twice"
        if any(self.is_rewritten(chat, index, text, form) for index in wanted):
            return "an earlier turn is printed otherwise than it was written"
        for index in wanted:
            start = self.prompt_end(chat, index, text, form)
            end = self._turn_end(chat, index, text)
            if start is None:
                return "the rendering does not begin with the prompt of a turn"
            if any(start <= text.find(w.text) < end for w in chat.words if w.message != index):
                return "turns are printed in another order"
            gap = text[end : _next_word(chat, index, text, end)]
            if not (self.stops(chat, index, form) | self.ends) & set(self.specials(gap)):
                return NO_END
        return ""

    @staticmethod
    def _turn_end(chat: Conversation, index: int, text: str) -> int:
        return _last_end(text, chat.words_of(index)) or len(text)


def judge(oracle: Oracle, mask: Callable[..., Any], chat: Conversation) -> Verdict:
    """The verdict on what `mask(messages, tools, turns=...)` makes of one conversation."""
    texts = oracle.renderings(chat)
    try:
        masked = mask(chat.messages, tuple(chat.tools), turns=chat.turns)
    except DataError as error:
        why = oracle.why_not(chat, texts)
        detail = error.message.partition("\n")[0]
        if not texts:
            return Verdict(REFUSED, why, oracle.template_error() or detail)
        return Verdict(REFUSED, why or "avoidable: " + _shorten(detail), detail, not why)
    except Exception as error:  # the verdict on any crash
        return Verdict(WRONG, "crashes", f"{type(error).__name__}: {error}")
    return _judge_mask(oracle, chat, texts, masked)


def _judge_mask(
    oracle: Oracle, chat: Conversation, texts: Mapping[str, Form], masked: Any
) -> Verdict:
    encodings = {
        text: oracle.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        for text in texts
    }
    same = [t for t, each in encodings.items() if each["input_ids"] == list(masked.input_ids)]
    if not same:
        return Verdict(WRONG, "input_ids are not the template's")
    text = same[0]
    form, offsets = texts[text], encodings[text]["offset_mapping"]
    done = {each.message: each.span for each in masked.completions if each.message in chat.wanted}
    if sorted(done) != sorted(chat.wanted):
        return Verdict(WRONG, "completions are not the wanted turns", f"{sorted(done)}")
    trained = bytearray(len(text))
    for span in done.values():
        if not 0 <= span.start < span.end <= len(offsets):
            return Verdict(WRONG, "a completion has no tokens")
        for start, end in offsets[span.start : span.end]:
            trained[start:end] = b"\1" * (end - start)
    if foreign := _foreign_words(chat, text, trained):
        return Verdict(WRONG, f"trains {_join(foreign)}", repr(text))
    notes: list[str] = []
    rewritten = {each.message for each in masked.completions if each.rewritten}
    for index, span in done.items():
        problem = _judge_words(chat, text, trained, index)
        problem = problem or _judge_calls(chat, text, trained, index)
        problem = problem or _judge_start(oracle, chat, text, form, index, span, offsets)
        problem = problem or _judge_end(oracle, chat, text, form, index, span, offsets, notes)
        if not problem and index not in rewritten and oracle.is_rewritten(chat, index, text, form):
            problem = "a turn that is printed otherwise than it was written is not marked"
        if problem:
            start, end = offsets[span.start][0], offsets[span.end - 1][1]
            return Verdict(WRONG, problem, f"message {index}: {text[start:end]!r} of {text!r}")
    return _grade(oracle, chat, text, form, rewritten, notes)


def _grade(
    oracle: Oracle,
    chat: Conversation,
    text: str,
    form: Form,
    rewritten: set[int],
    notes: list[str],
) -> Verdict:
    """The verdict on a mask that trains what it should."""
    if refused := sorted(rewritten & set(chat.wanted)):
        seen = [oracle.is_rewritten(chat, index, text, form) for index in refused]
        why = "an earlier turn is printed otherwise than it was written"
        return Verdict(REFUSED, why, f"messages {refused}", is_avoidable=False in seen)
    missing = [word for word in chat.words if word.text not in text]
    left = {f"the assistant's {word.part}" for word in missing if word.message in chat.wanted}
    left |= _needed_by_others(chat, missing)
    if left:
        return Verdict(
            WRONG, f"accepted although the template leaves out {_join(left)}", repr(text)
        )
    return Verdict(RIGHT, notes=tuple(notes))


def _judge_words(chat: Conversation, text: str, trained: bytearray, index: int) -> str:
    for word in chat.words:
        if word.message == index:
            for start in _places(text, word.text):
                if 0 in trained[start : start + len(word.text)]:
                    return f"does not train the assistant's {word.part}"
    printed = [word for word in chat.words_of(index) if word in text]
    return "" if printed else "trains nothing but the end of a turn"


def _judge_calls(chat: Conversation, text: str, trained: bytearray, index: int) -> str:
    """A call's name and keys are trained where they stand by its value; tools, results and other
    calls may name them, too.
    """
    for call, name in _names(chat):
        if call.message == index and call.value in text:
            start = _place_of_name(chat, call, name, text)
            if start is None:
                return "accepted although the template leaves out a call's name or key"
            if 0 in trained[start : start + len(name)]:
                return "does not train a call's name or key"
    return ""


def _names(chat: Conversation) -> list[tuple[Call, str]]:
    return [(call, name) for call in chat.calls for name in call.names]


def _place_of_name(chat: Conversation, call: Call, name: str, text: str) -> int | None:
    """Position of a call's name or key next to the call's value, with no other speaker's word
    between them; 0 if the value is not printed.
    """
    if call.value not in text:
        return 0
    value = text.index(call.value)
    others = [w.text for w in chat.words if w.message != call.message]
    places = [at for word in others for at in _places(text, word)]
    begin = max((at for at in places if at < value), default=0)
    end = min((at for at in places if at > value), default=len(text))
    start = text.rfind(name, begin, value)
    start = text.find(name, value, end) if start < 0 else start
    return None if start < 0 else start


def _needed_by_others(chat: Conversation, missing: Sequence[Word]) -> set[str]:
    """Words of tools, other speakers and context turns that are not printed. Templates leave out
    the thoughts of context turns on purpose.
    """
    assistants = _assistants(chat)
    return {
        word.part if word.message not in assistants else f"an earlier turn's {word.part}"
        for word in missing
        if word.message not in chat.wanted
        and not (word.message in assistants and word.part.startswith("thought"))
    }


def _judge_start(
    oracle: Oracle,
    chat: Conversation,
    text: str,
    form: Form,
    index: int,
    span: Any,
    offsets: Sequence[tuple[int, int]],
) -> str:
    """A turn is trained from the token on that holds the first character that is generated."""
    start = oracle.generation_start(chat, index, text, form)
    if start is None:
        return ""
    first = bisect_right([end for _, end in offsets], start)
    header = text[offsets[span.start][0] : start].strip()
    # Think tags that the row itself says are its own, although a generation prompt holds them, too.
    is_own = header != "" and chat.messages[index]["content"].startswith(header)
    if span.start < first and not is_own:
        return "trains the header of a turn"
    own = min(text.index(word) for word in chat.words_of(index) if word in text)
    if span.start > first and text[offsets[first][0] : min(own, offsets[span.start][0])].strip():
        return "does not train all that generation writes before the answer"
    return ""


def _judge_end(
    oracle: Oracle,
    chat: Conversation,
    text: str,
    form: Form,
    index: int,
    span: Any,
    offsets: Sequence[tuple[int, int]],
    notes: list[str],
) -> str:
    """A turn ends at a token that stops the model, and nothing of the next turn is in it."""
    own_end = _last_end(text, chat.words_of(index))
    assert own_end is not None
    last_start, end = offsets[span.end - 1]
    gap = text[own_end : _next_word(chat, index, text, own_end)]
    stops = oracle.stops(chat, index, form) | oracle.ends
    if text[last_start:end] in stops:
        return ""
    if text[last_start:end] in oracle.openers:
        return f"ends at {text[last_start:end]!r}, which opens a turn"
    if possible := [token for token in oracle.specials(gap) if token in stops]:
        return f"ends at {text[last_start:end]!r}, not at {possible[-1]!r}"
    notes.append("a turn ends in text that stops nothing")
    return ""


def _foreign_words(chat: Conversation, text: str, trained: bytearray) -> set[str]:
    """List the words outside the wanted turns that are trained, in whole or in part."""
    return {
        word.part if word.message not in _assistants(chat) else f"an untrained turn's {word.part}"
        for word in chat.words
        if word.message not in chat.wanted
        for start in _places(text, word.text)
        if 1 in trained[start : start + len(word.text)]
    }


def _assistants(chat: Conversation) -> set[int]:
    return {n for n, message in enumerate(chat.messages) if message["role"] == "assistant"}


def _places(text: str, word: str) -> list[int]:
    return [match.start() for match in re.finditer(re.escape(word), text)]


def _last_end(text: str, words: Sequence[str]) -> int | None:
    """End of the last printed word."""
    ends = [text.rfind(word) + len(word) for word in words if word in text]
    return max(ends, default=None)


def _num_shared(left: str, right: str) -> int:
    """Length of the common prefix, in characters.

    >>> _num_shared("<end><user>", "<end>")
    5
    """
    pairs = enumerate(zip(left, right, strict=False))
    return next((n for n, pair in pairs if pair[0] != pair[1]), min(len(left), len(right)))


def _next_word(chat: Conversation, index: int, text: str, position: int) -> int:
    """Start of the next word of another speaker."""
    others = [text.find(word.text, position) for word in chat.words if word.message != index]
    return min((at for at in others if at >= 0), default=len(text))


def _join(parts: set[str]) -> str:
    return " and ".join(sorted(parts))


def _shorten(message: str) -> str:
    """A refusal without its quotes, numbers and names, so that equal ones count together."""
    message = re.sub(r"'[^']*'|\"[^\"]*\"", "'..'", message)
    message = re.sub(r"message \d+ \([a-z]+\)|\d+", "#", message)
    return message if len(message) <= 110 else message[:110] + "..."


def guess_eos(oracle: Oracle) -> str:
    """The last token at which the template lets an answer end; empty where it names none."""
    for chat in conversations():
        if chat.name == "single":
            for text, form in oracle.renderings(chat).items():
                end = _last_end(text, chat.words_of(1))
                stops = oracle.stops(chat, 1, form)
                if end is not None and stops:
                    printed = [t for t in control_tokens(text[end:]) if t in stops]
                    return printed[-1] if printed else ""
    return ""


def guess_end_of_turn(oracle: Oracle) -> str:
    """The token that a recipe would name as the end of a turn: the first one that the template
    prints between an answer and a question, else EOS.
    """
    for chat in conversations():
        if chat.name == "two rounds":
            for text in oracle.renderings(chat):
                answer, question = _last_end(text, chat.words_of(1)), text.find(chat.words_of(2)[0])
                if answer is not None and (between := oracle.specials(text[answer:question])):
                    return between[0]
    return str(oracle.tokenizer.eos_token)
