"""Scores are those of a straightforward computation, for any batch size."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from runner.data.rows import Row, build_samples
from runner.data.stored_rows import StoredRows, write_shard
from runner.data.tokenizer import load_tokenizer
from runner.errors import DivergedError, RunnerError
from runner.sft.evaluate import RowScore, refuse_impossible, score_rows, sum_scores
from tests.conftest import Project
from tests.support.token_rows import make_row

FAMILIES = ("gemma", "gemma2", "llama", "mistral")
PAD = 0

# Log-probabilities come out of the model in float32. Measured over the four families and batches of
# 1, 8 and 64 rows, against one row at a time in float64: at most 4.1e-8 of a row's sum and 4.4e-9
# of a split's; ten times that. Batches of 1 and of 8 or 64 rows: equal to the last bit, but for 2
# of 21 rows of gemma2, which differ by 3.8e-8.
ROW_TOLERANCE = 4e-7
SPLIT_TOLERANCE = 4e-8


@pytest.fixture(scope="module")
def models(tiny_model: Callable[[str], Path]) -> Callable[[str], tuple[Any, Any]]:
    """`family -> (model with TRL's head, plain model)`."""

    def load(family: str) -> tuple[Any, Any]:
        fused, plain = (
            AutoModelForCausalLM.from_pretrained(tiny_model(family), attn_implementation="eager")
            for _ in range(2)
        )
        add_fused_lm_head(fused, outputs=("log_probs", "entropy", "is_top1"))
        return fused.train(), plain.eval()

    return load


def make_rows(count: int) -> list[Row]:
    """Rows of random tokens and different lengths, some with two completions."""
    generator = random.Random(5)
    rows = []
    for number in range(count):
        length = generator.randint(6, 70)
        ids = tuple(generator.randrange(3, 500) for _ in range(length))
        spans = [(length - 3, length - 1)]
        if length > 20:
            spans.insert(0, (5, 11))
        rows.append(make_row(f"row-{number}", ids, *spans, num_bytes=length))
    return rows


@torch.no_grad()
def score_plainly(model: Any, row: Row) -> tuple[float, float]:
    ids = torch.tensor([row.input_ids])
    log_probs = torch.log_softmax(model(input_ids=ids).logits[0].double(), dim=-1)
    nll = [-log_probs[at - 1, row.input_ids[at]].item() for at in range(1, len(row.input_ids))]
    return math.fsum(
        nll[at - 1] for span in row.spans for at in range(span.start, span.end)
    ), math.fsum(nll)


def score(
    model: Any,
    rows: Sequence[Row],
    batch_size: int,
    sign_of_life: Callable[[], None] = lambda: None,
) -> list[RowScore]:
    return score_rows(
        model,
        rows,
        batch_size=batch_size,
        pad_token_id=PAD,
        accelerator=Accelerator(cpu=True),
        sign_of_life=sign_of_life,
    )


def test_each_batch_is_a_sign_of_life(models: Callable[[str], Any]) -> None:
    signs: list[None] = []
    score(models("gemma")[0], make_rows(21), 8, lambda: signs.append(None))
    assert len(signs) == 3


def test_scores_of_stored_rows_build_each_row_once(
    models: Callable[[str], Any], tmp_path: Path
) -> None:
    """Their lengths are known without: the rows of a large split would be built twice."""
    built: list[int] = []

    class Counted(StoredRows):
        def __getitem__(self, index: Any) -> Any:
            built.append(index)
            return super().__getitem__(index)

    model, rows = models("gemma")[0], make_rows(7)
    write_shard(tmp_path / "rows.arrow", rows, with_columns=False)
    stored = Counted([tmp_path / "rows.arrow"])
    assert score(model, stored, 3) == score(model, rows, 3)
    assert sorted(built) == list(range(7))


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_plain_logits_for_any_batch_size(
    models: Callable[[str], Any], family: str
) -> None:
    fused, plain = models(family)
    rows = make_rows(21)
    expected = [score_plainly(plain, row) for row in rows]
    for batch_size in (1, 8, 64):
        scores = score(fused, rows, batch_size)
        assert [one.row_id for one in scores] == [row.row_id for row in rows], (
            "in the order of the rows"
        )
        for one, (completion_nll_sum, nll_sum) in zip(scores, expected, strict=True):
            assert one.completion_nll_sum == pytest.approx(completion_nll_sum, rel=ROW_TOLERANCE)
            assert one.nll_sum == pytest.approx(nll_sum, rel=ROW_TOLERANCE)
        split = sum_scores(scores)
        assert split.nll_sum == pytest.approx(
            math.fsum(nll for _, nll in expected), rel=SPLIT_TOLERANCE
        )
        assert split.completion_nll_sum == pytest.approx(
            math.fsum(nll for nll, _ in expected), rel=SPLIT_TOLERANCE
        )
        assert split.num_tokens == sum(len(row.input_ids) - 1 for row in rows)
        assert split.num_completion_tokens == sum(row.num_completion_tokens for row in rows)
        assert (
            split.nll_per_completion_token == split.completion_nll_sum / split.num_completion_tokens
        )
        assert split.nll_per_token == split.nll_sum / split.num_tokens
    assert fused.training, "the mode of the model is restored"


def test_what_is_not_in_a_row_does_not_count(models: Callable[[str], Any]) -> None:
    """A pad token inside a row is a token; one behind it is not; a first token that is a completion
    has no score.
    """
    fused, plain = models("llama")
    row = make_row("one", (7, PAD, 9, PAD, 11), (0, 2), (3, 5))
    alone, beside = score(fused, [row], 1)[0], score(fused, [row, *make_rows(3)], 4)[0]
    nll = [score_plainly(plain, make_row("", row.input_ids, (at, at + 1)))[0] for at in (1, 3, 4)]
    for one in (alone, beside):
        assert (one.num_completion_tokens, one.num_tokens) == (
            3,
            4,
        ) and row.num_completion_tokens == 3
        assert one.completion_nll_sum == pytest.approx(math.fsum(nll), rel=ROW_TOLERANCE)


def test_ends_of_turns_are_no_content_and_turns_of_weight_0_are_in_no_sum(
    models: Callable[[str], Any],
) -> None:
    fused, plain = models("llama")
    ids = (7, 8, 9, 10, 11, 12, 13)
    nll = {at: score_plainly(plain, make_row("", ids, (at, at + 1)))[0] for at in range(1, 7)}
    row = make_row("r", ids, (4, 7), untrained=[(1, 3)], num_bytes=5)
    (one,) = score(fused, [row], 1)
    assert one.completion_nll_sum == pytest.approx(nll[4] + nll[5] + nll[6], rel=ROW_TOLERANCE)
    assert one.template_nll_sum == pytest.approx(nll[6], rel=ROW_TOLERANCE)
    assert one.nll_sum == pytest.approx(sum(nll.values()) - nll[1] - nll[2], rel=ROW_TOLERANCE)
    assert (one.num_completion_tokens, one.num_tokens) == (3, 4)
    bits = (nll[4] + nll[5]) / math.log(2) / 5
    assert sum_scores([one]).bits_per_byte == pytest.approx(bits, rel=ROW_TOLERANCE)


def test_dropout_does_not_reach_a_score(models: Callable[[str], Any]) -> None:
    fused, _ = models("llama")
    for layer in fused.model.layers:
        layer.self_attn.attention_dropout = 0.5
    rows = make_rows(4)
    assert score(fused, rows, 2) == score(fused, rows, 2)


def test_mode_is_restored_after_a_failure(models: Callable[[str], Any]) -> None:
    fused, _ = models("llama")
    with pytest.raises(IndexError):
        score(fused, [make_row("bad", (3, 10**6), (1, 2))], 1)
    assert fused.training


def test_scores_of_real_rows_count_completions_with_their_end_of_turn(
    project: Project, models: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    project.add_model("gemma")
    monkeypatch.chdir(project.root)
    recipe = project.recipe()
    tokenizer = load_tokenizer(recipe.model)
    rows = build_samples(recipe.data, tokenizer).test.rows
    end_of_turn = tokenizer.convert_tokens_to_ids("<end_of_turn>")
    for row, one in zip(rows, score(models("gemma")[0], rows, 8), strict=True):
        assert row.input_ids[row.spans[-1].end - 1] == end_of_turn
        assert 0 < one.num_completion_tokens < one.num_tokens == len(row.input_ids) - 1
        assert 0 < one.completion_nll_sum < one.nll_sum


def test_split_sums_do_not_depend_on_the_order_of_rows() -> None:
    rows = [
        RowScore(str(n), "group", 10.0 ** (n % 17), 10.0 ** (n % 5), 1, 10.0 ** (-n % 23), 2, 3)
        for n in range(200)
    ]
    shuffled = random.Random(1).sample(rows, len(rows))
    assert sum_scores(rows) == sum_scores(shuffled)


def test_scores_that_cannot_be_are_refused_before_they_are_written() -> None:
    good = RowScore("a", "group", 2.0, 0.5, 3, 4.0, 9, 11)
    refuse_impossible([good, replace(good, template_nll_sum=-0.0)], "test", 4)
    for value in (math.nan, math.inf):
        with pytest.raises(DivergedError, match=r"the test score at step 4 is impossible: row b: "):
            refuse_impossible([good, replace(good, row_id="b", nll_sum=value)], "test", 4)
    for change in ({"nll_sum": -4.0}, {"completion_nll_sum": 5.0}, {"num_completion_tokens": 10}):
        with pytest.raises(
            RunnerError, match=r"row b: (nll_sum is -4\.0|.* more than the)"
        ) as found:
            refuse_impossible([good, replace(good, row_id="b", **change)], "validation", 8)
        assert not isinstance(found.value, DivergedError) and "attn_implementation" in str(
            found.value
        )


class Certain(torch.nn.Module):
    """Gives each token the same log-probability."""

    def __init__(self, log_prob: float) -> None:
        super().__init__()
        self.log_prob = log_prob

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        shape = (input_ids.shape[0], input_ids.shape[1] - 1)
        return type("Output", (), {"log_probs": torch.full(shape, self.log_prob)})


def test_a_probability_of_one_is_not_refused_for_its_rounding() -> None:
    row = make_row("a", (1, 2, 3, 4), (2, 4))
    for log_prob, nll_sum in ((3e-7, 0.0), (-1.0, 3.0), (0.5, -1.5)):
        [found] = score_rows(
            Certain(log_prob),
            [row],
            batch_size=1,
            pad_token_id=0,
            accelerator=Accelerator(cpu=True),
        )
        assert found.nll_sum == nll_sum
