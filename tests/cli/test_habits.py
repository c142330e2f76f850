"""Options of other trainers on our command line: exit code 2, and the equivalent to paste."""

from __future__ import annotations

import shlex

import pytest

from runner.cli.main import main, parse_arguments
from tests.support.fake_launcher import FakeLauncher, fake

__all__ = ["fake"]

A = "recipes/toy/a.yaml"


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (f"launch {A} --learning_rate 1e-4", f"launch {A} training.learning_rate=1e-4"),
        (f"launch --learning_rate=1e-4 {A}", f"launch {A} training.learning_rate=1e-4"),
        (f"launch --learning-rate 1e-4 {A}", f"launch {A} training.learning_rate=1e-4"),
        (f"sweep --lr 1e-4 --where size=1 {A}", f"sweep --where size=1 {A} training.learning_ra"),
        (f"rerun --bf16 {A}", f"rerun {A} training.bf16=true"),
        (f"check --bf16 False {A}", f"check {A} training.bf16=false"),
        (f"masks {A} --max_seq_length 32 --rows 1", f"masks {A} --rows 1 data.max_length=32"),
        (f"why {A} --seed 7", f"why {A} training.seed=7"),
        (f"launch {A} --training.learning_rate 2", f"launch {A} training.learning_rate=2"),
        (f"launch {A} --load_in_8bit=true", f"launch {A} quantization.method=8bit"),
        (f"launch {A} --load_in_4bit=true", f"launch {A} quantization.method=4bit quantization."),
        (f"launch {A} --output_dir out --packing", f"launch {A}\n"),
        (f"launch {A} --report_to none --dry_run", f"launch {A} --dry-run tracking.report_to=none"),
    ],
)
def test_options_of_others_are_answered_with_the_command(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str], words: str, hint: str
) -> None:
    fake.add("a")
    before = fake.tree()
    assert main(shlex.split(words)) == 2
    said = capsys.readouterr().err
    assert f"\n\nhint: runner {hint}" in said
    is_one = said.count("\n  --") == 1
    assert ("is not an option of `runner" if is_one else "are not options of `runner") in said
    pasted = said.partition("hint: runner ")[2].strip()
    parse_arguments(shlex.split(pasted))
    assert fake.tree() == before and fake.events() == []


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("sweep --slot 2 toy", "runner sweep --slots 2 toy"),
        (f"launch {A} --dry", f"runner launch {A} --dry-run"),
        (f"launch {A} --num-proc=1", f"runner launch {A} --num-processes=1"),
        ("rerun toy --engin slurm", "runner rerun toy --engine slurm"),
        ("init new '--promt={a} {b}'", "runner init new '--prompt={a} {b}'"),
        ("status --jsno", "runner status --json"),
        ("clean --dry_run", "runner clean --dry-run"),
        ("--debg status", "runner --debug status"),
        ("recipe --nonsense 3", "`runner recipe --help` lists the options"),
        (f"launch {A} --nonsense 3", "`runner launch --help` lists the options"),
        ("--nonsense status", "`runner --help` lists the options"),
    ],
)
def test_only_whole_options_are_accepted(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str], words: str, hint: str
) -> None:
    """`--slot 2` meant `--slots 2`, so a typo started a sweep."""
    fake.add("a")
    before = fake.tree()
    assert main(shlex.split(words)) == 2
    said = capsys.readouterr().err
    assert "is not an option of `runner" in said and said.endswith(f"\n\nhint: {hint}\n")
    assert fake.tree() == before and fake.events() == []


def test_an_override_of_others_is_answered_once_for_many_recipes(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("a", "b", "c")
    assert main(["sweep", "toy", "lr=1e-4"]) == 2
    said = capsys.readouterr().err
    assert said.count("unknown key, here it is `training.learning_rate") == 1
    assert "the same in 2 more, such as recipes/toy/b.yaml" in said
    assert said.endswith("hint: training.learning_rate=1e-4\n")
