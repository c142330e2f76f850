"""Trees become the paths that a reader would choose, and every message is in one or counted under
one reason.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.data.tasks.oasst1 import Oasst1Task, TreePath, TreePaths, read_trees
from runner.errors import DataError

BEST = Oasst1Task(name="oasst1")
ALL = Oasst1Task(name="oasst1", paths="all")


def message(message_id: str, parent_id: str | None = None, **changes: Any) -> dict[str, Any]:
    """One row as the hub has it; ids count the turns, so their length gives the role."""
    return {
        "message_id": message_id,
        "parent_id": parent_id,
        "user_id": "u",
        "created_date": "2023-02-05T14:23:50.983374+00:00",
        "text": f"text of {message_id}",
        "role": "prompter" if len(message_id) % 2 else "assistant",
        "lang": "en",
        "review_count": 3,
        "review_result": True,
        "deleted": False,
        "rank": None,
        "synthetic": False,
        "model_name": None,
        "detoxify": None,
        "message_tree_id": message_id[0],
        "tree_state": "ready_for_export",
        "emojis": None,
        "labels": None,
    } | changes


# a - ab (rank 1)
#   - ac (rank 0) - acd (nobody answers)
#                 - ace - acef
#   - ag (no rank)
TREE = [
    message("a"),
    message("ab", "a", rank=1),
    message("ac", "a", rank=0),
    message("acd", "ac", rank=0),
    message("ace", "ac", rank=1),
    message("acef", "ace"),
    message("ag", "a"),
]


def read(rows: list[dict[str, Any]], task: Oasst1Task = BEST) -> TreePaths:
    return read_trees([(f"m.jsonl line {n}", row) for n, row in enumerate(rows, start=1)], task)


def name_path(path: TreePath) -> str:
    return " ".join(one.message_id for one in path.messages)


def names(rows: list[dict[str, Any]], task: Oasst1Task = BEST) -> list[str]:
    return [name_path(path) for path in read(rows, task).paths]


def nest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same trees as the nested export has them."""

    def build(row: dict[str, Any]) -> dict[str, Any]:
        own = {
            key: value for key, value in row.items() if key not in ("message_tree_id", "tree_state")
        }
        return own | {
            "replies": [build(reply) for reply in rows if reply["parent_id"] == row["message_id"]]
        }

    return [
        {
            "message_tree_id": row["message_tree_id"],
            "tree_state": row["tree_state"],
            "prompt": build(row),
        }
        for row in rows
        if row["parent_id"] is None
    ]


def test_the_best_path_and_all_paths() -> None:
    assert names(TREE) == ["a ac ace acef"]
    assert read(TREE).left_out == {
        "messages that no assistant answers": 1,
        "replies outside the best-ranked path": 2,
    }
    assert names(TREE, ALL) == ["a ac ace acef", "a ab", "a ag"]
    assert read(TREE, ALL).left_out == {"messages that no assistant answers": 1}


def test_nested_trees_and_rows_in_any_order_are_the_same() -> None:
    other = [message(row["message_id"].replace("a", "z"), row["parent_id"]) for row in TREE[:1]]
    rows = [*TREE, *other, message("zy", "z", lang="de"), message("zx", "z")]
    shuffled = random.Random(1).sample(rows, len(rows))
    for task in (BEST, ALL):
        expected = read(rows, task)
        for same in (nest(rows), shuffled, [*nest(rows[:7]), *rows[7:]]):
            found = read(same, task)
            assert {name_path(path) for path in found.paths} == {
                name_path(path) for path in expected.paths
            }
            assert found.left_out == expected.left_out


def test_roles_and_groups_of_the_conversations() -> None:
    rows = [(f"m.jsonl line {n}", row) for n, row in enumerate(TREE, start=1)]
    first, *others = ALL.build_examples(rows).examples
    assert [one["role"] for one in first.messages] == ["user", "assistant", "user", "assistant"]
    assert [one["content"] for one in first.messages][-1] == "text of acef"
    assert (first.where, first.group, first.references) == ("m.jsonl line 1 (message a)", "a", ())
    assert {other.group for other in others} == {"a"}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"deleted": True}, "deleted messages"),
        ({"review_result": False}, "messages that reviewers rejected"),
        ({"review_result": None}, "messages without a finished review"),
        ({"lang": "de"}, "messages in another language"),
    ],
)
def test_nothing_below_a_message_that_is_left_out_is_used(
    changes: dict[str, Any], reason: str
) -> None:
    rows = [row | changes if row["message_id"] == "ac" else row for row in TREE]
    assert names(rows) == ["a ab"]
    assert read(rows).left_out == {
        reason: 1,
        "messages below one that is left out": 3,
        "replies outside the best-ranked path": 1,
    }


def test_what_the_recipe_allows_is_used() -> None:
    unreviewed = [row | {"review_result": None} for row in TREE]
    assert names(unreviewed) == []
    assert names(unreviewed, Oasst1Task(name="oasst1", include_unreviewed=True)) == [
        "a ac ace acef"
    ]
    german = [row | {"lang": "de"} for row in TREE]
    assert names(german) == []
    for languages in ((), ("en", "de")):
        assert names(german, Oasst1Task(name="oasst1", languages=languages)) == ["a ac ace acef"]


@pytest.mark.parametrize(
    ("state", "is_ready", "is_unreviewed_used"),
    [
        ("ready_for_export", True, True),
        (None, True, True),
        ("growing", False, True),
        ("ranking", False, True),
        ("aborted_low_grade", False, False),
        ("halted_by_moderator", False, False),
    ],
)
def test_the_state_of_a_tree(state: str | None, is_ready: bool, is_unreviewed_used: bool) -> None:
    rows = [row | {"tree_state": state} for row in TREE]
    assert bool(names(rows)) == is_ready
    assert (
        bool(names(rows, Oasst1Task(name="oasst1", include_unreviewed=True))) == is_unreviewed_used
    )
    if not is_ready:
        assert sum(read(rows).left_out.values()) == len(rows)


def test_replies_without_a_rank_come_last_and_equals_by_id() -> None:
    rows = [message("a"), message("ac", "a"), message("ab", "a"), message("ad", "a", rank=5.0)]
    assert names(rows) == ["a ad"]
    assert names(rows[:3]) == ["a ab"]


def test_orphans_and_circles_are_counted() -> None:
    lost = [message("xy", "x"), message("xyz", "xy")]
    circle = [
        message("p", "pr"),
        message("pq", "p"),
        message("pr", "pqs"),
        message("pqs", "pq"),
        message("s", "s"),
    ]
    found = read([*TREE[:2], *lost, *circle])
    assert [name_path(path) for path in found.paths] == ["a ab"]
    assert found.left_out == {
        "messages whose parent is missing, or below one": 2,
        "messages that reply to each other in a circle": 5,
    }


def test_a_message_that_stands_twice_counts_once_unless_it_differs() -> None:
    found = read([*TREE, *TREE[:3]])
    assert len(found.paths) == 1 and found.left_out["messages that occur twice"] == 3
    with pytest.raises(
        DataError, match=r"^m\.jsonl line 8: the message id 'ab' is taken by another in .* line 2"
    ):
        read([*TREE, message("ab", "a", text="other")])


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"role": "system"}, "the role is 'system', expected one of prompter, assistant"),
        ({"text": None}, "column `text` should be a text, found nothing"),
        ({"message_id": 3}, "column `message_id` should be a text, found a number"),
        ({"parent_id": 3}, "column `parent_id` should be a text"),
        ({"rank": "best"}, "column `rank` should be a number or null"),
        ({"deleted": "no"}, "column `deleted` should be true, false or null"),
    ],
)
def test_a_wrong_field_is_refused_by_row(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(DataError, match=rf"^m\.jsonl line 2: {what}"):
        read([message("a"), message("ab", "a") | changes])


@pytest.mark.parametrize(
    "row", [{"text": "x"}, ["x"], {"prompt": "x"}, {"prompt": {"replies": []}}]
)
def test_rows_of_another_data_set_are_refused(row: Any) -> None:
    with pytest.raises(DataError, match=r"^m\.jsonl line 1: "):
        read([row])


@settings(deadline=None)
@given(st.data())
def test_every_message_is_used_or_counted_once(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 14))
    rows = []
    for number in range(size):
        # `size` is missing; later ones and itself make circles
        parent = data.draw(st.none() | st.integers(0, size))
        rows.append(
            message("m")
            | {
                "message_id": str(number),
                "parent_id": None if parent is None else str(parent),
                "role": data.draw(st.sampled_from(["prompter", "assistant"])),
                "lang": data.draw(st.sampled_from(["en", "en", "en", "de"])),
                "deleted": data.draw(st.sampled_from([False, False, False, True])),
                "review_result": data.draw(st.sampled_from([True, True, None, False])),
                "rank": data.draw(st.none() | st.integers(0, 3)),
                "tree_state": data.draw(st.sampled_from(["ready_for_export", "growing"])),
            }
        )
    task = Oasst1Task(
        name="oasst1",
        paths=data.draw(st.sampled_from(["best", "all"])),
        include_unreviewed=data.draw(st.booleans()),
        languages=data.draw(st.sampled_from([(), ("en",)])),
    )
    found = read(rows, task)
    used = {one.message_id for path in found.paths for one in path.messages}
    assert len(used) + sum(found.left_out.values()) == size
    for path in found.paths:
        assert path.messages[-1].role == "assistant" and path.messages[0].parent_id is None
        assert not any(one.deleted or one.review_result is False for one in path.messages)


def test_keys_of_nested_messages_are_known_or_refused() -> None:
    reply = {"message_id": "b", "text": "b", "role": "assistant", "review_result": True}
    root = {"message_id": "a", "text": "a", "role": "prompter", "review_result": True, "lang": "en"}
    tree = {
        "message_tree_id": "a",
        "tree_state": "ready_for_export",
        "prompt": {**root, "replies": [{**reply, "lang": "en", "emojis": {"+1": 1}}]},
    }
    found = BEST.build_examples([("row 1", tree)])
    assert len(found.examples) == 1 and found.unused == {"messages.emojis": 1}
    tree["prompt"]["replies"][0]["weight"] = 0
    with pytest.raises(DataError, match="row 1: the message key `weight` is not used"):
        BEST.build_examples([("row 1", tree)])
