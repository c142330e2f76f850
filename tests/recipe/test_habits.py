"""Names of other trainers: every answer is a recipe, and names keys that there are."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from runner.errors import RecipeError
from runner.recipe.habits import (
    Answer,
    complete,
    find_answer,
    is_switch,
    list_keys,
    list_names,
    suggest_overrides,
)
from runner.recipe.parse import Recipe, load_recipe, parse_recipe
from tests.conftest import ROOT

DEMO = ROOT / "recipes" / "demo" / "gemma_060_full_seed1.yaml"
# A value of each key that takes any, by the end of its name.
VALUES = {
    "path": "here/there",
    "revision": "v1",
    "dtype": "bfloat16",
    "attn_implementation": "sdpa",
    "modules_to_save": "[lm_head]",
    "target_modules": "q_proj,v_proj",
    "config_name": "main",
    "split": "test",
    "learning_rate": "1e-4",
    "lr_scheduler_type": "linear",
    "optim": "adafactor",
    "weight_decay": "0.1",
    "warmup_steps": "0.03",
    "max_grad_norm": "0.3",
    "gradient_checkpointing": "True",
    "label_smoothing_factor": "0.1",
    "neftune_noise_alpha": "5.0",
    "full_determinism": "true",
    "save_optimizer": "false",
    "url": "file:///tmp/there",
    "accelerate_config": "accelerate_configs/zero3.yaml",
    "num_processes": "1",
    "report_to": "wandb",
    "project": "study",
    "run_name": "mine",
    "tags": "a,b",
    "watch": "all",
    "hub_model_id": "owner/name",
    "hub_private": "false",
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "metric": "nll_per_token",
    "lora_alpha": "64",
    "global_batch_size": "16",
    "num_machines": "1",
}


def list_answers() -> Iterator[tuple[str, str, Answer]]:
    for name, values in list_names().items():
        for value in values or ("x",):
            probe = find_answer(name, "x", Recipe)
            assert probe is not None
            if value == "*":
                key = (
                    probe.overrides[-1] if "null" not in probe.overrides[-1] else probe.overrides[0]
                )
                value = VALUES.get(key.partition("=")[0].rpartition(".")[2], "4")
            answer = find_answer(name, value, Recipe)
            assert answer is not None
            yield name, value, answer


ANSWERS = list(list_answers())


@pytest.mark.parametrize(
    ("name", "value", "answer"),
    [one for one in ANSWERS if one[2].overrides],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_what_is_answered_is_a_recipe(name: str, value: str, answer: Answer) -> None:
    if name != "push_to_hub":  # that needs a repository too
        complete(answer.overrides, lambda words: load_recipe(DEMO, words))


def test_what_is_said_in_words_names_keys_that_there_are() -> None:
    known = {key for keys in list_keys(Recipe).values() for key in keys}
    sentences = [answer.sentence for _, _, answer in ANSWERS if answer.sentence]
    sections = "|".join(Recipe.model_fields)
    named = {
        key
        for sentence in sentences
        for key in re.findall(rf"`((?:{sections})\.[a-z_.]+)", sentence)
    }
    assert len(sentences) > 20 and len(named) > 6
    assert named - {"data.task"} <= known


def test_values_are_those_that_were_meant() -> None:
    def load(*words: str) -> Recipe:
        overrides = []
        for word in words:
            name, _, value = word.partition("=")
            answer = find_answer(name, value, Recipe)
            assert answer is not None
            overrides += answer.overrides
        return load_recipe(DEMO, complete(overrides, lambda words: load_recipe(DEMO, words)))

    recipe = load("lr=1e-4", "max_seq_length=512", "lora_rank=4", "epochs=3", "warmup_ratio=0.03")
    assert recipe.training.learning_rate == 1e-4 and recipe.data.max_length == 512
    assert recipe.adapter.r == 4 and recipe.training.warmup_steps == 0.03
    assert (recipe.training.num_train_epochs, recipe.training.max_steps) == (3, None)
    assert load("load_in_4bit=True").quantization.method == "4bit"
    assert load("train_on_inputs=false").loss == "completion"
    assert load("adapter=qlora").quantization.method == "4bit"
    assert load("lora_target_modules=q_proj,v_proj").adapter.target_modules == ("q_proj", "v_proj")
    assert load("lora_target=all").adapter.target_modules == "all-linear"
    assert load("report_to=none").tracking.report_to == ()
    assert load("eval_steps=50").evaluation.eval_steps == 50
    assert load("batch_size=16").global_batch_size == 16
    assert load("micro_batch_size=2").training.per_device_train_batch_size == 2


def test_keys_of_the_schema_need_no_entry() -> None:
    assert find_answer("learning_rate", "1", Recipe) == Answer(("training.learning_rate=1",))
    assert find_answer("use-dora", "true", Recipe) == Answer(("adapter.use_dora=true",))
    assert find_answer("data.seed", "1", Recipe) == Answer(("data.seed=1",))
    assert find_answer("method", "lora", Recipe) is None, "two keys end so"
    assert find_answer("nonsense", "1", Recipe) is None
    assert is_switch("bf16", Recipe) and is_switch("load_in_4bit", Recipe)
    assert not is_switch("lr", Recipe) and not is_switch("output_dir", Recipe)


@pytest.mark.parametrize(
    ("line", "key", "words"),
    [
        ("lr: 1e-4", "lr", "unknown key, here it is `training.learning_rate: 0.0001`"),
        ("learning_rate: 1e-4", "learning_rate", "here it is `training.learning_rate: 0.0001`"),
        ("load_in_4bit: true", "load_in_4bit", "here it is `quantization.method: 4bit`, `quant"),
        ("sequence_len: 2048", "sequence_len", "here it is `data.max_length: 2048`"),
        ("val_set_size: 0.05", "val_set_size", "unknown key: `data.num_validation_samples` and"),
        ("datasets: [{path: a}]", "datasets", "here it is `data.train.path: VALUE`"),
        ("lora_r: 8", "lora_r", "here it is `adapter.r: 8`"),
    ],
)
def test_a_key_of_others_in_a_recipe_is_told(line: str, key: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(f"{line}\n{DEMO.read_text()}", where="a.yaml")
    [problem] = caught.value.problems
    assert (problem.key, problem.line) == (key, 1) and words in problem.what


def test_a_key_of_others_in_another_section_is_told() -> None:
    text = DEMO.read_text().replace("  seed: 1550566388", "  batch_size: 4\n  seed: 1550566388")
    with pytest.raises(
        RecipeError, match=r"training\.batch_size  unknown key, here it is"
    ) as caught:
        parse_recipe(text, where="a.yaml")
    assert "`training.global_batch_size: 4`" in str(caught.value)
    assert "`training.per_device_train_batch_size`" in str(caught.value)


def test_overrides_are_answered_with_overrides() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(DEMO, ["loss=completion", "lr=1e-4", "model=google/gemma-2b"])
    assert caught.value.hint == (
        "loss=completion training.learning_rate=1e-4 model.path=google/gemma-2b"
    )
    load_recipe(DEMO, caught.value.hint.split())
    with pytest.raises(RecipeError, match="rows are never packed") as caught:
        load_recipe(DEMO, ["packing=true"])
    assert caught.value.hint is None
    with pytest.raises(RecipeError) as caught:
        load_recipe(DEMO, ["data.max_length=many"])
    assert caught.value.hint is None, "the key is ours"


def test_a_batch_of_answers_without_answers_says_what_it_goes_with() -> None:
    overrides = ["evaluation.generation.enabled=false", "evaluation.generation.batch_size=4"]
    with pytest.raises(RecipeError) as caught:
        load_recipe(DEMO, overrides)
    assert (
        "does not go with `enabled: false`, only with `enabled: true`;"
        " or is it `training.global_batch_size`?"
    ) in str(caught.value)
    with pytest.raises(RecipeError) as caught:
        load_recipe(DEMO, overrides[1:])
    assert "needs the key `enabled`: its other keys go with `enabled: true`" in str(caught.value)
