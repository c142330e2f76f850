"""The oracle of masks: it finds nothing wrong under TRL's templates, and sees what a broken masker
does.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.mask_oracle import ROOT, TemplateResult, build_masker, judge_template, report_lines
from benchmarks.mask_oracle_chats import Setting
from benchmarks.mask_oracle_judge import REFUSED, RIGHT, WRONG, Verdict
from runner.data.masking import CompletionSpan, MaskedConversation
from tests.support.chat_formats import CHATML, LLAMA_2, MISTRAL, trl_template

# One of each kind: plain, with tools, with thoughts that history loses, with ends of two kinds.
TEMPLATES = ["cohere2", "gemma", "gptoss", "llama3_1", "phi3", "qwen2_5", "qwen3", "smolvlm"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_nothing_is_wrong_under_trls_templates(name: str) -> None:
    verdicts = judge_template(trl_template(name))
    assert {chat: each for chat, each in verdicts.items() if each.verdict == WRONG} == {}
    assert verdicts["single"].verdict == RIGHT


@pytest.mark.parametrize("template", [CHATML, MISTRAL, LLAMA_2])
def test_nothing_is_wrong_under_plain_templates(template: str) -> None:
    verdicts = judge_template(template)
    assert {chat: each for chat, each in verdicts.items() if each.verdict == WRONG} == {}
    assert verdicts["two rounds"].verdict == RIGHT
    assert verdicts["call"].verdict == REFUSED
    assert "leaves out" in verdicts["call"].why


def test_what_the_masker_refuses_without_need_is_counted() -> None:
    class Refusing:
        def mask(self, *args: Any, **kwargs: Any) -> MaskedConversation:
            from runner.errors import DataError

            raise DataError("no")

    verdicts = judge_template(trl_template("qwen3"), build=lambda *_: Refusing())
    assert verdicts["single"] == Verdict(REFUSED, "avoidable: no", "no", is_avoidable=True)
    assert not verdicts["reasoning, two rounds"].is_avoidable


# --- a masker that is broken in one way each


def move(masked: MaskedConversation, start: int, end: int) -> MaskedConversation:
    """Every completion starts and ends this many tokens later."""
    moved = [
        replace(each, span=CompletionSpan(each.span.start + start, each.span.end + end))
        for each in masked.completions
    ]
    return replace(masked, completions=tuple(moved))


def train_only_ends(masked: MaskedConversation) -> MaskedConversation:
    ends = [
        replace(each, span=CompletionSpan(each.span.end - 1, each.span.end))
        for each in masked.completions
    ]
    return replace(masked, completions=tuple(ends))


def train_all(masked: MaskedConversation) -> MaskedConversation:
    whole = CompletionSpan(0, masked.completions[-1].span.end)
    return replace(
        masked,
        completions=(*masked.completions[:-1], replace(masked.completions[-1], span=whole)),
    )


def change_id(masked: MaskedConversation) -> MaskedConversation:
    return replace(masked, input_ids=(masked.input_ids[0] + 1, *masked.input_ids[1:]))


def lose_a_turn(masked: MaskedConversation) -> MaskedConversation:
    return replace(masked, completions=masked.completions[:-1])


def keep_silent(masked: MaskedConversation) -> MaskedConversation:
    """Turns that are printed otherwise than they were written are not marked."""
    silent = tuple(replace(each, rewritten=None) for each in masked.completions)
    return replace(masked, completions=silent)


BREAKS: dict[str, tuple[Callable[[MaskedConversation], MaskedConversation], str, str]] = {
    "header": (lambda masked: move(masked, -1, 0), "two rounds", "trains the header of a turn"),
    "no beginning": (
        lambda masked: move(masked, 5, 0),  # the empty think block of Qwen3's last answer
        "single",
        "does not train all that generation writes before the answer",
    ),
    "no end": (lambda masked: move(masked, 0, -1), "two rounds", "ends at"),
    "too long": (lambda masked: move(masked, 0, 1), "single", "ends at '\\n'"),
    "only ends": (train_only_ends, "single", "does not train the assistant's answer"),
    "all": (train_all, "two rounds", "trains user"),
    "other tokens": (change_id, "single", "input_ids are not the template's"),
    "a turn less": (lose_a_turn, "two rounds", "completions are not the wanted turns"),
    "not marked": (keep_silent, "two rounds", "is not marked"),
    "call without its header": (
        lambda masked: move(masked, 20, 0),
        "call",
        "does not train a call's name or key",
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_masker_is_seen(name: str) -> None:
    damage, chat, why = BREAKS[name]

    class Broken:
        def __init__(self, tokenizer: Any, setting: Setting) -> None:
            self._masker = build_masker(tokenizer, setting)

        def mask(self, *args: Any, **kwargs: Any) -> MaskedConversation:
            return damage(self._masker.mask(*args, **kwargs))

    verdict = judge_template(trl_template("qwen3"), build=Broken)[chat]
    assert verdict.verdict == WRONG
    assert why in verdict.why


def test_a_masker_that_trains_another_turn_is_seen() -> None:
    class Deaf:
        def __init__(self, tokenizer: Any, setting: Setting) -> None:
            self._masker = build_masker(tokenizer, setting)

        def mask(self, messages: Any, tools: Any, *, turns: Any) -> MaskedConversation:
            masked = self._masker.mask(messages, tools)
            first = masked.completions[0]
            span = CompletionSpan(first.span.start, masked.completions[-1].span.end)
            return replace(
                masked, completions=tuple(replace(e, span=span) for e in masked.completions)
            )

    verdict = judge_template(CHATML, build=Deaf)["two rounds, trained 3"]
    assert (verdict.verdict, "untrained turn's answer" in verdict.why) == (WRONG, True)


def test_a_crash_of_the_masker_is_wrong() -> None:
    class Crashing:
        def mask(self, *args: Any, **kwargs: Any) -> MaskedConversation:
            raise KeyError("content")

    verdict = judge_template(CHATML, build=lambda *_: Crashing())["single"]
    assert (verdict.verdict, verdict.detail) == (WRONG, "KeyError: 'content'")


def test_what_a_template_leaves_out_may_not_be_accepted() -> None:
    """A masker that renders without the calls which the template does not print."""

    class Dropping:
        def __init__(self, tokenizer: Any, setting: Setting) -> None:
            self._masker = build_masker(tokenizer, setting)

        def mask(self, messages: Any, tools: Any, *, turns: Any) -> MaskedConversation:
            kept = [{key: each[key] for key in ("role", "content")} for each in messages]
            return self._masker.mask(kept, turns=turns)

    verdict = judge_template(CHATML, build=Dropping)["text and call"]
    assert verdict.verdict == WRONG
    assert "leaves out" in verdict.why and "the assistant's argument" in verdict.why


# --- the program


def test_the_program_judges_a_folder_and_outlives_bad_templates(tmp_path: Path) -> None:
    (tmp_path / "chatml__plain.jinja").write_text(CHATML)
    (tmp_path / "bad__hangs.jinja").write_text(
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    )
    (tmp_path / "bad__broken.jinja").write_text("{% for")
    (tmp_path / "index.tsv").write_text("file\tbos\teos\nchatml__plain.jinja\t<s>\t<|im_end|>\n")
    run = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "mask_oracle.py", tmp_path, "--time-limit", "4"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert "bad__hangs: took more than 4 seconds" in run.stdout
    assert [line.split()[:2] for line in run.stdout.splitlines()[1:4]] == [
        ["bad", "2"],
        ["chatml", "1"],
        ["all", "3"],
    ]


def test_the_report_shows_each_kind_of_wrong_once_a_template() -> None:
    wrong = Verdict(WRONG, "trains user", "'text'")
    lines = list(report_lines([TemplateResult("a__b", {"single": wrong, "two rounds": wrong})]))
    assert lines[1].split() == ["a", "1", "0", "0", "0", "2"]
    shown = [line for line in lines if line.startswith("\nwrong:")]
    assert shown == ["\nwrong: a__b, single: trains user\n  'text'"]
