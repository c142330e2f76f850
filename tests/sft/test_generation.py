"""Answers are those of plain greedy decoding, for any batch, and neither the model nor the random
states change.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from runner.data.chat_template import ChatFormat
from runner.data.draw import LeftOut
from runner.data.rows import Row, Samples, Split, build_samples
from runner.data.tasks.base import Judgement
from runner.data.tasks.squad_v2 import SquadV2Task
from runner.data.tasks.sst2 import Sst2Task
from runner.data.tokenizer import load_tokenizer
from runner.errors import DataError
from runner.recipe.data_section import DataSection
from runner.recipe.evaluation_section import EvaluationSection
from runner.recipe.schema import ModelSection
from runner.run.result import GenerationScore, SplitScore
from runner.sft.generation import (
    Answer,
    build_generation_config,
    build_prompt,
    generate_answers,
    load_answers,
    refuse_unjudgeable,
    refuse_unjudged,
    score_answers,
    write_answers,
)
from runner.sft.recorder import Recorder
from tests.conftest import ROOT, Project
from tests.support.contexts import open_context
from tests.support.token_rows import make_row

FAMILIES = ("gemma", "gemma2", "llama", "mistral", "phi")
NUM_NEW = 12
HUMAN = str(ROOT / "recipe_templates" / "chat" / "human_assistant.jinja")
TASK = Sst2Task(name="sst2", prompt="{sentence}")

Loaded = tuple[Any, Any, tuple[Row, ...]]


@pytest.fixture(scope="module")
def load(tiny_model: Callable[[str], Path]) -> Callable[[str], Loaded]:
    """`family -> (model in training mode, tokenizer, rows)`; the rows' prompts differ in length."""

    def build(family: str) -> Loaded:
        template = HUMAN if family == "phi" else None
        tokenizer = load_tokenizer(
            ModelSection(path=str(tiny_model(family)), dtype="float32", chat_template=template)
        )
        data: dict[str, Any] = {
            "train": {"path": str(ROOT / "data" / "demo.jsonl")},
            "task": {"name": "conversations"},
        }
        counts = {"num_train_samples": 1, "num_validation_samples": 1, "num_test_samples": 9}
        section = DataSection.model_validate_json(
            json.dumps({**data, **counts, "seed": 1, "max_length": 1000})
        )
        model = AutoModelForCausalLM.from_pretrained(
            tiny_model(family), attn_implementation="eager"
        ).train()
        model.config.use_cache = False
        return model, tokenizer, build_samples(section, tokenizer).test.rows

    return build


def answer(
    model: Any,
    tokenizer: Any,
    rows: tuple[Row, ...],
    batch_size: int = 4,
    sign_of_life: Callable[[], None] = lambda: None,
) -> list[Answer]:
    return generate_answers(
        model,
        rows,
        task=TASK,
        tokenizer=tokenizer,
        max_new_tokens=NUM_NEW,
        batch_size=batch_size,
        accelerator=Accelerator(cpu=True),
        sign_of_life=sign_of_life,
    )


def test_each_batch_and_each_answer_is_a_sign_of_life(load: Callable[[str], Loaded]) -> None:
    (model, tokenizer, rows), signs = load("gemma"), list[None]()
    answers = answer(model, tokenizer, rows[:5], 4, lambda: signs.append(None))
    assert len(answers) == 5 and len(signs) == 2 + 5


@torch.no_grad()
def answer_plainly(model: Any, tokenizer: Any, row: Row) -> tuple[str, bool]:
    """One token after the other, each from a forward over everything before it."""
    stop_ids, ids = build_generation_config(tokenizer, NUM_NEW).eos_token_id, build_prompt(row)
    num_prompt = len(ids)
    model.eval()
    while len(ids) < num_prompt + NUM_NEW:
        token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token in stop_ids:
            return tokenizer.decode(ids[num_prompt:], skip_special_tokens=True).strip(), True
        ids.append(token)
    return tokenizer.decode(ids[num_prompt:], skip_special_tokens=True).strip(), False


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_plain_greedy_decoding_for_any_batch_size(
    load: Callable[[str], Loaded], family: str
) -> None:
    model, tokenizer, rows = load(family)
    assert len({len(build_prompt(row)) for row in rows}) > 1
    found = {size: answer(model, tokenizer, rows, size) for size in (1, 4, 64)}
    expected = [answer_plainly(model, tokenizer, row) for row in rows]
    for answers in found.values():
        assert [one.row_id for one in answers] == [row.row_id for row in rows], (
            "in the order of the rows"
        )
        assert [(one.prediction, one.is_finished) for one in answers] == expected


@pytest.mark.parametrize(("stated", "expected"), [("null", [4, 4, 1]), ("6", [6, 3])])
def test_a_run_answers_in_batches_of_their_own_or_as_it_scores(
    load: Callable[[str], Loaded], project: Project, stated: str, expected: list[int]
) -> None:
    model, tokenizer, rows = load("gemma")
    context = open_context(
        project,
        "evaluation.per_device_eval_batch_size=4",
        f"evaluation.generation={{enabled: true, max_new_tokens: 2, batch_size: {stated}}}",
    )
    split = Split(rows, ())
    recorder = Recorder(context, Samples(split, split, split, LeftOut()))
    trainer = SimpleNamespace(
        model_wrapped=model,
        processing_class=tokenizer,
        accelerator=Accelerator(cpu=True),
        compute_loss_context_manager=nullcontext,
    )
    sizes: list[int] = []

    def note(_: Any, __: Any, arguments: dict[str, Any]) -> None:
        if arguments["input_ids"].shape[1] > 1:  # the prompts, not the tokens after them
            sizes.append(len(arguments["input_ids"]))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    answers = recorder.answer(trainer, "test")  # type: ignore[arg-type]
    handle.remove()
    assert sizes == expected and len(answers) == len(rows) == 9


def test_an_answer_ends_with_the_turn(load: Callable[[str], Loaded]) -> None:
    """The model always says one token: any other token continues to the limit, the end of turn
    stops immediately.
    """
    model, tokenizer, rows = load("gemma")
    end_of_turn, word = tokenizer.convert_tokens_to_ids(["<end_of_turn>", "▁the"])
    assert build_generation_config(tokenizer, 1).eos_token_id == sorted(
        {end_of_turn, tokenizer.eos_token_id}
    )
    head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size)
    torch.nn.init.zeros_(head.weight)
    model.lm_head = head
    for token, is_finished in ((end_of_turn, True), (tokenizer.eos_token_id, True), (word, False)):
        torch.nn.init.zeros_(head.bias)
        head.bias.data[token] = 1
        for one in answer(model, tokenizer, rows):
            assert one.is_finished is is_finished
            assert one.prediction == ("" if is_finished else " ".join(["the"] * NUM_NEW))


def test_generation_stops_where_the_base_model_stops_too(load: Callable[[str], Loaded]) -> None:
    """A call may end in another token than an answer, which the generation config names."""
    _, tokenizer, _ = load("gemma")
    word = tokenizer.convert_tokens_to_ids("▁the")
    assert word not in build_generation_config(tokenizer, 1).eos_token_id
    tokenizer.chat_format = ChatFormat(stop_tokens=frozenset({"▁the"}))
    assert word in build_generation_config(tokenizer, 1).eos_token_id


def test_nothing_of_the_model_or_the_dice_is_changed(load: Callable[[str], Loaded]) -> None:
    base, tokenizer, rows = load("llama")
    model = get_peft_model(base, LoraConfig(r=4, lora_dropout=0.5, target_modules="all-linear"))
    model.gradient_checkpointing_enable()
    model.train()
    # A default of the model that is not greedy decoding.
    base.generation_config.repetition_penalty = 50.0
    before = (
        torch.get_rng_state(),
        base.generation_config,
        {k: v.clone() for k, v in model.state_dict().items()},
    )
    answers = answer(model, tokenizer, rows)
    assert model.training and all(module.training for module in model.modules())
    assert base.is_gradient_checkpointing and base.config.use_cache is False
    assert torch.equal(before[0], torch.get_rng_state())
    assert base.generation_config is before[1]
    assert all(torch.equal(before[2][name], value) for name, value in model.state_dict().items())
    expected = [answer_plainly(model, tokenizer, row) for row in rows]
    assert [(one.prediction, one.is_finished) for one in answers] == expected


def test_the_mode_is_restored_after_a_failure(load: Callable[[str], Loaded]) -> None:
    model, tokenizer, _ = load("llama")
    defaults = model.generation_config
    with pytest.raises(IndexError):
        answer(model, tokenizer, (make_row("bad", (3, 10**6, 5), (2, 3)),))
    assert model.training and model.generation_config is defaults


def test_a_prompt_is_what_training_saw_before_the_last_completion(
    load: Callable[[str], Loaded],
) -> None:
    row = make_row("two", (1, 2, 3, 4, 5, 6, 7), (1, 3), (5, 7))
    assert build_prompt(row) == [1, 2, 3, 4, 5]
    _, tokenizer, rows = load("gemma")
    assert tokenizer.decode(build_prompt(rows[0])).endswith("<end_of_turn>\n<start_of_turn>model\n")
    with pytest.raises(DataError, match="row one begins with its completion"):
        build_prompt(make_row("one", (1, 2), (0, 2)))


def test_scores_count_what_is_unfinished_unreadable_and_judged(tmp_path: Path) -> None:
    task = SquadV2Task(name="squad_v2", prompt="{context} {question}")
    answers = [
        Answer("a", "é", ("é",), True, Judgement({"exact_match": 1.0, "f1": 1.0})),
        Answer("b", "x", (), False, Judgement({"exact_match": 0.0, "f1": 0.0}, is_readable=False)),
        Answer("c", "x", ("y",), True, Judgement()),
    ]
    path = tmp_path / "predictions.jsonl"
    write_answers(path, {"base": answers[:1], "tuned": answers})
    assert (load_answers(path, "base"), load_answers(path, "tuned")) == (answers[:1], answers)
    assert load_answers(tmp_path / "none.jsonl", "base") == []
    score = score_answers(task, answers)
    assert (score.num_rows, score.num_judged, score.num_unfinished, score.num_unreadable) == (
        3,
        2,
        1,
        1,
    )
    assert score.metrics["exact_match"] == 0.5


def test_the_projects_own_scores_are_kept_and_averaged_over_the_rows_they_judge(
    tmp_path: Path,
) -> None:
    def answer(row_id: str, **scores: float | None) -> Answer:
        return Answer(row_id, "x", (), True, Judgement(), scores)

    answers = [answer("a", long=2.0, none=None), answer("b", long=None, none=None)]
    answers.append(answer("c", long=5.0, none=None))
    path = tmp_path / "predictions.jsonl"
    write_answers(path, {"tuned": answers})
    assert load_answers(path, "tuned") == answers
    score = score_answers(TASK, answers)
    assert score.metrics == {"long": 3.5}, "a metric that judged nothing has no value"
    assert (score.num_judged, score.num_judged_by) == (0, {"long": 2, "none": 0})


def test_a_metric_that_chooses_must_judge_something(project: Project) -> None:
    metrics = ", ".join(
        f"{{name: {name}, function: 'scores.py:score', mode: min}}" for name in ("long", "none")
    )
    recipe = project.recipe(
        "evaluation.generation={enabled: true, max_new_tokens: 8, during_training: true}",
        f"evaluation.metrics=[{metrics}]",
        "checkpoints={metric: long, mode: min}",
        "early_stopping={enabled: true, metric: none, mode: min, patience: 1}",
    )
    judged = [Answer("a", "x", (), True, Judgement(), {"long": 1.0, "none": 2.0})]
    refuse_unjudged(recipe, score_answers(TASK, judged), 4)
    unjudged = [Answer("a", "x", (), True, Judgement(), {"long": 1.0, "none": None})]
    with pytest.raises(DataError, match=r"`none` judged none of the 1 answer .* at step 4"):
        refuse_unjudged(recipe, score_answers(TASK, unjudged), 4)


def test_a_function_that_fails_on_an_empty_answer_is_found_before_training(
    project: Project,
) -> None:
    recipe = project.recipe(
        "evaluation.generation={enabled: true, max_new_tokens: 8}",
        "evaluation.metrics=[{name: share, function: 'scores.py:score', mode: max}]",
    )
    row = replace(make_row("r", (1, 2, 3), (2, 3)), where="d.jsonl line 4", columns={"n": 6})
    split = Split((row,), ())
    samples = Samples(split, split, split, LeftOut())

    def refuse(body: str) -> None:
        source = f"def score(prediction, references, row):\n    return {body}\n"
        refuse_unjudgeable(recipe.with_sources({"scores.py": source}), samples)

    refuse("len(prediction) / row['n']")
    with pytest.raises(DataError, match=r"d\.jsonl line 4: scores\.py line 2, in `score`: Zero"):
        refuse("row['n'] / len(prediction)")


def test_no_metric_of_the_project_is_called_as_what_an_evaluation_says() -> None:
    said = {*SplitScore.model_fields, *GenerationScore.model_fields} - {"num_judged", "metrics"}
    for name in (*said - {"num_judged_by"}, "split", "step", "loss", "nll_per_token"):
        with pytest.raises(ValidationError, match="is measured already"):
            EvaluationSection.model_validate(
                {
                    "eval_strategy": "no",
                    "per_device_eval_batch_size": 1,
                    "metrics": ({"name": name, "function": "s.py:s", "mode": "max"},),
                }
            )


def test_a_metric_that_chooses_must_be_defined_on_the_validation_rows(project: Project) -> None:
    recipe = project.recipe(
        "data.task={name: squad_v2, prompt: '{context} {question}'}",
        "evaluation.generation={enabled: true, max_new_tokens: 8, num_samples: 2, during_training:"
        " true}",
        "checkpoints={metric: no_answer_accuracy, mode: max}",
    )
    rows = [
        make_row(str(n), (1, 2, 3), (2, 3), references=("x",) if n < 2 else ()) for n in range(3)
    ]

    def samples(*chosen: Row) -> Samples:
        split = Split(tuple(chosen), ())
        return Samples(split, split, split, LeftOut())

    refuse_unjudgeable(recipe, samples(*reversed(rows)))
    with pytest.raises(DataError, match="no validation row can be judged by `no_answer_accuracy`"):
        # The only one without an answer is the third.
        refuse_unjudgeable(recipe, samples(*rows))
    with pytest.raises(DataError, match="begins with its completion"):
        refuse_unjudgeable(recipe, samples(make_row("r", (1, 2), (0, 2))))
