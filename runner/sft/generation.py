"""Generates a model's answers to the prompts of a split, greedily, and judges them.

A prompt consists of exactly the tokens that training saw before the last completion of a row. Rows
are spread over the ranks as in `evaluate`. Each rank judges its own answers, and every rank gets
all of them, so all ranks make the same decisions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from accelerate import Accelerator
from peft import PeftModel
from transformers import GenerationConfig

from runner.data.chat_template import get_chat_format
from runner.data.masking import end_of_turn_ids
from runner.data.rows import Row, Samples
from runner.data.tasks.base import Judgement, Task
from runner.errors import DataError
from runner.files import load_jsonl, write_jsonl_atomic
from runner.functions import Metric
from runner.recipe.evaluation_section import EarlyStoppingOn, GenerationOn
from runner.recipe.parse import Recipe
from runner.run.result import GenerationScore
from runner.sft.evaluate import share_rows
from runner.text import format_count


@dataclass(frozen=True)
class Answer:
    """A model's answer to one row. It is finished if the turn ended before `max_new_tokens`."""

    row_id: str
    prediction: str
    references: tuple[str, ...]
    is_finished: bool
    judgement: Judgement
    # Scores of the project's own metrics; None: not judged.
    own_scores: Mapping[str, float | None] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The answer as a line of `predictions.jsonl`."""
        own = {"own_scores": dict(self.own_scores)} if self.own_scores else {}
        return {
            "row_id": self.row_id,
            "prediction": self.prediction,
            "references": list(self.references),
            "is_finished": self.is_finished,
            "is_readable": self.judgement.is_readable,
            "scores": self.judgement.scores,
            **own,
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Self:
        """The answer that `as_json` wrote."""
        return cls(
            row_id=row["row_id"],
            prediction=row["prediction"],
            references=tuple(row["references"]),
            is_finished=row["is_finished"],
            judgement=Judgement(row["scores"], row["is_readable"]),
            own_scores=row.get("own_scores", {}),
        )


def build_prompt(row: Row) -> list[int]:
    """The tokens before the last completion of a row.

    Raises:
        DataError: the row begins with its completion.
    """
    prompt = list(row.input_ids[: row.spans[-1].start])
    if not prompt:
        raise DataError(
            f"row {row.row_id} begins with its completion, so there is nothing to answer",
            hint=(
                "use a chat template that writes a beginning-of-sequence token"
                " or a role before each turn"
            ),
        )
    return prompt


def build_generation_config(tokenizer: Any, max_new_tokens: int) -> GenerationConfig:
    """Greedy decoding up to the end of the turn or of the text, or to a stop token of the base
    model's own settings: a call may end with another token than an answer.
    """
    known = tokenizer.convert_tokens_to_ids(sorted(get_chat_format(tokenizer).stop_tokens))
    stop_ids = {*end_of_turn_ids(tokenizer), tokenizer.eos_token_id, *known} - {None}
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(stop_ids),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )


def generate_answers(
    model: torch.nn.Module,
    rows: Sequence[Row],
    *,
    task: Task,
    metrics: Sequence[Metric] = (),
    tokenizer: Any,
    max_new_tokens: int,
    batch_size: int,
    accelerator: Accelerator,
    sign_of_life: Callable[[], None] = lambda: None,
) -> list[Answer]:
    """The judged answer to every row, in the order of `rows`, on every rank. No random numbers are
    drawn. `sign_of_life` is called for each batch and each answer.

    Every rank makes the same number of calls. Under ZeRO-3, which gathers weights in each forward,
    each call also has the same number of steps: Transformers continues until the slowest rank is
    done.
    """
    prompts = [build_prompt(row) for row in rows]
    config = build_generation_config(tokenizer, max_new_tokens)
    share = share_rows([len(prompt) for prompt in prompts], batch_size, accelerator)
    found: list[tuple[int, Answer]] = []
    with (
        _ready_to_generate(accelerator.unwrap_model(model), config) as generator,
        task.open_judge() as judge,
        open_scores(metrics) as score,
    ):
        for batch in share.batches:
            sign_of_life()
            texts = _generate_batch(
                generator, [prompts[index] for index in batch], tokenizer, accelerator.device
            )
            for index, (text, is_finished) in zip(batch, texts, strict=True):
                row = rows[index]
                sign_of_life()
                judgement = judge(text, row.references)
                answer = Answer(
                    row.row_id, text, row.references, is_finished, judgement, score(text, row)
                )
                found.append((index, answer))
    return share.gather(found)


@contextmanager
def open_scores(
    metrics: Sequence[Metric],
) -> Iterator[Callable[[str, Row], dict[str, float | None]]]:
    """A function that scores `(prediction, row)` by every metric of the project.

    Raises:
        DataError: a metric cannot be loaded; the function raises it if a metric fails.
    """
    with ExitStack() as stack:
        opened = {metric.name: stack.enter_context(metric.open_score()) for metric in metrics}

        def score(prediction: str, row: Row) -> dict[str, float | None]:
            where = row.where or f"row {row.row_id}"
            return {
                name: one(prediction, row.references, row.columns, where)
                for name, one in opened.items()
            }

        yield score


@contextmanager
def _ready_to_generate(model: Any, config: GenerationConfig) -> Iterator[Any]:
    """The model that has `generate`, in evaluation mode and with `config` as its only defaults;
    both are restored afterwards.

    In evaluation mode, layers neither drop out nor checkpoint activations, and the cache stays on.
    LoRA's layers are in the model that PEFT wraps. The model's own defaults, such as a repetition
    penalty, would otherwise apply to settings that `config` leaves open.
    """
    was_training = model.training
    generator = model.get_base_model() if isinstance(model, PeftModel) else model
    defaults = generator.generation_config
    generator.generation_config = config
    model.eval()
    try:
        yield generator
    finally:
        model.train(was_training)
        generator.generation_config = defaults


@torch.no_grad()
def _generate_batch(
    generator: Any, prompts: Sequence[Sequence[int]], tokenizer: Any, device: torch.device
) -> list[tuple[str, bool]]:
    """`(text, is_finished)` of each prompt. Prompts are padded on the left, so all answers begin at
    the same position.
    """
    config = generator.generation_config
    width = max(len(prompt) for prompt in prompts)
    padding = [[config.pad_token_id] * (width - len(prompt)) for prompt in prompts]
    input_ids = torch.tensor(
        [[*pads, *prompt] for pads, prompt in zip(padding, prompts, strict=True)]
    )
    attention_mask = torch.tensor([[0] * len(pads) + [1] * (width - len(pads)) for pads in padding])
    output = generator.generate(
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        generation_config=config,
    )
    return [_read_answer(ids, config.eos_token_id, tokenizer) for ids in output[:, width:].tolist()]


def _read_answer(new_ids: list[int], stop_ids: Sequence[int], tokenizer: Any) -> tuple[str, bool]:
    """The text before the first stop token, stripped of whitespace, and True if there is such a
    token.
    """
    end = next((at for at, token in enumerate(new_ids) if token in stop_ids), None)
    text: str = tokenizer.decode(new_ids[:end], skip_special_tokens=True)
    return text.strip(), end is not None


def score_answers(task: Task, answers: Sequence[Answer]) -> GenerationScore:
    """The metrics of a split: the task's own, and the mean of each project metric over the rows
    that it judges.
    """
    metrics = task.summarise([(answer.references, answer.judgement) for answer in answers])
    num_judged_by = {}
    for name in answers[0].own_scores if answers else ():
        scores = [answer.own_scores[name] for answer in answers]
        judged = [score for score in scores if score is not None]
        num_judged_by[name] = len(judged)
        if judged:
            metrics[name] = math.fsum(judged) / len(judged)
    return GenerationScore(
        num_rows=len(answers),
        num_unfinished=sum(not answer.is_finished for answer in answers),
        num_unreadable=sum(not answer.judgement.is_readable for answer in answers),
        num_judged=sum(bool(answer.judgement.scores) for answer in answers),
        metrics=metrics,
        num_judged_by=num_judged_by,
    )


def write_answers(path: Path, by_model: Mapping[str, Sequence[Answer]]) -> None:
    """Write `predictions.jsonl`: the answers of each model, `base` or `tuned`, in the order of the
    split.
    """
    write_jsonl_atomic(
        path,
        [
            {"model": model, **answer.as_json()}
            for model, answers in by_model.items()
            for answer in answers
        ],
    )


def load_answers(path: Path, model: str) -> list[Answer]:
    """The answers of one model that `write_answers` wrote; empty if there is no file."""
    return [Answer.from_json(row) for row in load_jsonl(path) if row["model"] == model]


def refuse_unjudged(recipe: Recipe, score: GenerationScore, step: int) -> None:
    """Raises: DataError, if a metric that selects a checkpoint or stops training has no value
    because no answer was judged.
    """
    for name in sorted(_list_selecting(recipe)):
        if name in score.num_judged_by and name not in score.metrics:
            raise DataError(
                f"`{name}` judged none of the {format_count(score.num_rows, 'answer')} to the"
                f" validation rows at step {step}, but it selects the best checkpoint or stops"
                " training",
                hint="let it return a number for every answer, or use another metric",
            )


def _list_selecting(recipe: Recipe) -> set[str]:
    """The metrics that select the best checkpoint or stop training."""
    stopping = recipe.early_stopping
    stops_by = {stopping.metric} if isinstance(stopping, EarlyStoppingOn) else set()
    return {recipe.checkpoints.metric} | stops_by


def refuse_unjudgeable(recipe: Recipe, samples: Samples) -> None:
    """Check before training that the rows support the generation settings of the recipe.

    Raises:
        DataError: a row has no prompt, a metric that selects a checkpoint or stops training is
            undefined on the validation rows, or a project metric fails on an empty answer, which
            any model may return.
    """
    generation, task = recipe.evaluation.generation, recipe.data.task
    if not isinstance(generation, GenerationOn):
        return
    validation = (
        samples.validation.rows[: generation.num_samples] if generation.during_training else ()
    )
    with open_scores(recipe.evaluation.metrics) as score:
        for row in (*samples.test.rows[: generation.num_samples], *validation):
            build_prompt(row)
            score("", row)
    if generated := _list_selecting(recipe) & set(task.METRICS):
        with task.open_judge() as judge:
            defined = task.summarise(
                [(row.references, judge("", row.references)) for row in validation]
            )
        if missing := sorted(generated - set(defined)):
            raise DataError(
                f"no validation row can be judged by {', '.join(f'`{name}`' for name in missing)},"
                " which selects the best checkpoint or stops training",
                hint="use another metric, or validation rows that it can judge",
            )
