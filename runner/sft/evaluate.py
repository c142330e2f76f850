"""Scores a model on a split: the negative log-likelihood of each row's completions and of its full
text, in one forward.

Sums over rows are exact (`math.fsum`) and count every row once. Apart from rounding inside a
forward, a score does not depend on the batch size or on the number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from runner.data.rows import Row
from runner.data.stored_rows import list_lengths
from runner.errors import DivergedError, RunnerError
from runner.run.result import SplitScore
from runner.run.scores import find_impossible

Value = TypeVar("Value")
DIVERGED_HINT: Final = "lower `training.learning_rate`, or train in a wider dtype"
# The rounding of a kernel may turn a probability of 1 into one slightly above 1.
_ROUNDING: Final = 1e-4


@dataclass(frozen=True)
class RowScore:
    """One row's sums in nats and the tokens and bytes that they cover. The first token of a row has
    no prediction, and turns of weight 0 are in no sum.

    `template_nll_sum` covers the completion tokens that hold no byte of the row's own text, such as
    ends of turns. The other completion tokens hold its `num_bytes`.
    """

    row_id: str
    group: str
    completion_nll_sum: float
    template_nll_sum: float
    num_completion_tokens: int
    nll_sum: float
    num_tokens: int
    num_bytes: int

    def as_json(self) -> dict[str, Any]:
        """The score as a line of `eval_rows.jsonl`."""
        return asdict(self)


def score_rows(
    model: torch.nn.Module,
    rows: Sequence[Row],
    *,
    batch_size: int,
    pad_token_id: int,
    accelerator: Accelerator,
    sign_of_life: Callable[[], None] = lambda: None,
) -> list[RowScore]:
    """The score of every row, in the order of `rows`, on every rank. `sign_of_life` is called for
    each batch.

    `model` has TRL's fused LM head, which computes log-probabilities without building logits.
    """
    share = share_rows(list_lengths(rows), batch_size, accelerator)
    scored: list[tuple[int, RowScore]] = []
    was_training = model.training
    model.eval()
    try:
        for indices in share.batches:
            sign_of_life()
            batch = [rows[index] for index in indices]
            scored += zip(
                indices, _score_batch(model, batch, pad_token_id, accelerator.device), strict=True
            )
    finally:
        model.train(was_training)
    return share.gather(scored)


@dataclass(frozen=True)
class Share:
    """One rank's batches of row indices. The last `num_extra` indices are repeats, whose results
    are dropped.
    """

    batches: tuple[tuple[int, ...], ...]
    num_extra: int
    num_rows: int  # of all ranks

    def gather(self, results: Sequence[tuple[int, Value]]) -> list[Value]:
        """`(index, result)` of every rank's batches -> all results in the order of the rows, on
        every rank.
        """
        by_index = dict(gather_object(list(results[: len(results) - self.num_extra])))
        assert len(by_index) == self.num_rows, "every row is worked on exactly once"
        return [by_index[index] for index in range(self.num_rows)]


def share_rows(lengths: Sequence[int], batch_size: int, accelerator: Accelerator) -> Share:
    """Spread rows over the ranks, the longest first, so that batches hold rows of similar length.

    Every rank gets the same number of batches (ZeRO-3 gathers weights in each forward), so short
    ranks repeat their last row.
    """
    longest_first = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    mine = longest_first[accelerator.process_index :: accelerator.num_processes]
    num_extra = math.ceil(len(lengths) / accelerator.num_processes) - len(mine)
    padded = mine + [(mine or longest_first)[-1]] * num_extra
    batches = tuple(tuple(padded[at : at + batch_size]) for at in range(0, len(padded), batch_size))
    return Share(batches, num_extra, len(lengths))


@torch.no_grad()
def _score_batch(
    model: torch.nn.Module, batch: Sequence[Row], pad_token_id: int, device: torch.device
) -> list[RowScore]:
    width = max(len(row.input_ids) for row in batch)
    input_ids = torch.tensor(
        [[*row.input_ids, *[pad_token_id] * (width - len(row.input_ids))] for row in batch]
    )
    lengths = torch.tensor([len(row.input_ids) for row in batch])
    attention_mask = (torch.arange(width)[None, :] < lengths[:, None]).long()  # (batch, width)
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    output = model(
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        labels=labels.to(device),
        use_cache=False,
        fused_lm_head=True,
    )
    nll = -output.log_probs.double().cpu()  # (batch, width - 1); position t scores token t + 1
    nll.masked_fill_((nll < 0) & (nll > -_ROUNDING), 0.0)
    return [_sum_row(row, nll[index]) for index, row in enumerate(batch)]


def _sum_row(row: Row, nll: torch.Tensor) -> RowScore:
    values: list[float] = nll[: len(row.input_ids) - 1].tolist()
    completion = {at for span in row.spans for at in range(max(span.start, 1), span.end)}
    content = {at for span in row.contents for at in range(span.start, span.end)}
    untrained = {at for span in row.untrained for at in range(span.start, span.end)}
    scored = [at for at in range(1, len(row.input_ids)) if at not in untrained]
    return RowScore(
        row_id=row.row_id,
        group=row.group,
        completion_nll_sum=math.fsum(values[at - 1] for at in completion),
        template_nll_sum=math.fsum(values[at - 1] for at in completion - content),
        num_completion_tokens=len(completion),
        nll_sum=math.fsum(values[at - 1] for at in scored),
        num_tokens=len(scored),
        num_bytes=row.num_bytes,
    )


def refuse_impossible(scores: Sequence[RowScore], split: str, step: int) -> None:
    """Raises: DivergedError, if the score of a row is not finite; RunnerError, if it is impossible
    for another reason.
    """
    for score in scores:
        if (why := find_impossible(score.as_json())) is None:
            continue
        message = f"the {split} score at step {step} is impossible: row {score.row_id}: {why}"
        if not math.isfinite(score.nll_sum):
            raise DivergedError(message, hint=DIVERGED_HINT)
        raise RunnerError(
            message,
            hint=(
                "the libraries do not compute valid log-likelihoods for this model: try another"
                " `model.attn_implementation` or `model.dtype`"
            ),
        )


def sum_scores(scores: Sequence[RowScore]) -> SplitScore:
    """The score of a split, weighted by tokens."""
    return SplitScore(
        num_rows=len(scores),
        num_completion_tokens=sum(score.num_completion_tokens for score in scores),
        num_tokens=sum(score.num_tokens for score in scores),
        num_bytes=sum(score.num_bytes for score in scores),
        completion_nll_sum=math.fsum(score.completion_nll_sum for score in scores),
        template_nll_sum=math.fsum(score.template_nll_sum for score in scores),
        nll_sum=math.fsum(score.nll_sum for score in scores),
    )
