"""A recipe is parsed once: every mistake is named with its place, and what comes out can be trusted
and not changed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from runner.errors import Problem, RecipeError, RefusedError
from runner.recipe.parse import Recipe, derive_accumulation, dump_recipe, load_recipe, parse_recipe
from runner.recipe.values import MAX_RECIPE_BYTES

TEXT = """\
run: {grid: toy, name: base, axes: {size: 1, nested: {list: [1, {deep: 2}]}}}
model: {path: models/toy, dtype: float32}
adapter:
  method: lora
  r: 4
  lora_alpha: 8
  lora_dropout: 0.0
  target_modules: [q_proj, v_proj]
quantization: {method: none}
data:
  train: {path: data.jsonl}
  task:
    name: summarization
    prompt: "Sum up: {document}"
  num_validation_samples: 1
  num_test_samples: 1
  seed: 3
  max_length: 64
loss: full
training:
  seed: 1
  global_batch_size: 24
  per_device_train_batch_size: 2
  max_steps: 2
  learning_rate: 1e-5
  lr_scheduler_kwargs: {num_cycles: 2, inner: {a: [1]}}
  gradient_checkpointing: false
evaluation: {eval_strategy: "no", per_device_eval_batch_size: 1}
early_stopping: {enabled: false}
checkpoints: {save_strategy: "no"}
launch: {accelerate_config: cpu.yaml, num_processes: 3}
"""


def parse(*overrides: str, text: str = TEXT) -> Recipe:
    return parse_recipe(text, where="r.yaml", overrides=overrides)


def problems_of(*overrides: str, text: str = TEXT) -> list[Problem]:
    with pytest.raises(RecipeError) as caught:
        parse(*overrides, text=text)
    return list(caught.value.problems)


def edit(old: str, new: str) -> str:
    assert TEXT.count(old) == 1
    return TEXT.replace(old, new)


REFUSALS = {
    # a replacement in the text; the error: line, key, words
    ("loss: full", "loss: ful"): (
        19,
        "loss",
        "got the text 'ful', expected full, completion or last_completion, did you mean `full`?",
    ),
    ("loss: full", "lost: full"): (19, "lost", "unknown key, did you mean `loss`?"),
    ("learning_rate: 1e-5", "learning_rate: fast"): (
        25,
        "training.learning_rate",
        "got the text 'fast', expected a number",
    ),
    ("learning_rate: 1e-5", 'learning_rate: "1e-5"'): (
        25,
        "training.learning_rate",
        "got the text '1e-5', expected a number",
    ),
    ("learning_rate: 1e-5", "learning_rat: 1e-5"): (
        25,
        "training.learning_rat",
        "unknown key, did you mean `learning_rate`?",
    ),
    ("learning_rate: 1e-5", "output_dir: here"): (
        25,
        "training.output_dir",
        "cannot be set here: it is decided by the run directory",
    ),
    ("learning_rate: 1e-5", "max_length: 5"): (
        25,
        "training.max_length",
        "cannot be set here: it is decided by `data.max_length` and `data.truncation`",
    ),
    ("learning_rate: 1e-5", "warmup_ratio: 0.1"): (
        25,
        "training.warmup_ratio",
        "unknown key, here it is `training.warmup_steps: 0.1` (a number below 1 is a fraction of",
    ),
    ("learning_rate: 1e-5", "learning_rate: .nan"): (
        25,
        "training.learning_rate",
        "got nan, expected a finite number",
    ),
    ("{num_cycles: 2", "{num_cycles: .inf"): (
        26,
        "training.lr_scheduler_kwargs.num_cycles",
        "got inf, expected a finite number",
    ),
    ("r: 4", "r: 4.5"): (5, "adapter.r", "got 4.5, expected a whole number"),
    ("r: 4", "r: true"): (5, "adapter.r", "got true, expected a whole number"),
    ("r: 4", "r: 0"): (5, "adapter.r", "got 0: input should be greater than 0"),
    ("method: lora", "method: lorra"): (
        3,
        "adapter",
        "`method` is the text 'lorra', expected none or lora",
    ),
    ("method: none", "method: 4bit"): (9, "quantization.bnb_4bit_quant_type", "is missing"),
    ("{method: none}", "{method: none, llm_int8_threshold: 4.0}"): (
        9,
        "quantization.llm_int8_threshold",
        "does not go with",
    ),
    ("{enabled: false}", "{enabled: false, patience: 3}"): (
        29,
        "early_stopping.patience",
        "does not go with `enabled: false`, only with `enabled: true`",
    ),
    ("{enabled: false}", "{}"): (29, "early_stopping", "needs the key `enabled`"),
    ("name: summarization", "name: poetry"): (
        12,
        "data.task",
        "`name` is the text 'poetry', expected conversations",
    ),
    ("{document}", "{doc}"): (
        12,
        "data.task",
        "`prompt` must hold the placeholder {document} exactly once",
    ),
    ("  num_test_samples: 1\n", ""): (
        10,
        "data",
        "`num_test_samples` is needed when `test` is taken from the training rows",
    ),
    ("seed: 3", "seed: ${training.seed}"): (
        17,
        "data.seed",
        "holds `${`, but nothing is looked up here: write the value itself, or `\\${` for that",
    ),
    ("seed: 3", "seed: '\\\\${oc.env:HOME}'"): (17, "data.seed", "holds `${`, but"),
    ("seed: 3", "seed: ???"): (
        17,
        "data.seed",
        r"is `???`, a missing value: write the value itself, or `\???` for that text",
    ),
    ("loss: full", "loss: full\nloss: completion"): (20, "(YAML)", "found duplicate key loss"),
    ("loss: full", "loss: [full"): (20, "(YAML)", "did not find expected ',' or ']'"),
    ("loss: full", "loss: full\n5: x"): (20, "5", "got the key 5, expected a text"),
    ("loss: full", "loss: !!binary aGVsbG8="): (19, "loss", "got a value of the type bytes"),
    ("  max_steps: 2\n", ""): (
        20,
        "training",
        "state exactly one of `num_train_epochs` and `max_steps`",
    ),
    ("max_steps: 2", "max_steps: 2\n  bf16: true\n  fp16: true"): (
        20,
        "training",
        "`bf16` and `fp16` cannot both be",
    ),
    ("global_batch_size: 24\n", "global_batch_size: 25\n"): (
        1,
        "(recipe)",
        "a global batch of 25 is not divisible by 3 processes x 2 sequences each",
    ),
    ("dtype: float32", "dtype: float32, attn_implementation: flash_attention_2"): (
        1,
        "(recipe)",
        "FlashAttention needs `model.dtype: bfloat16` or `float16`, got float32",
    ),
    ('eval_strategy: "no"', "eval_strategy: steps"): (28, "evaluation", "`eval_steps` goes with"),
    ('save_strategy: "no"', "save_strategy: epoch, save_steps: 3"): (
        30,
        "checkpoints",
        "`save_steps` goes with",
    ),
    ("name: base", "name: ../base"): (1, "run.name", "got the text '../base': "),
    ("name: base", "name: base, schema_version: 9"): (1, "run.schema_version", "got 9, expected 1"),
}


@pytest.mark.parametrize(("old", "new"), list(REFUSALS))
def test_a_refusal_names_line_key_and_what_is_accepted(old: str, new: str) -> None:
    line, key, words = REFUSALS[old, new]
    found = problems_of(text=edit(old, new))
    assert (line, key) in [(problem.line, problem.key) for problem in found], found
    [problem] = [problem for problem in found if (problem.line, problem.key) == (line, key)]
    assert problem.what.startswith(words)


def test_all_problems_come_at_once_in_the_order_of_the_file() -> None:
    text = TEXT
    for old, new in (
        ("r: 4", "r: four"),
        ("loss: full", "loss: none"),
        ("enabled: false", "enabled: maybe"),
    ):
        text = text.replace(old, new)
    found = problems_of("training.learning_rate=fast", text=text)
    assert [(problem.line, problem.key) for problem in found] == [
        (None, "training.learning_rate"),
        (5, "adapter.r"),
        (19, "loss"),
        (29, "early_stopping"),
    ]


def test_an_empty_recipe_names_every_section_that_is_needed() -> None:
    needed = {name for name, field in Recipe.model_fields.items() if field.is_required()}
    assert {problem.key for problem in problems_of(text="")} == needed
    assert {problem.what for problem in problems_of(text="")} == {"is missing"}


def test_a_recipe_is_a_mapping_and_not_a_novel() -> None:
    for text in ("[1]", "0", "true", "1.5", "a"):
        assert problems_of(text=text) == [Problem("(file)", "must be a mapping of sections", 1)]
    assert problems_of(text="#" * (MAX_RECIPE_BYTES + 1))[0].what.startswith(
        "longer than 1,000,000 bytes"
    )


def test_numbers_in_scientific_notation_are_numbers() -> None:
    assert parse().training.model_dump()["learning_rate"] == 1e-5
    assert parse("training.learning_rate=2E-4").training.model_dump()["learning_rate"] == 2e-4
    assert parse("training.learning_rate=1").training.model_dump()["learning_rate"] == 1.0


def test_a_text_may_hold_what_would_be_a_reference() -> None:
    for prompt, meant in (
        (r"\${oc.env:HOME} {document}", "${oc.env:HOME} {document}"),
        (r"\\\${a} \ {document}", r"\${a} \ {document}"),
        ("$ {document} ???", "$ {document} ???"),
    ):
        for recipe in (
            parse(f"data.task.prompt={prompt}"),
            parse(text=edit('"Sum up: {document}"', f"'{prompt}'")),
        ):
            assert recipe.model_dump()["data"]["task"]["prompt"] == meant
    assert parse(r"model.path=\???").model.path == "???"


def test_what_is_written_of_a_recipe_reads_as_the_same_one() -> None:
    """Submissions to Slurm and overrides of stored runs rely on this."""
    for prompt in (r"\${oc.env:HOME} {document}", r"\\\${a} \ {document}", "é {document}\n???"):
        recipe = parse(text=edit('"Sum up: {document}"', json.dumps(prompt, ensure_ascii=False)))
        assert parse(text=dump_recipe(recipe)) == recipe
        assert parse("data.seed=9", text=dump_recipe(recipe, indent=1)).data.seed == 9
    odd = parse(r"model.path=\???")
    assert odd.model.path == "???" and parse(text=dump_recipe(odd)) == odd


def test_a_missing_value_may_come_from_an_override() -> None:
    text = edit("seed: 3", "seed: ???")
    assert parse("data.seed=9", text=text).data.seed == 9
    [problem] = problems_of("training.seed=9", text=text)
    assert (problem.line, problem.key) == (17, "data.seed") and "missing value" in problem.what


def test_a_reference_is_refused_under_overrides_as_without() -> None:
    for value in ("${training.seed}", "'${.a:b}'", "'${'"):
        for overrides in ((), ("training.max_steps=3",)):
            [problem] = problems_of(*overrides, text=edit("seed: 3", f"seed: {value}"))
            assert (problem.line, problem.key) == (17, "data.seed")
            assert problem.what.startswith("holds `${`, but nothing is looked up here")
    fixed = parse("data.task.prompt=a {document}", text=edit("Sum up:", "${a}"))
    assert fixed.model_dump()["data"]["task"]["prompt"] == "a {document}"


@pytest.mark.parametrize(
    "reference",
    [
        "${oc.env:HOME}",
        "${ oc.env :HOME}",
        "${oc.${loss}:HOME}",
        "${${loss}:a}",
        "${oc.env:{a:b}}",
        "a${oc.env:HOME}b",
    ]
    + [r"\\${oc.env:HOME}", "${oc.create:{a:1}}", "${oc.decode:1}", "${.oc.env:HOME}"],
)
def test_no_reference_is_looked_up(reference: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "secret")
    for text, overrides in (
        (edit("path: data.jsonl", f"path: '{reference}'"), ()),
        (TEXT, (f"model.path={reference}",)),
    ):
        found = problems_of(*overrides, text=text)
        assert "secret" not in str(found) and "nothing is looked up here" in str(found)


@pytest.mark.parametrize(
    ("override", "key", "words"),
    [
        ("loss=ful", "loss", "got the text 'ful'"),
        ("training.lr=1", "training.lr", "unknown key"),
        ("training=3", "training", "got 3, expected a mapping"),
        ("training.learning_rate=[1", "training.learning_rate", "did not find expected"),
        ("adapter.target_modules=[1]", "adapter.target_modules.0", "got 1, expected a text"),
        ("model.path=${oc.env:HOME}", "model.path", "holds `${`, but nothing"),
        ("training.seed=${data.seed}", "training.seed", "holds `${`, but nothing"),
        ("training.seed=${.a:b}", "training.seed", "holds `${`, but nothing"),
        ("training.max_grad_norm=.inf", "training.max_grad_norm", "got inf"),
    ],
)
def test_a_wrong_override_is_called_one(override: str, key: str, words: str) -> None:
    found = problems_of(override)
    assert {problem.line for problem in found} == {None}
    assert [p for p in found if p.key == key and p.what.startswith(words)], found
    with pytest.raises(RecipeError, match=rf"override +{key}"):
        parse(override)


def test_overrides_reach_every_kind_of_value() -> None:
    recipe = parse(
        "training.max_steps=7",
        "adapter.target_modules=[k_proj]",
        "model.revision=v1",
        "run.axes.size=2",
    )
    assert recipe.training.max_steps == 7 and recipe.model.revision == "v1"
    assert recipe.model_dump()["adapter"]["target_modules"] == ("k_proj",)
    assert recipe.run.axes["size"] == 2


def test_an_override_of_a_kind_starts_the_section_anew() -> None:
    assert parse("adapter.method=none").model_dump()["adapter"] == {"method": "none"}
    assert parse("data.task.name=conversations").model_dump()["data"]["task"] == {
        "name": "conversations"
    }
    on = parse(
        "early_stopping.enabled=true",
        "early_stopping.metric=nll_per_token",
        "early_stopping.patience=2",
        "evaluation.eval_strategy=epoch",
    )
    assert on.early_stopping.enabled and on.early_stopping.patience == 2
    same = parse("adapter.method=lora", "adapter.r=9").model_dump()["adapter"]
    assert (same["r"], same["lora_alpha"]) == (9, 8), "the same kind keeps its values"


def walk(value: Any) -> Iterator[Any]:
    yield value
    if isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from walk(getattr(value, name))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from walk(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from walk(item)


@pytest.mark.parametrize(
    "text", [TEXT, edit("axes: {size: 1, nested: {list: [1, {deep: 2}]}}", "axes: {}")]
)
def test_a_recipe_is_immutable_all_the_way_down(text: str) -> None:
    for recipe in (parse(text=text), parse(text=text.replace(", axes: {}", ""))):
        kinds = {type(part) for part in walk(recipe)}
        assert not kinds & {dict, list, set}
        for part in walk(recipe):
            if isinstance(part, BaseModel):
                name = next(iter(type(part).model_fields))
                with pytest.raises(ValidationError):
                    setattr(part, name, None)
            elif isinstance(part, Mapping):
                assert isinstance(part, MappingProxyType)


VARIANTS = {
    "base": [],
    "full": ["adapter.method=none"],
    "4bit": [
        "quantization.method=4bit",
        "quantization.bnb_4bit_quant_type=nf4",
        "quantization.bnb_4bit_use_double_quant=true",
        "quantization.bnb_4bit_compute_dtype=bfloat16",
    ],
    "8bit": ["quantization.method=8bit"],
    "stated null": ["training.torch_compile_backend=null", "model.revision=null"],
    "several sources": ["data.train=[{path: a, num_samples: 2}, {path: b, num_samples: 1}]"],
    "trackers": ["tracking.report_to=[wandb,tensorboard]"],
}


@pytest.mark.parametrize("name", list(VARIANTS))
def test_a_recipe_comes_back_from_recipe_json(name: str) -> None:
    recipe = parse(*VARIANTS[name])
    stored = json.loads(json.dumps(recipe.model_dump(mode="json")))
    again = Recipe.model_validate_json(json.dumps(stored))
    assert again == recipe and again.model_dump(mode="json") == stored
    assert parse(text=yaml.safe_dump(stored)).model_dump(mode="json") == stored


def test_only_what_is_stated_goes_to_hugging_face() -> None:
    stated = parse("training.torch_compile_backend=null").training.hugging_face_arguments()
    assert stated == {
        "learning_rate": 1e-5,
        "lr_scheduler_kwargs": {"num_cycles": 2, "inner": {"a": [1]}},
        "torch_compile_backend": None,
    }
    adapter = parse("adapter.bias=none").adapter
    assert adapter.method == "lora"
    assert adapter.lora_arguments() == {
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
    }


@pytest.mark.parametrize(
    ("num_processes", "accumulation"), [(1, 12), (2, 6), (3, 4), (4, 3), (6, 2), (12, 1)]
)
def test_the_global_batch_stays_on_any_number_of_processes(
    num_processes: int, accumulation: int
) -> None:
    recipe = parse()
    assert recipe.global_batch_size == 24
    assert derive_accumulation(recipe, num_processes) == accumulation


@pytest.mark.parametrize("num_processes", [5, 24, 100])
def test_a_global_batch_that_does_not_divide_is_refused(num_processes: int) -> None:
    with pytest.raises(RefusedError, match="a global batch of 24 is not divisible by"):
        derive_accumulation(parse(), num_processes)


def test_stated_accumulation_makes_the_global_batch_of_the_recipes_own_processes() -> None:
    recipe = parse("training.global_batch_size=null", "training.gradient_accumulation_steps=8")
    assert recipe.global_batch_size == 2 * 8 * 3
    assert derive_accumulation(recipe, 1) == 24 and derive_accumulation(recipe, 3) == 8


def test_a_file_that_cannot_be_read_is_a_problem_of_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "none.yaml", tmp_path, tmp_path / "binary.yaml"):
        with pytest.raises(RecipeError, match="cannot be read"):
            load_recipe(path)


def test_a_generated_recipe_points_at_its_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("recipes/toy", "recipe_templates/toy"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "recipes/toy/a.yaml").write_text("loss: x")
    with pytest.raises(RecipeError) as caught:
        load_recipe(Path("recipes/toy/a.yaml"))
    assert caught.value.hint is None
    (tmp_path / "recipe_templates/toy/recipe.yaml.j2").touch()
    with pytest.raises(RecipeError) as caught:
        load_recipe(Path("recipes/toy/a.yaml"))
    assert caught.value.hint is not None and "runner render toy" in caught.value.hint


SCRAPS = st.sampled_from(
    [
        "a",
        "training",
        "${",
        "}",
        ":",
        "oc.env",
        "\n",
        "  ",
        "- ",
        "[",
        "{",
        "]",
        "&x ",
        "*x",
        "!!",
        "?",
    ]
)
KEYS = st.sampled_from(
    [
        ".".join(key)
        for key in (("loss",), ("training", "seed"), ("adapter", "method"), ("run", "axes"))
    ]
)
VALUES = st.one_of(
    st.text(max_size=8),
    st.lists(SCRAPS, max_size=8).map("".join),
    st.integers().map(str),
    st.floats().map(str),
)


@settings(deadline=None, max_examples=60)
@given(text=st.one_of(st.text(), st.lists(SCRAPS | st.text(max_size=3), max_size=20).map("".join)))
def test_no_text_is_more_than_a_wrong_recipe(text: str) -> None:
    with pytest.raises(RecipeError):
        parse(text=text)


@settings(deadline=None, max_examples=60)
@given(line=st.integers(0, TEXT.count("\n")), scrap=VALUES, key=KEYS | VALUES, value=VALUES)
def test_no_edit_and_no_override_is_more_than_a_wrong_recipe(
    line: int, scrap: str, key: str, value: str
) -> None:
    lines = TEXT.splitlines()
    lines.insert(line, scrap)
    for text, overrides in (("\n".join(lines), []), (TEXT, [f"{key}={value}"]), (TEXT, [value])):
        try:
            assert isinstance(parse(*overrides, text=text), Recipe)
        except RecipeError as error:
            assert str(error) and error.problems


@pytest.mark.parametrize(
    "text",
    [
        "[" * 3000,
        "{a: " * 3000,
        "a: &x [*x]",
        "a: 0x" + "f" * 6000,
        'a: "\\ud800"',
        "a: !!python/object:os.x {}",
        "A\t",
    ],
)
def test_no_trick_is_more_than_a_wrong_recipe(text: str) -> None:
    with pytest.raises(RecipeError):
        parse(text=text)


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("training.optim=adam", "adamw_torch"),
        ("training.optim=adam_w", "adamw_torch"),
        ("training.optim=AdamW", "adamw_torch"),
        ("training.optim=adamw8bit", "adamw_8bit"),
        ("training.optim=lion32bit", "lion_32bit"),
        ("training.optim=galore", "galore_adamw"),
        ("training.optim=adamw_troch", "adamw_torch"),
        ("training.lr_scheduler_type=Cosine", "cosine"),
        ("training.lr_scheduler_type=cosine-with-restarts", "cosine_with_restarts"),
        ("training.lr_scheduler_type=cosine_restarts", "cosine_with_restarts"),
        ("training.lr_scheduler_type=plateau", "reduce_lr_on_plateau"),
        ("training.lr_scheduler_type=lineer", "linear"),
        ("model.dtype=bf16", "bfloat16"),
        ("model.attn_implementation=flash", "flash_attention_2"),
        ("evaluation.eval_strategy=epochs", "epoch"),
        ("quantization.method=4_bit", "4bit"),
    ],
)
def test_a_misspelt_value_gets_the_closest_one(override: str, meant: str) -> None:
    with pytest.raises(RecipeError, match=rf", did you mean `{meant}`\?"):
        parse(override)
