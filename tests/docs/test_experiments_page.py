"""`docs/experiments.md`: it maps every key of the earlier projects, and every key that it maps to
exists.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from runner.cli.arguments import build_parser
from runner.recipe.parse import Recipe
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "experiments.md").read_text()
# The parameter table of the Gemma 1.1 project, key by key.
OLD_KEYS = re.findall(
    r"\w+",
    """
    dataset_id model_name max_length dtype learning_rate batch_size gradient_checkpointing
    num_epochs optim log_level use_wandb wandb_project wandb_run_name wandb_tags wandb_watch_mode
    wandb_log_freq model_to_wandb steps_freq epoch_freq val_steps_freq resume_from_checkpoint
    resume_option checkpoint_path checkpoint_metric checkpoint_metric_mode keep_last_n keep_best_n
    save_strategy project_dir save_optim storage_backend sync_to_storage load_from_storage
    remote_path seed deterministic lora_r lora_alpha lora_target_modules lora_task_type framework
    use_tt
    """,
)


def find_models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections that a field may hold, through unions and `Annotated`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from find_models(part)


def list_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key that a recipe may have."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        for section in find_models(field.annotation):
            yield from list_keys(section, f"{prefix}{name}.")


RECIPE_KEYS = set(list_keys(Recipe))


def list_rows(heading: str) -> list[list[str]]:
    """The cells of every table row below a heading."""
    [section] = [part for part in PAGE.split("\n## ") if part.startswith(heading)]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    return [row for row in rows if row[0] != "theirs" and not row[0].startswith("---")]


def list_named_keys(text: str) -> list[str]:
    """Texts in backticks that begin like a recipe key."""
    sections = "|".join(Recipe.model_fields)
    quoted = re.findall(r"`([^`]+)`", text)
    return [
        match[0] for one in quoted if (match := re.match(rf"(?:{sections})(\.\w+)*(?=$|[:=])", one))
    ]


def test_the_parameter_table_is_mapped_whole() -> None:
    rows = list_rows("`glue_squad`")
    assert [row[0] for row in rows] == [f"`{key}`" for key in OLD_KEYS]
    assert all(len(row) == 3 and row[2] for row in rows)
    unmapped = [row[0] for row in rows if not list_named_keys(row[2]) and "--" not in row[2]]
    assert unmapped == ["`lora_task_type`", "`framework`"]


@pytest.mark.parametrize(
    "heading", ["`secret_word`", "`math_tools`", "`oasst_phi2`", "`glue_squad`", "`summaries`"]
)
def test_every_key_and_flag_that_is_mapped_to_exists(heading: str) -> None:
    ours = " ".join(row[-1] for row in list_rows(heading))
    named = list_named_keys(ours)
    assert len(named) >= 8 and set(named) <= RECIPE_KEYS, set(named) - RECIPE_KEYS
    for flag in re.findall(r"`(--[a-z-]+)", ours):
        assert flag in help_of(build_parser()), flag


def test_every_verb_and_script_on_the_page_exists() -> None:
    [verbs] = [
        action.choices for action in build_parser()._actions if isinstance(action.choices, dict)
    ]
    assert set(re.findall(r"\brunner ([a-z]+)", PAGE)) <= set(verbs)
    assert all(
        (ROOT / path).exists()
        for path in re.findall(
            r"\b(?:sweeps|recipes|data|docs)/[\w./-]*\w", PAGE.replace("data/summaries/", "")
        )
    )


def help_of(parser: Any) -> str:
    """The help of every verb."""
    verbs = [action.choices for action in parser._actions if isinstance(action.choices, dict)]
    return " ".join(verb.format_help() for choices in verbs for verb in choices.values())


def test_a_misspelt_key_would_be_found() -> None:
    assert list_named_keys("`checkpoints.keep_bests: 3`, `--resume`, `loss: completion`") == [
        "checkpoints.keep_bests",
        "loss",
    ]
    assert "checkpoints.keep_bests" not in RECIPE_KEYS and "checkpoints.remote.url" in RECIPE_KEYS
