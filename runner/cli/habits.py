"""Answers options of other trainers on our command line with the equivalent overrides."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path

from runner.errors import RecipeError, RunnerError
from runner.plan.names import find_named
from runner.plan.select import expand_folder
from runner.plan.variants import is_override
from runner.recipe.habits import (
    Answer,
    Load,
    complete,
    complete_blindly,
    find_answer,
    fit_answer,
    is_switch,
    join_words,
    takes_many,
)
from runner.recipe.parse import Recipe, load_recipe

_BOOLEANS = ("true", "false", "yes", "no", "0", "1")


def refuse_foreign_options(prog: str, words: Sequence[str], known: Collection[str]) -> None:
    """Refuse options of other trainers; `known` are the options of this verb.

    Raises:
        RunnerError: a word is such an option; the hint has the whole command as written here.
    """
    answers: list[tuple[str, str | Answer]] = []
    kept: list[str] = []
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        option, equals, value = word.partition("=")
        if word == "--" or not word.startswith("--") or option in known:
            kept.append(word)
            continue
        hyphenated = option.replace("_", "-")
        if hyphenated in known:
            answers.append((option, f"is {hyphenated} here"))
            kept.append(hyphenated + equals + value)
            continue
        name = option.removeprefix("--")
        given = [value] if equals else _take_values(words[position:], name)
        position += 0 if equals else len(given)
        if not given and is_switch(name, Recipe):
            given = ["true"]
        answer = find_answer(name, ",".join(given) if given else None, Recipe)
        if answer is None:  # the parser refuses it
            kept.append(word)
            kept += [] if equals else given
            continue
        answers.append((option, answer))
    if answers:
        raise _answer(prog, answers, kept)


def _answer(
    prog: str, answers: Sequence[tuple[str, str | Answer]], kept: Sequence[str]
) -> RunnerError:
    load = _find_recipe(kept)
    overrides = [word for _, said in answers if isinstance(said, Answer) for word in said.overrides]
    refused = any(isinstance(said, Answer) and said.is_refused for _, said in answers)
    try:
        overrides = list(complete(overrides, load) if load else complete_blindly(overrides))
    except RecipeError:  # perhaps only one of them is wrong
        assert load is not None
        answers = [
            (one, fit_answer(said, load) if isinstance(said, Answer) else said)
            for one, said in answers
        ]
        refused = True
    what = "is not an option" if len(answers) == 1 else "are not options"
    names = ", ".join(f"`{option}`" for option, _ in answers)
    lines = "\n".join(f"  {option}  {_describe(said)}" for option, said in answers)
    # Overrides come last: `launch` expects its recipe first.
    hint = f"{prog} {join_words([*kept, *overrides])}"
    return RunnerError(f"{names} {what} of `{prog}`\n\n{lines}", hint=None if refused else hint)


def _find_recipe(words: Sequence[str]) -> Load | None:
    """A function that loads the first named recipe with the typed and more overrides; None if no
    named recipe can be read.
    """
    pairs = zip(("", *words), words, strict=False)
    typed = [word for before, word in pairs if before != "--where" and is_override(word)]
    for word in words:
        if word.startswith("-") or word in typed:
            continue
        try:
            path = next(
                file
                for one in find_named(word, Path("runs"))
                for file in expand_folder(one)
                if file.suffix == ".yaml"
            )
            load_recipe(path, typed)
        except (RunnerError, OSError, StopIteration):
            continue
        return lambda overrides: load_recipe(path, [*typed, *overrides])
    return None


def _take_values(words: Sequence[str], name: str) -> list[str]:
    """The words after `--name` that are its values, not recipes."""
    taken: list[str] = []
    for word in words:
        if not _is_value(word, name) or (taken and _names_recipes(word)):
            break
        taken.append(word)
        if not takes_many(name, Recipe):
            break
    return taken


def _names_recipes(word: str) -> bool:
    try:
        return bool(find_named(word, Path("runs")))
    except RunnerError:
        return False


def _is_value(word: str, name: str) -> bool:
    """True if a word after `--name` is its value, not a recipe."""
    if is_switch(name, Recipe):
        return word.lower() in _BOOLEANS
    is_number = word[:1] == "-" and word[1:2].isdigit()
    return (is_number or not word.startswith("-")) and not (is_override(word) or _is_path(word))


def _is_path(word: str) -> bool:
    return os.path.exists(word) or word.endswith(".yaml")


def _describe(said: str | Answer) -> str:
    if isinstance(said, str):
        return said
    if not said.overrides:
        return str(said.sentence)
    note = f" ({said.sentence})" if said.sentence else ""
    return f"is {' '.join(said.overrides)} here{note}"
