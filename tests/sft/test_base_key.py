"""Two runs share scores of the base model only where all is equal that these depend on."""

from __future__ import annotations

import json
import random
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Final

import numpy
import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from runner.data.draw import LeftOut
from runner.data.masking import CompletionSpan
from runner.data.rows import Row, Samples, Split
from runner.files import hash_json
from runner.recipe.parse import Recipe, parse_recipe
from runner.sft.base_key import (
    AsRun,
    ModelState,
    build_parts,
    describe_device,
    explain_own_base,
)
from runner.sft.evaluate import score_rows
from tests.conftest import RECIPE_TEXT
from tests.support.installed import install_editable
from tests.support.token_rows import make_row
from tests.test_imports import INNER

GENERATION: Final = "evaluation.generation={enabled: true, max_new_tokens: 8}"
METRIC: Final = "evaluation.metrics=[{name: length, function: 'lengths.py:length', mode: min}]"
ROW: Final = make_row("a", (5, 6, 7, 8), (1, 3), references=("yes",), untrained=[(3, 4)])
OTHER: Final = make_row("b", (5, 6), (1, 2))
AS_RUN: Final = AsRun(
    base="weights",
    tokenizer=None,
    num_embedding_rows=768,
    pad_token_id=0,
    attn_implementation="eager",
    per_device_eval_batch_size=8,
    micro_batch_divisor=1,
    num_processes=1,
    num_machines=1,
    num_threads=1,
    precision={"mixed": "no"},
    devices=("cpu",),
    variables={"OMP_NUM_THREADS": "1"},
    generation={"max_new_tokens": 8},
    launch={"distributed_type": "NO"},
    hidden_libraries=("wandb",),
    versions={"torch": "1"},
    installed="abc",
    runner="def",
)
CONTENTS: Final = {"lengths.py": "1", "rows.py": "2"}


def make_recipe(*overrides: str) -> Recipe:
    return parse_recipe(RECIPE_TEXT, where="recipe.yaml", overrides=overrides)


def make_samples(*rows: Row, validation: tuple[Row, ...] = (OTHER,)) -> Samples:
    return Samples(Split((), ()), Split(validation, ()), Split(rows, ()), LeftOut())


def derive_key(
    *overrides: str,
    as_run: AsRun = AS_RUN,
    samples: Samples | None = None,
    contents: dict[str, str] = CONTENTS,
) -> str:
    recipe = make_recipe(GENERATION, METRIC, *overrides)
    return hash_json(build_parts(recipe, contents, samples or make_samples(ROW, OTHER), as_run))


@pytest.mark.parametrize("name", [field.name for field in fields(AsRun)])
def test_each_fact_of_the_process_is_a_part(name: str) -> None:
    value = getattr(AS_RUN, name)
    other: Any = value + 1 if isinstance(value, int) else "other"
    assert derive_key(as_run=replace(AS_RUN, **{name: other})) != derive_key()


@pytest.mark.parametrize(
    "override",
    [
        "model.dtype=bfloat16",
        "model.pad_token=add",
        "adapter.r=8",
        "adapter.method=none",
        "quantization={method: 4bit, bnb_4bit_quant_type: nf4, bnb_4bit_use_double_quant: true,"
        " bnb_4bit_compute_dtype: float32}",
        "training.bf16=true",
        "training.fp16=true",
        "training.tf32=true",
        "training.use_liger_kernel=true",
        "training.full_determinism=true",
        "evaluation.generation.max_new_tokens=9",
        "evaluation.generation.num_samples=1",
        "evaluation.generation.during_training=true",
        "evaluation.metrics=[]",
        "evaluation.metrics=[{name: length, function: 'lengths.py:other', mode: min}]",
        "data.task={name: sst2, prompt: '{sentence}'}",
    ],
)
def test_each_of_these_keys_of_a_recipe_is_a_part(override: str) -> None:
    assert derive_key(override) != derive_key()


@pytest.mark.parametrize(
    "override",
    [
        "run.name=other",
        "loss=full",
        "training.seed=4",
        "training.learning_rate=1e-5",
        "training.num_train_epochs=1",
        "training.global_batch_size=8",
        "training.gradient_checkpointing=true",
        "data.num_train_samples=11",
        "evaluation.eval_steps=2",
        "checkpoints.keep_latest=1",
        "early_stopping={enabled: true, metric: nll_per_token, patience: 1}",
        "tracking.report_to=[tensorboard]",
        "launch.stall_minutes=5",
    ],
)
def test_runs_that_differ_in_how_they_train_share(override: str) -> None:
    assert derive_key(override) == derive_key()


@pytest.mark.parametrize(
    "row",
    [
        replace(ROW, row_id="c"),
        replace(ROW, group="c"),
        replace(ROW, input_ids=(5, 6, 7, 9)),
        replace(ROW, spans=(CompletionSpan(1, 4),)),
        replace(ROW, contents=(CompletionSpan(1, 3),)),
        replace(ROW, untrained=()),
        replace(ROW, num_bytes=2),
        replace(ROW, references=("no",)),
        replace(ROW, columns={"text": "other"}),
        replace(ROW, columns={"text": float("nan"), "day": b"what JSON has not"}),
    ],
)
def test_all_that_a_row_is_scored_by_is_a_part(row: Row) -> None:
    key = derive_key()
    assert derive_key(samples=make_samples(row, OTHER)) != key
    assert derive_key(samples=make_samples(ROW, OTHER, validation=(row,))) != key


def test_so_are_the_order_of_the_rows_and_the_files_of_metrics() -> None:
    key = derive_key()
    assert derive_key(samples=make_samples(OTHER, ROW)) != key
    assert derive_key(samples=make_samples(ROW)) != key
    assert derive_key(contents={**CONTENTS, "lengths.py": "3"}) != key
    assert derive_key(contents={**CONTENTS, "data.jsonl": "3"}) == key, "its rows are parts"


class Lazy(Sequence[Row]):
    """Rows that are built when they are asked for, as stored ones are."""

    def __len__(self) -> int:
        return 500

    def __getitem__(self, at: Any) -> Any:
        if at >= len(self):
            raise IndexError
        return make_row(str(at), [100_000] * 1000, (2, 5), references=("yes" * 1000,))


def test_no_text_of_a_whole_split_is_built() -> None:
    samples = Samples(Split((), ()), Split((OTHER,), ()), Split(Lazy(), ()), LeftOut())
    derive_key(samples=samples)
    tracemalloc.start()
    derive_key(samples=samples)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000, "500 rows of 11 kB"


def test_what_answers_are_judged_by_is_no_part_where_nothing_answers() -> None:
    quiet = make_recipe()
    keys = {
        hash_json(build_parts(quiet, CONTENTS, make_samples(row), AS_RUN))
        for row in (ROW, replace(ROW, references=("no",), columns={"text": "other"}))
    }
    assert len(keys) == 1


LORA: Final = "{method: lora, r: 4, lora_alpha: 8, lora_dropout: 0.1, target_modules: all-linear"


@pytest.mark.parametrize(
    ("adapter", "why"),
    [
        ("{method: none}", None),
        (f"{LORA}}}", None),
        (f"{LORA}, init_lora_weights: true, use_rslora: true, bias: all}}", None),
        (f"{LORA}, use_dora: false, lora_bias: false, modules_to_save: null}}", None),
        (f"{LORA}, rank_pattern: {{q_proj: 2}}}}", None),
        (f"{LORA}, init_lora_weights: false}}", "init_lora_weights"),
        (f"{LORA}, init_lora_weights: gaussian}}", "init_lora_weights"),
        (f"{LORA}, init_lora_weights: pissa}}", "init_lora_weights"),
        (f"{LORA}, init_lora_weights: olora}}", "init_lora_weights"),
        (f"{LORA}, use_dora: true}}", "use_dora"),
        (f"{LORA}, lora_bias: true}}", "lora_bias"),
        (f"{LORA}, modules_to_save: [lm_head]}}", "modules_to_save"),
        (f"{LORA}, trainable_token_indices: [3]}}", "trainable_token_indices"),
        (f"{LORA}, layer_replication: [[0, 1], [0, 1]]}}", "layer_replication"),
    ],
)
def test_adapters_that_may_change_something_score_themselves(adapter: str, why: str | None) -> None:
    said = explain_own_base(make_recipe(f"adapter={adapter}"), "shared", "NO")
    assert (said is None) == (why is None)
    assert why is None or (said is not None and f"`adapter.{why}`" in said)


def test_so_do_compiled_models_sharded_ones_and_who_asks_for_it() -> None:
    recipe = make_recipe()
    for kind in ("NO", "MULTI_GPU", "MULTI_CPU"):
        assert explain_own_base(recipe, "shared", kind) is None
    assert explain_own_base(recipe, "own", "NO") == "`--own-base` was given"
    for kind in ("DEEPSPEED", "FSDP", "TP"):
        assert kind in str(explain_own_base(recipe, "shared", kind))
    assert "`dynamo_config`" in str(explain_own_base(recipe, "shared", "NO", dynamo="INDUCTOR"))
    compiled = make_recipe("training.torch_compile=true")
    assert "`training.torch_compile`" in str(explain_own_base(compiled, "shared", "NO"))


def test_so_do_functions_that_may_import_what_is_edited_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_function, without = make_recipe(GENERATION, METRIC), make_recipe(GENERATION)
    assert explain_own_base(with_function, "shared", "NO") is None
    install_editable(tmp_path, "lab-tools")
    monkeypatch.syspath_prepend(tmp_path)
    assert "lab-tools" in str(explain_own_base(with_function, "shared", "NO"))
    assert explain_own_base(without, "shared", "NO") is None


def test_the_machine_is_described_without_a_gpu() -> None:
    assert describe_device(torch.device("cpu")).startswith("cpu, ")


def test_a_warm_worker_has_loaded_the_key_before_it_forks() -> None:
    """`runner.sft.train` is all that it imports: what the key says of sources is taken there."""
    reached, left = {"runner.sft.train"}, ["runner.sft.train"]
    while left:
        importer = left.pop()
        for one in INNER:
            if one.importer == importer and one.is_at_import and one.imported not in reached:
                reached.add(one.imported)
                left.append(one.imported)
    assert {"runner.sft.base_key", "runner.data.provenance"} <= reached


@pytest.mark.parametrize("family", ["gemma", "gemma2", "llama", "mistral", "phi"])
def test_scoring_leaves_nothing_in_a_model_or_the_dice(
    tiny_model: Callable[[str], Path], family: str
) -> None:
    """Beyond the first batch: so that a run trains the same whether or not it scores the rest."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model(family), attn_implementation="eager")
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    rows = [make_row(str(length), range(3, 3 + length), (1, 4)) for length in range(5, 60, 5)]

    def score(some: list[Row]) -> None:
        score_rows(model, some, batch_size=4, pad_token_id=0, accelerator=Accelerator(cpu=True))

    score(rows[:2])
    before = ModelState(model)
    score(rows)
    assert before.find_change(ModelState(model)) is None


class Remembering(torch.nn.Module):
    """Keeps something of each call, in one of four ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.longest = how, 0
        self.register_buffer("seen", torch.zeros(2), persistent=False)
        self.memory = torch.zeros(2)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        if self.how == "attribute":
            self.longest = len(value)
        if self.how == "buffer":
            self.seen += 1
        if self.how == "new buffer":
            self.seen = torch.zeros(2)
        if self.how == "tensor":
            self.memory += 1
        return value


@pytest.mark.parametrize(
    ("how", "name"),
    [("nothing", None), ("attribute", "1.longest"), ("buffer", "1.seen")]
    + [("new buffer", "1.seen"), ("tensor", "1.memory")],
)
def test_what_a_forward_leaves_behind_is_found(how: str, name: str | None) -> None:
    model = torch.nn.Sequential(torch.nn.Identity(), Remembering(how))
    before = ModelState(model)
    model(torch.ones(3))
    model.train()
    change = before.find_change(ModelState(model))
    assert change is None if name is None else change == f"{name} has changed"


@pytest.mark.parametrize(
    "draw", [random.random, lambda: numpy.random.rand(), lambda: torch.rand(1)]
)
def test_and_so_are_dice_that_were_thrown(draw: Callable[[], Any]) -> None:
    model = torch.nn.Identity()
    before = ModelState(model)
    draw()
    assert before.find_change(ModelState(model)) == "random numbers were drawn"


def test_the_parts_are_plain_json() -> None:
    parts = build_parts(make_recipe(GENERATION), CONTENTS, make_samples(ROW), AS_RUN)
    assert json.loads(json.dumps(parts)) == parts
