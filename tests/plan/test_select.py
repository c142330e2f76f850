"""The recipes that a command applies to: files, folders, globs, run directories, filtered
by axes.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from runner.cli.main import main
from runner.errors import RefusedError, RunnerError
from runner.plan.select import Selected, select_recipes
from runner.recipe.parse import parse_recipe
from tests.support.fake_launcher import FakeLauncher, fake

__all__ = ["fake"]


def names_of(*arguments: str, where: tuple[str, ...] = ()) -> list[str]:
    return [one.recipe.run.name for one in select(*arguments, where=where)]


def select(*arguments: str, where: tuple[str, ...] = ()) -> list[Selected]:
    return select_recipes(arguments, Path("runs"), where)


def test_files_folders_and_globs_in_the_order_given_and_each_once(fake: FakeLauncher) -> None:
    fake.add("a", "bb", "c")
    assert names_of("recipes/toy") == names_of("recipes") == ["a", "bb", "c"]
    assert names_of("recipes/toy/c.yaml", "recipes/toy/a.yaml") == ["c", "a"]
    assert names_of("recipes/toy/[ac].yaml") == names_of("recipes/**/[ac].yaml") == ["a", "c"]
    assert names_of("recipes/*") == ["a", "bb", "c"], "a glob may name folders"
    assert names_of("recipes/toy/bb.yaml", "recipes/toy", "./recipes/toy/../toy") == [
        "bb",
        "a",
        "c",
    ]


def test_a_run_directory_stands_for_its_recipe(fake: FakeLauncher) -> None:
    fake.add("a", "b")
    assert main(["sweep", "recipes/toy"]) == 0
    assert main(["launch", "recipes/toy/a.yaml", "loss=completion"]) == 0
    everything = ["a", "a--loss-completion", "b"]
    assert names_of("runs/toy/a") == ["a"]
    assert names_of("runs") == names_of("runs/toy") == names_of("runs/toy/*") == everything
    assert [one.source_path for one in select("recipes", "runs")] == [
        Path("recipes/toy/a.yaml"),
        Path("recipes/toy/b.yaml"),
        Path("runs/toy/a--loss-completion"),
    ], "a recipe file says more than its run directory"


def test_what_lies_inside_a_run_or_is_hidden_is_no_recipe(fake: FakeLauncher) -> None:
    fake.add("a")
    assert main(["sweep", "recipes/toy"]) == 0
    (fake.paths("a").model_dir).mkdir()
    (fake.paths("a").model_dir / "card.yaml").write_text("colour: red")
    (fake.root / "recipes" / ".drafts").mkdir()
    (fake.root / "recipes" / ".drafts" / "x.yaml").write_text("colour: red")
    assert names_of("recipes") == names_of("runs") == ["a"]


def test_two_recipes_may_not_share_a_run_directory(fake: FakeLauncher) -> None:
    fake.add("a")
    other = fake.root / "recipes" / "toy" / "other.yaml"
    other.write_text(
        (fake.root / "recipes" / "toy" / "a.yaml")
        .read_text()
        .replace("loss: full", "loss: completion")
    )
    with pytest.raises(
        RefusedError,
        match=r"a\.yaml and recipes/toy/other\.yaml are both named 'a' in the grid 'toy'",
    ):
        select("recipes")


def test_every_wrong_recipe_is_named_at_once(fake: FakeLauncher) -> None:
    fake.add("a", "b", "c")
    for name in ("a", "c"):
        path = fake.root / "recipes" / "toy" / f"{name}.yaml"
        path.write_text(path.read_text().replace("loss: full", "loss: ful"))
    with pytest.raises(RunnerError) as caught:
        select("recipes")
    message = str(caught.value)
    assert message.startswith("2 recipes have problems")
    assert (
        "recipes/toy/a.yaml has 1 problem" in message
        and "recipes/toy/c.yaml has 1 problem" in message
    )


@pytest.mark.parametrize(
    "argument", ["recipes/toi", "recipes/toy/x.yaml", "recipes/*.yaml", "fake/told", ""]
)
def test_an_argument_that_names_nothing_is_an_error(argument: str, fake: FakeLauncher) -> None:
    fake.add("a")
    if not argument:
        (fake.root / "recipes" / "toy" / "a.yaml").unlink()
        (fake.root / "cpu.yaml").unlink()
    with pytest.raises(RunnerError, match="no recipe, run or grid is named"):
        select(argument or ".")


def test_a_near_miss_is_suggested(fake: FakeLauncher) -> None:
    fake.add("a")
    with pytest.raises(RunnerError, match=r"did you mean recipes/toy\?"):
        select("recipes/toi")


def test_axes_narrow_down(fake: FakeLauncher) -> None:
    fake.add("a", "bb", "dd", "ccc")
    assert names_of("recipes", where=("size=2",)) == ["bb", "dd"]
    assert names_of("recipes", where=("size=1,3",)) == ["a", "ccc"]
    assert names_of("recipes", where=("size=1,2", "size=2")) == ["bb", "dd"]


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        ("size", "is not of the form axis=value"),
        ("size=", "is not of the form axis=value"),
        ("colour=red", "no selected recipe has the axis 'colour'\n\nhint: the axes are size"),
        ("size=7", "the axis 'size' has no value '7'\n\nhint: its values are 1"),
        ("size=1,7", "the axis 'size' has no value '7'"),
    ],
)
def test_a_condition_that_matches_nothing_is_an_error(
    condition: str, words: str, fake: FakeLauncher
) -> None:
    fake.add("a")
    with pytest.raises(RunnerError) as caught:
        select("recipes", where=(condition,))
    assert words in str(caught.value)


def test_conditions_that_exclude_each_other_are_told_as_such(fake: FakeLauncher) -> None:
    fake.add("a", "bb")
    with pytest.raises(RunnerError, match="no selected recipe has all of size=1 and size=2"):
        select("recipes", where=("size=1", "size=2"))


def test_axis_values_are_written_as_in_yaml(fake: FakeLauncher) -> None:
    fake.add("a", "bb")
    for name, value in (("a", "true"), ("bb", "null")):
        path = fake.root / "recipes" / "toy" / f"{name}.yaml"
        path.write_text(path.read_text().replace(f"{{size: {len(name)}}}", f"{{size: {value}}}"))
        assert parse_recipe(path.read_text(), where=name).run.axes["size"] in (True, None)
    assert names_of("recipes", where=("size=true",)) == ["a"]


def test_numbers_of_an_axis_are_compared_as_numbers(fake: FakeLauncher) -> None:
    fake.add("a", "b", "c", "d")
    for name, axes in (
        ("a", "{training.learning_rate: 1e-3, tied: true}"),
        ("b", "{training.learning_rate: 0.01, tied: false}"),
        ("c", "{training.learning_rate: 3, tied: true}"),
        ("d", "{training.learning_rate: '1e-3', tied: 1}"),
    ):
        path = fake.root / "recipes" / "toy" / f"{name}.yaml"
        path.write_text(path.read_text().replace("axes: {size: 1}", f"axes: {axes}"))

    def find(*where: str) -> list[str]:
        return names_of("recipes/toy", where=where)

    lr = "training.learning_rate"
    assert find(f"{lr}=0.001") == find(f"{lr}=0.0010") == find(f"{lr}=1.0e-03") == ["a"]
    assert find(f"{lr}=1e-3") == ["a", "d"], "a text is taken literally"
    assert find("learning_rate=3.0") == find("training.learning_rate=3") == ["c"]
    assert find("learning_rate=1e-2,3") == find("x.training.learning_rate=.01,3") == ["b", "c"]
    assert (
        find("tied=true") == ["a", "c"]
        and find("tied=1.0") == ["d"]
        and find("tied=false") == ["b"]
    )
    for wrong in ("nan", "inf", "0.0011", "sNaN", "True", ""):
        with pytest.raises(RunnerError) as caught:
            find(f"{lr}={wrong or 'x'}")
        assert caught.value.hint == "its values are 0.001, 0.01, 3, 1e-3"


def test_a_part_of_the_name_of_two_axes_is_not_guessed(fake: FakeLauncher) -> None:
    fake.add("a")
    path = fake.root / "recipes" / "toy" / "a.yaml"
    path.write_text(path.read_text().replace("{size: 1}", "{data.seed: 1, training.seed: 1}"))
    with pytest.raises(RunnerError, match="could be any of the axes data"):
        names_of("recipes/toy", where=("seed=1",))


def test_overrides_make_a_variant_of_each_recipe(fake: FakeLauncher) -> None:
    fake.add("a", "b")
    path = fake.root / "recipes" / "toy" / "b.yaml"
    path.write_text(path.read_text().replace("loss: full", "loss: completion"))
    found = select_recipes(["toy"], Path("runs"), overrides=["loss=completion"])
    assert [one.full_name for one in found] == ["toy/a--loss-completion", "toy/b"]
    assert [one.paths.run_dir.name for one in found] == ["a--loss-completion", "b"]
    assert [one.overrides for one in found] == [("loss=completion",), ()]
    assert [one.idle_overrides for one in found] == [(), ("loss=completion",)]
    assert main(["sweep", "toy/a"]) == 0
    with pytest.raises(RefusedError, match="runs/toy/a is a run directory: overrides such as"):
        select_recipes(["runs/toy/a"], Path("runs"), overrides=["loss=completion"])
