"""The committed table of Hugging Face fields is what the installed libraries have, and each field
has one owner.
"""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, create_model

from runner.recipe.hf_fields import (
    OWNED_LORA_FIELDS,
    OWNED_TRAINING_FIELDS,
    build_field_definitions,
    load_table,
)
from runner.recipe.schema import Lora, LoraBase, Training, TrainingBase


def test_the_table_is_up_to_date() -> None:
    from runner.recipe.make_hf_fields import TABLE_PATH, build_table

    assert TABLE_PATH.read_text() == build_table(), "run `python -m runner.recipe.make_hf_fields`"


@pytest.mark.parametrize("config", ["SFTConfig", "LoraConfig"])
def test_each_field_is_stated_in_a_recipe_or_owned_by_the_runner(config: Any) -> None:
    model: type[BaseModel] = Training if config == "SFTConfig" else Lora
    own = (TrainingBase if config == "SFTConfig" else LoraBase).model_fields
    owned = OWNED_TRAINING_FIELDS if config == "SFTConfig" else OWNED_LORA_FIELDS
    for name in load_table(config):
        assert (name in model.model_fields) != (name in owned), name
    assert set(model.model_fields) - set(own) == set(load_table(config)) - set(owned) - set(own)


def test_every_owned_field_exists_and_says_where_the_choice_is_made() -> None:
    """Fields without a JSON value are not in the table; the others must be known to the library."""
    from peft import LoraConfig
    from trl import SFTConfig

    for config, owned in ((SFTConfig, OWNED_TRAINING_FIELDS), (LoraConfig, OWNED_LORA_FIELDS)):
        known = set(config.__dataclass_fields__)
        assert set(owned) <= known, sorted(set(owned) - known)
        assert all(owned.values())


def test_the_fields_that_are_computed_with_are_fields_of_the_library_or_ours() -> None:
    ours = {"global_batch_size"}
    assert set(TrainingBase.model_fields) - set(load_table("SFTConfig")) == ours
    assert set(LoraBase.model_fields) - set(load_table("LoraConfig")) == {"method"}


def test_definitions_have_the_types_of_the_table() -> None:
    definitions = build_field_definitions(
        "SFTConfig", OWNED_TRAINING_FIELDS, exclude=frozenset({"seed"})
    )
    assert "seed" not in definitions and "output_dir" not in definitions
    model = create_model("Some", **definitions)
    assert model.model_validate({"learning_rate": 1e-5, "lr_scheduler_kwargs": {"a": [1]}})
    with pytest.raises(ValueError):
        model.model_validate({"lr_scheduler_type": "sideways"})
