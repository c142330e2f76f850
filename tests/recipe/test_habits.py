"""Names of other trainers: every answer is a valid recipe, and names only keys that exist."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from runner.errors import RecipeError
from runner.recipe.habits import (
    Answer,
    complete,
    find_answer,
    fit_answer,
    is_switch,
    join_words,
    list_keys,
    list_names,
)
from runner.recipe.parse import Recipe, dump_recipe, load_recipe, parse_recipe
from runner.recipe.schema import AdapterOff
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
        " or did you mean `training.global_batch_size`?"
    ) in str(caught.value)
    with pytest.raises(RecipeError) as caught:
        load_recipe(DEMO, overrides[1:])
    assert "needs the key `enabled`: its other keys go with `enabled: true`" in str(caught.value)


PROBES = ("no", "1", "None", "-1", "4", "0.1", "auto", "a,b")


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The demo's, and the same without an adapter."""
    dumped = load_recipe(DEMO).model_copy(update={"adapter": AdapterOff(method="none")})
    plain = tmp_path_factory.mktemp("plain") / "plain.yaml"
    plain.write_text(dump_recipe(dumped))
    return [DEMO, plain]


def test_no_answer_to_any_value_is_refused_when_it_is_pasted(recipes: list[Path]) -> None:
    """Either words that a recipe takes, or a sentence."""
    for path in recipes:
        taken: set[tuple[str, ...]] = set()
        for name, values in list_names().items():
            for value in {*PROBES, *values} - {"*"}:
                answer = find_answer(name, value, Recipe)
                assert answer is not None
                if answer.overrides in taken:
                    continue
                taken.add(answer.overrides)
                if path != DEMO and not re.search(r"\b(adapter|quant)", " ".join(answer.overrides)):
                    continue
                fitted = fit_answer(answer, lambda words, path=path: load_recipe(path, words))
                assert fitted.overrides or fitted.sentence
                if fitted.overrides:
                    load_recipe(path, shlex.split(join_words(fitted.overrides)))
                elif fitted != answer:
                    assert "=" not in str(fitted.sentence).partition("refuses it")[0]


@pytest.mark.parametrize(
    ("typed", "overrides"),
    [
        ("load_in_4bit=0", "quantization.method=none"),
        ("load_in_4bit=no", "quantization.method=none"),
        ("use_lora=0", "adapter.method=none quantization.method=none"),
        ("train_on_inputs=0", "loss=completion"),
        ("completion_only_loss=no", "loss=full"),
        ("use_wandb=0", "tracking.report_to=none"),
        ("group_by_length=no", "training.train_sampling_strategy=random"),
        ("flash_attn=off", "model.attn_implementation=sdpa"),
        ("use_qlora=off", "adapter.method=none quantization.method=none"),
        ("evaluation_strategy=no", "evaluation.eval_strategy='no' evaluation.eval_steps=null"),
        ("save_strategy=False", "checkpoints.save_strategy='no' checkpoints.save_steps=null"),
        ("gradient_checkpointing=no", "training.gradient_checkpointing=false"),
        ("bf16=1", "training.bf16=true"),
        ("bf16=yes", "training.bf16=true"),
        ("report_to=tensorboard", "tracking.report_to=[tensorboard]"),
        ("report_to=None", "tracking.report_to=none"),
        ("wandb_tags=a", "tracking.tags=[a]"),
        ("modules_to_save=lm_head", "adapter.modules_to_save=[lm_head]"),
        ("lora_target=q_proj", "adapter.target_modules=[q_proj]"),
        ("lora_target=.*_proj", "adapter.target_modules=.*_proj"),
        ("lora_target=all-linear", "adapter.target_modules=all-linear"),
        ("save_total_limit=None", "checkpoints.keep_latest=null"),
        ("wandb_watch=None", "tracking.watch=none"),
        ("push_to_hub=true", "tracking.hub_push=end"),
        ("push_to_hub=0", "tracking.hub_push=never"),
    ],
)
def test_a_value_is_what_was_meant(typed: str, overrides: str) -> None:
    name, _, value = typed.partition("=")
    answer = find_answer(name, value, Recipe)
    assert answer is not None and " ".join(answer.overrides) == overrides


@pytest.mark.parametrize(
    ("typed", "known"),
    [
        ("lora_target_linear=false", "only true are known here, got 'false'"),
        ("quantization_bit=16", "only 4 and 8 are known here, got '16'"),
        ("mixed_precision=fp8", "only bf16, fp16, no and false are known here, got 'fp8'"),
        ("finetuning_type=freeze", "only lora, qlora, full and none are known"),
        ("load_in_4bit=maybe", "only true and false are known here, got 'maybe'"),
        ("save_strategy=best", "only steps, epoch, no and false are known"),
    ],
)
def test_a_value_that_nobody_knows_is_answered_with_those_that_are(typed: str, known: str) -> None:
    name, _, value = typed.partition("=")
    answer = find_answer(name, value, Recipe)
    assert answer is not None and answer.overrides == () and known in str(answer.sentence)
    with pytest.raises(RecipeError, match="are known here") as caught:
        load_recipe(DEMO, [typed])
    assert caught.value.hint is None


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        ("max_steps=-1", "`training.max_steps` here, but this recipe refuses it: got -1"),
        ("torch_dtype=auto", "refuses it: got the text 'auto', expected float32, bfloat16"),
        ("eval_steps=0.1", "`evaluation.eval_steps` here, but this recipe refuses it: got 0.1"),
        ("nnodes=2", "`launch.num_machines` here, but this recipe refuses it: `num_processes: 1`"),
        ("wandb_watch=true", "`tracking.watch` here, but this recipe refuses it: got true"),
        ("save_total_limit=None", "refuses it: got nothing (null)"),
        ("push_to_hub=true", "refuses it: `hub_push: end` needs a repository"),
    ],
)
def test_words_that_a_recipe_refuses_are_not_offered(typed: str, sentence: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(DEMO, [typed])
    assert caught.value.hint is None and sentence in str(caught.value)
    assert "here it is" not in str(caught.value)


def test_two_names_that_need_each_other_are_offered_together() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(DEMO, ["push_to_hub=true", "hub_model_id=me/mine"])
    assert caught.value.hint == "tracking.hub_push=end tracking.hub_model_id=me/mine"


@pytest.mark.parametrize(
    "typed",
    [
        *("load_in_4bit=true", "load_in_8bit=1", "quantization=4bit", "lora_r=4", "lora_rank=4"),
        *("lora_alpha=8", "lora_target=all", "use_dora=true", "adapter.r=4", "use_lora=yes"),
    ],
)
def test_a_recipe_without_an_adapter_is_told_all_that_it_needs(
    typed: str, recipes: list[Path]
) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipes[1], [typed])
    words = shlex.split(str(caught.value.hint))
    assert "adapter.method=lora" in words
    assert load_recipe(recipes[1], words).adapter.method == "lora"
    if typed != "adapter.r=4":
        with pytest.raises(RecipeError) as caught:
            load_recipe(DEMO, [typed])
        others = {"adapter.r=16", "adapter.lora_dropout=0.05"}
        assert not others & set(str(caught.value.hint).split()), "the recipe has its own"


def test_an_override_alone_gets_no_hint_about_the_file(tmp_path: Path) -> None:
    for typed, hint in (
        ("eval_strategy=no", "\"evaluation.eval_strategy='no'\" evaluation.eval_steps=null"),
        ("nonsense=no", None),
    ):
        with pytest.raises(RecipeError) as caught:
            parse_recipe(DEMO.read_text(), where="a", overrides=[typed], hint="fix the template")
        assert caught.value.hint == hint
    with pytest.raises(RecipeError) as caught:
        parse_recipe(DEMO.read_text(), where="a", overrides=["eval_strategy=no"])
    assert "unknown key, here it is `evaluation.eval_strategy='no'" in str(caught.value)
    with pytest.raises(RecipeError) as caught:
        load_recipe(DEMO, ["lr=1e-4"])
    assert "here it is `training.learning_rate=1e-4`" in str(caught.value)
