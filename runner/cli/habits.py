"""Options of other trainers on our command line, answered with the overrides that say the same."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Sequence
from pathlib import Path

from runner.errors import RunnerError
from runner.plan.variants import is_override
from runner.recipe.habits import Answer, find_answer, is_switch
from runner.recipe.parse import Recipe

_BOOLEANS = ("true", "false", "yes", "no", "0", "1")


def refuse_foreign_options(prog: str, words: Sequence[str], known: Collection[str]) -> None:
    """Nothing, where no word is an option of another trainer; `known` are the options of this verb.

    Raises:
        RunnerError: with the whole command as it is written here.
    """
    told: list[tuple[str, str]] = []
    kept: list[str] = []
    overrides: list[str] = []
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        option, equals, value = word.partition("=")
        if word == "--" or not word.startswith("--") or _is_known(option, known):
            kept.append(word)
            continue
        hyphenated = option.replace("_", "-")
        if hyphenated in known:
            told.append((option, f"is {hyphenated} here"))
            kept.append(hyphenated + equals + value)
            continue
        name = option.removeprefix("--")
        given: str | None = value if equals else None
        if given is None and position < len(words) and _is_value(words[position], name):
            given = words[position]
            position += 1
        if given is None and is_switch(name, Recipe):
            given = "true"
        answer = find_answer(name, given, Recipe)
        if answer is None:
            kept.append(word)
            continue
        told.append((option, _describe(answer)))
        overrides += answer.overrides
    if told:
        what = "is no option" if len(told) == 1 else "are no options"
        names = ", ".join(f"`{option}`" for option, _ in told)
        lines = "\n".join(f"  {option}  {said}" for option, said in told)
        # Last: `launch` takes its recipe first.
        raise RunnerError(
            f"{names} {what} of `{prog}`\n\n{lines}",
            hint=f"{prog} " + shlex.join([*kept, *overrides]),
        )


def _is_known(option: str, known: Collection[str]) -> bool:
    """True also for what argparse takes as the beginning of an option."""
    return option in known or any(one.startswith(option) for one in known)


def _is_value(word: str, name: str) -> bool:
    """True for a word after `--name` that is its value, and no recipe."""
    if is_switch(name, Recipe):
        return word.lower() in _BOOLEANS
    is_number = word[:1] == "-" and word[1:2].isdigit()
    return (is_number or not word.startswith("-")) and not (is_override(word) or _is_path(word))


def _is_path(word: str) -> bool:
    return Path(word).exists() or word.endswith(".yaml")


def _describe(answer: Answer) -> str:
    if not answer.overrides:
        return str(answer.sentence)
    note = f" ({answer.sentence})" if answer.sentence else ""
    return f"is {' '.join(answer.overrides)} here{note}"
