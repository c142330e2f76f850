"""Figures draw the content of the report, count what they leave out, and always look the same."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from runner.files import write_jsonl_atomic
from runner.report.curves import MAX_CURVES, draw_curves, load_curve
from runner.report.drawing import PALETTE, draw_dots, drawing_figure
from runner.report.effects import Report
from runner.report.figures import (
    draw_forests,
    draw_interactions,
    draw_scatters,
)
from runner.report.row_pages import build_row_comparisons
from runner.run.paths import RunPaths
from tests.support.pages import make_interval, make_report


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return make_report(tmp_path_factory.mktemp("runs"))


def list_texts(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def test_effects_are_drawn_where_they_are(report: Report) -> None:
    [drawing] = draw_forests(report)
    [axes] = drawing.figure.axes
    points = [line for line in axes.lines if len(line.get_xdata()) == 1]
    shown = [effect for effects in report.effects for effect in effects.shown]
    drawn = [float(line.get_xdata()[0]) for line in points]
    assert drawn == [effect.interval.estimate for effect in shown if effect.interval is not None]
    bars = [tuple(line.get_xdata()) for line in axes.lines if len(line.get_xdata()) == 2]
    assert bars[0] == pytest.approx(shown[0].interval.bounds)  # type: ignore[union-attr]
    assert axes.get_xlabel() == (
        "difference in nats per completion token\nleft of 0 the second is better"
    )
    texts = list_texts(drawing.as_svg())
    assert "loss: full → completion" in texts and "   at count=60" in [
        f"   {t.strip()}" for t in texts
    ]


def test_an_interval_over_rows_is_dotted_and_what_is_below_noise_is_grey(report: Report) -> None:
    effects = report.effects[0]
    assert effects.pooled is not None
    weak = replace(effects.pooled, interval=make_interval(0.01, kind="rows"), is_below_noise=True)
    changed = replace(effects, pooled=weak, simple={}, cells=())
    [drawing] = draw_forests(replace(report, effects=(changed,)))
    svg = drawing.as_svg()
    assert "stroke-dasharray" in svg and "s-greyed" in svg
    assert "1 below the noise floor" in drawing.alternative


def test_interactions_are_drawn_within_each_facet(report: Report) -> None:
    """No point is a mean over models, whose tokens differ; a facet without both lines has none."""
    [drawing] = draw_interactions(report)
    titles = [axes.get_title("left").strip() for axes in drawing.figure.axes]
    assert sorted(titles) == [
        "count=180",
        "count=60",
        "loss=completion",
        "loss=full",
        "model=gemma",
        "model=llama",
    ]
    axes = drawing.figure.axes[titles.index("model=gemma")]
    full = next(line for line in axes.lines if line.get_color() == PALETTE[0])
    cells = {(cell.axes["loss"], cell.axes["count"]): cell for cell in report.cells[:4]}
    expected = [
        sum(cells["full", count].scores["nll_per_completion_token"].values()) / 3
        for count in (60, 180)
    ]
    assert list(full.get_ydata()) == pytest.approx(expected)


def test_a_figure_has_forty_curves_at_most(tmp_path: Path) -> None:
    report = make_report(tmp_path, counts=tuple(range(10, 90, 10)), missing=0)
    drawings = draw_curves(report)
    numbers = [
        sum(len(line.get_xdata()) > 1 for axes in drawing.figure.axes for line in axes.lines)
        for drawing in drawings
    ]
    assert sum(numbers) == len(report.rows) == 96 and max(numbers) <= MAX_CURVES


def test_curves_mark_the_best_step_and_early_stops(report: Report) -> None:
    [drawing] = draw_curves(report)
    markers = [
        (line.get_marker(), float(line.get_xdata()[0]))
        for axes in drawing.figure.axes
        for line in axes.lines
        if len(line.get_xdata()) == 1
    ]
    scored = [row for row in report.rows if row.state == "completed"]
    best = sorted(float(row.best_step or 0) for row in scored)
    assert sorted(step for marker, step in markers if marker == "o") == best
    stopped = sum(row.stop_reason == "early_stopping" for row in scored)
    assert sum(marker == "x" for marker, _ in markers) == stopped > 0
    assert f"{stopped} stopped early" in drawing.alternative
    last = sum(row.best_step == 24 for row in scored)
    assert f"In {last} runs the last step was the best" in drawing.caption


def test_a_curve_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    report = make_report(tmp_path, models=("gemma",), counts=(60,), seeds=(1,), missing=0)
    first, second = report.rows
    assert len(load_curve(first)) == 6, "without step 0"
    assert first.run_dir is not None and second.run_dir is not None
    RunPaths(first.run_dir).metrics_path.write_text("{\n}\n")
    assert load_curve(first) == []
    rows = [{"step": 1, "split": "validation", "nll_per_completion_token": None}, {"step": 2}]
    write_jsonl_atomic(RunPaths(second.run_dir).metrics_path, rows)
    assert load_curve(second) == [] and draw_curves(report) == []


def test_scatters_have_a_dot_for_each_row(report: Report) -> None:
    comparisons = build_row_comparisons(report)
    drawings = draw_scatters(comparisons)
    panels = [axes for drawing in drawings for axes in drawing.figure.axes]
    assert len(panels) == len(comparisons) == 9
    for axes, one in zip(panels, comparisons, strict=True):
        [dots] = axes.patches
        points = dots.get_path().vertices[::2]
        assert points[:, 0] == pytest.approx(one.reference_scores)
        assert points[:, 1] == pytest.approx(one.compared_scores)
        assert axes.get_xlim() == axes.get_ylim()


def test_hundreds_of_dots_are_small() -> None:
    from runner.report.drawing import Drawing

    with drawing_figure(4, 3) as figure:
        axes = figure.subplots()
        draw_dots(axes, range(500), range(500), color=PALETTE[0])
        axes.set_xlim(0, 500)
        axes.set_ylim(0, 500)
    svg = Drawing("dots", "Dots", "500 dots.", "", figure).as_svg()
    assert svg.count(" L ") >= 500 and len(svg) < 40_000 and "<use" in svg
    assert 'class="s-c0"' in svg and "style=" not in svg and "<style" not in svg
