"""A recipe text may be anybody's: it holds no secret, and reading it takes no longer than reading a
recipe does.
"""

from __future__ import annotations

import pytest

from runner.errors import RecipeError
from runner.recipe.parse import Recipe, parse_recipe
from runner.recipe.problems import find_hazards
from tests.conftest import RECIPE_TEXT
from tests.test_secrets import TOKENS

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)
# Each is refused within a second; without its limit it takes minutes, gigabytes, or the process.
BOMBS = {
    "aliases": (LAUGHS, "more than 10,000 values, aliases expanded"),
    "merge keys": (
        "m0: &m0 {x: 1}\n"
        + "".join(f"m{n}: &m{n} {{<<: [*m{n - 1}, *m{n - 1}]}}\n" for n in range(1, 40)),
        "aliases expanded",
    ),
    "a circle": ("z: &z [*z]\n", "inside the value that it repeats"),
    "a circle of keys": ("z: &z {? *z : 1}\n", "inside the value that it repeats"),
    "brackets": ("z: " + "[" * 90_000, "nested more than 100 levels"),
    "braces": ("z: " + "{a: " * 90_000, "nested more than 100 levels"),
    "question marks": ("? " * 400_000, "nested more than 100 levels"),
    "a deep block": ("z:\n" + "".join(" " * n + "a:\n" for n in range(1, 900)), "recursion|nested"),
    "a number to base 60": ("z: 1" + ":1" * 400_000, "number of 1,000 or more characters"),
    "a number of digits": ("z: " + "9" * 900_000, "number of 1,000 or more characters"),
    "an infinite exponent": ("z: 1e999999999", "expected a finite number"),
    "many items": ("z:\n" + "- a\n" * 200_000, "more than 10,000 values"),
    "many unknown keys": ("".join(f"kee{n}: 1\n" for n in range(4000)), "and 3950 more"),
    "too long": ("# " + "x" * 1_000_000, "longer than 1,000,000 bytes"),
    "a Python object": (
        "z: !!python/object/apply:os.system ['true']",
        "could not determine a constructor",
    ),
    "a zero byte": ("z: \0", "unacceptable character|control characters"),
    "an escape sequence": ('z: "\\e[2J"', r"holds the character \\x1b"),
    "an escape sequence in a key": ('"\\e[2J": 1', r"a key holds the character \\x1b"),
    "text that runs backwards": ('z: "\\u202e"', r"holds the character \\u202e"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_in_words(name: str) -> None:
    text, words = BOMBS[name]
    with pytest.raises(RecipeError, match=words) as caught:
        parse_recipe(RECIPE_TEXT + text, where="bomb.yaml")
    assert len(str(caught.value)) < 10_000 and "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        "[" * 50_000,
        "run.axes.x=" + "[" * 50_000,
        "run.axes.x=" + "[" * 15_000,
        "run.axes.x=1" + ":1" * 7_000,
    ]
    + [
        f"{'a.' * 7_000}a=1",
        f"run.axes.x={{{LAUGHS.replace(chr(10), ',')}}}",
        "model.path=" + "${loss}" * 20_000,
    ],
)
def test_an_override_is_no_way_around(override: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(RECIPE_TEXT, where="r.yaml", overrides=[override])
    assert len(str(caught.value)) < 50_000


def test_aliases_of_a_sensible_size_are_welcome() -> None:
    text = RECIPE_TEXT.replace("seed: 7", "seed: &seed 7").replace("seed: 3", "seed: *seed")
    recipe = parse_recipe(text.replace("max_length: 160", "max_length: *seed"), where="r.yaml")
    assert isinstance(recipe, Recipe) and recipe.training.seed == recipe.data.max_length == 7


@pytest.mark.parametrize("kind", TOKENS)
def test_a_recipe_with_a_secret_is_refused_by_name_and_never_by_value(kind: str) -> None:
    token = TOKENS[kind]
    first_line = token.splitlines()[0]
    places = {
        "a value": (RECIPE_TEXT.replace("path: models/gemma", f"path: '{token}'"), [], "line 2"),
        "a tag": (RECIPE_TEXT + f"tracking: {{tags: ['{token}']}}\n", [], "tracking"),
        "an axis": (RECIPE_TEXT.replace("model: gemma,", f"model: '{token}',"), [], "line 1"),
        "an axis's name": (RECIPE_TEXT.replace("model: gemma,", f"'{token}': 1,"), [], "line 1"),
        "a comment": (RECIPE_TEXT + f"# {token}\n", [], "line "),
        "no YAML": (f"{{ {token}", [], "line 1"),
        "an override": (RECIPE_TEXT, [f"model.path={token}"], "model.path"),
        "an override's key": (RECIPE_TEXT, [f"{token}=1"], "override"),
        "an option": (
            RECIPE_TEXT
            + f"# x\ncheckpoints: {{remote: {{url: s3://b, options: {{a: '{token}'}}}}}}\n",
            [],
            "line ",
        ),
    }
    for place, (text, overrides, words) in places.items():
        with pytest.raises(RecipeError) as caught:
            parse_recipe(text, where="r.yaml", overrides=overrides)
        message = str(caught.value)
        assert first_line not in message and "hunter22" not in message, place
        assert kind in message and words in message and "environment" in message, (place, message)


def test_a_secret_in_disguise_is_found_once_it_is_put_together() -> None:
    token = TOKENS["a Hugging Face token"]
    for disguised in (f"\\x68{token[1:]}", f"\\x68{token[1:]} ${{a}}"):
        text = RECIPE_TEXT + f'tracking: {{project: "{disguised}"}}\n'
        assert token not in text
        with pytest.raises(RecipeError, match="a Hugging Face token") as caught:
            parse_recipe(text, where="r.yaml")
        assert token not in str(caught.value)


def test_the_value_of_a_secret_variable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")
    with pytest.raises(RecipeError, match="the value of the environment variable WANDB_API_KEY"):
        parse_recipe(
            RECIPE_TEXT,
            where="r.yaml",
            overrides=["tracking.project=0123456789abcdef0123456789abcdef01234567"],
        )


def test_generated_recipes_hold_no_hazard() -> None:
    assert find_hazards(RECIPE_TEXT, ["training.learning_rate=1e-4"]) == []
