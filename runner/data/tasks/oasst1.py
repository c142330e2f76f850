"""The task `oasst1`: turns paths through OpenAssistant's message trees into conversations, and
counts the messages that are left out.

Rows are single messages (as on the hub) or whole nested trees (as in the project's own export).
Schema and the states of a tree: https://huggingface.co/datasets/OpenAssistant/oasst1. Every message
that no path uses is counted under exactly one reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from pydantic import Field

from runner.data.tasks.base import (
    KEY_PREFIX,
    Example,
    Examples,
    Leftovers,
    Task,
    derive_row_key,
    describe_value,
    find_unused,
    read_text,
    require_object,
)
from runner.data.tasks.messages import ROLES
from runner.errors import DataError
from runner.strict import Text

READY: Final = "ready_for_export"
# States of trees that reviewers or moderators gave up; in all other states except `READY`, a tree
# is still being collected.
GIVEN_UP: Final = ("aborted_low_grade", "halted_by_moderator")
_MESSAGE_COLUMNS: Final = frozenset(
    {
        "message_id",
        "parent_id",
        "text",
        "role",
        "lang",
        "review_result",
        "deleted",
        "rank",
        "message_tree_id",
        "tree_state",
        "replies",
    }
)
SPEAKERS: Final = ("prompter", "assistant")


class Oasst1Task(Task):
    """Conversations from the message trees of OpenAssistant: one row per message, or one nested
    tree per row.
    """

    ORDER = 6
    RECOGNISED_BY = (
        (("message_id", "parent_id", "role", "text"), {}),
        (("message_tree_id", "prompt"), {}),
    )
    RECOGNITION_ORDER = 2
    BOOKKEEPING = (
        "user_id",
        "created_date",
        "review_count",
        "synthetic",
        "model_name",
        "detoxify",
        "emojis",
        "labels",
        "events",
        "origin",
    )

    name: Literal["oasst1"]
    languages: tuple[Text, ...] = Field(
        default=("en",),
        description="Use only paths whose messages are all in these languages. []: all languages.",
        examples=[["en", "de"]],
    )
    paths: Literal["best", "all"] = Field(
        default="best",
        description=(
            "best: one conversation per tree, with the best-ranked reply at every turn. all: one"
            " conversation per leaf."
        ),
    )
    include_unreviewed: bool = Field(
        default=False,
        description=(
            "Also use messages without a finished review. Deleted messages are never used."
        ),
        examples=[True],
    )

    def build_examples(
        self, rows: Iterable[tuple[str, Any]], *, used: frozenset[str] = frozenset()
    ) -> Examples:
        """One example per path; an example is not one row, so there is no `build_example`."""
        leftovers = Leftovers(self, used)
        trees = read_trees(_look_for_leftovers(rows, leftovers), self)
        leftovers.refuse()
        examples = tuple(_build_example(path) for path in trees.paths)
        return Examples(examples, trees.left_out, leftovers.count())


def _look_for_leftovers(
    rows: Iterable[tuple[str, Any]], leftovers: Leftovers
) -> Iterator[tuple[str, Any]]:
    """Yield the rows, noting their columns and the keys of nested messages."""
    for where, row in rows:
        if isinstance(row, Mapping):
            is_nested = "message_id" not in row and "prompt" in row
            pending = [row["prompt"]] if is_nested else []
            keys: dict[str, None] = {}
            for node in pending:  # grows during the loop
                if isinstance(node, Mapping):
                    keys |= dict.fromkeys(find_unused(node, _MESSAGE_COLUMNS, KEY_PREFIX))
                    replies = node.get("replies")
                    pending += replies if isinstance(replies, list) else []
            known = (*_MESSAGE_COLUMNS, "prompt") if is_nested else _MESSAGE_COLUMNS
            leftovers.add(where, [*find_unused(row, known), *keys])
        yield where, row


@dataclass(frozen=True)
class TreeMessage:
    """One message as in its row; None for a null."""

    where: str
    message_id: str
    parent_id: str | None
    text: str
    role: str
    lang: str | None
    deleted: bool
    review_result: bool | None
    rank: int | float | None
    message_tree_id: str | None
    tree_state: str | None


@dataclass(frozen=True)
class TreePath:
    """Messages from the root down; the last one is an assistant's."""

    messages: tuple[TreeMessage, ...]
    message_tree_id: str


@dataclass(frozen=True)
class TreePaths:
    """The paths of all trees, and the number of messages outside of them by reason."""

    paths: tuple[TreePath, ...]
    left_out: Mapping[str, int]


def _build_example(path: TreePath) -> Example:
    root = path.messages[0]
    messages = tuple(
        {"role": ROLES.get(one.role, one.role), "content": one.text} for one in path.messages
    )
    return Example(
        f"{root.where} (message {root.message_id})",
        messages,
        group=path.message_tree_id,
        key=derive_row_key([[one.role, one.text] for one in path.messages]),
    )


def read_trees(rows: Iterable[tuple[str, Any]], task: Oasst1Task) -> TreePaths:
    """The paths of all trees that the rows hold, in the order of their first messages.

    Raises:
        DataError: a message lacks a field, or two different messages have one id.
    """
    left_out: Counter[str] = Counter()
    messages: dict[str, TreeMessage] = {}
    for where, row in rows:
        for message in _read_messages(row, where):
            known = messages.setdefault(message.message_id, message)
            if known is message:
                continue
            if (known.text, known.parent_id) != (message.text, message.parent_id):
                raise DataError(
                    f"{where}: the message id {message.message_id!r} is taken"
                    f" by another in {known.where}"
                )
            left_out["messages that occur twice"] += 1
    forest = _Forest(messages, task, left_out)
    paths = tuple(
        path
        for message in messages.values()
        if message.parent_id is None
        for path in forest.walk(message)
    )
    forest.count_unreachable()
    return TreePaths(paths, {reason: count for reason, count in sorted(left_out.items()) if count})


def _read_messages(row: Any, where: str) -> Iterator[TreeMessage]:
    """The message of a flat row, or all messages of a nested tree, parents first."""
    columns = require_object(row, where)
    if "message_id" in columns or "prompt" not in columns:
        yield _read_message(columns, columns.get("parent_id"), columns, where)
        return
    pending: list[tuple[Any, str | None]] = [(columns["prompt"], None)]
    while pending:
        node, parent_id = pending.pop()
        message = _read_message(require_object(node, where), parent_id, columns, where)
        yield message
        replies = node.get("replies") or []
        if not isinstance(replies, list):
            raise DataError(f"{where}: `replies` should be a list, found {describe_value(replies)}")
        pending += [(reply, message.message_id) for reply in reversed(replies)]


def _read_message(
    node: Mapping[str, Any], parent_id: Any, tree: Mapping[str, Any], where: str
) -> TreeMessage:
    """Read one message; `tree` holds the fields of the whole tree, which is the row if it is
    flat.
    """
    role = read_text(node, "role", where)
    if role not in SPEAKERS:
        raise DataError(f"{where}: the role is {role!r}, expected one of {', '.join(SPEAKERS)}")
    rank = node.get("rank")
    if rank is not None and (not isinstance(rank, int | float) or isinstance(rank, bool)):
        raise DataError(
            f"{where}: column `rank` should be a number or null, found {describe_value(rank)}"
        )
    for name in ("deleted", "review_result"):
        if not isinstance(node.get(name), bool | None):
            raise DataError(
                f"{where}: column `{name}` should be true, false or null, found {node[name]!r}"
            )
    return TreeMessage(
        where=where,
        message_id=read_text(node, "message_id", where),
        parent_id=_read_optional_text({"parent_id": parent_id}, "parent_id", where),
        text=read_text(node, "text", where),
        role=role,
        lang=_read_optional_text(node, "lang", where),
        deleted=bool(node.get("deleted")),
        review_result=node.get("review_result"),
        rank=rank,
        message_tree_id=_read_optional_text(tree, "message_tree_id", where),
        tree_state=_read_optional_text(tree, "tree_state", where),
    )


def _read_optional_text(row: Mapping[str, Any], column: str, where: str) -> str | None:
    return None if row.get(column) is None else read_text(row, column, where)


class _Forest:
    """All messages of a source. Each one is either in a path or counted under one reason in
    `left_out`.
    """

    def __init__(
        self, messages: Mapping[str, TreeMessage], task: Oasst1Task, left_out: Counter[str]
    ) -> None:
        self._messages = messages
        self._task = task
        self._left_out = left_out
        self._children: dict[str | None, list[TreeMessage]] = {}
        for message in messages.values():
            self._children.setdefault(message.parent_id, []).append(message)

    def walk(self, root: TreeMessage) -> list[TreePath]:
        """The paths through one tree; counts the messages that they leave out."""
        below = self._list_below(root)
        if (reason := self._why_no_tree(root)) is not None:
            self._left_out[reason] += len(below)
            return []
        usable = self._select_usable(below)
        answered: set[str] = set()  # an assistant speaks here or below
        for message in reversed(below):  # replies before their parents
            if message.message_id in usable and (
                message.role == "assistant"
                or any(c.message_id in answered for c in self._replies(message))
            ):
                answered.add(message.message_id)
        self._left_out["messages that no assistant answers"] += len(usable) - len(answered)
        if root.message_id not in answered:
            return []
        chosen = self._list_paths(root, answered)
        used = {message.message_id for path in chosen for message in path}
        self._left_out["replies outside the best-ranked path"] += len(answered) - len(used)
        tree_id = root.message_tree_id or root.message_id
        return [TreePath(tuple(path), tree_id) for path in chosen]

    def count_unreachable(self) -> None:
        """Count the messages without a root: below a missing message, or in a circle."""
        reached = {
            message.message_id for root in self._replies(None) for message in self._list_below(root)
        }
        orphans = [
            m
            for m in self._messages.values()
            if m.parent_id is not None and m.parent_id not in self._messages
        ]
        below_orphans = {
            message.message_id for orphan in orphans for message in self._list_below(orphan)
        }
        self._left_out["messages whose parent is missing, or below one"] += len(below_orphans)
        in_circle = len(self._messages) - len(reached) - len(below_orphans)
        self._left_out["messages that reply to each other in a circle"] += in_circle

    def _replies(self, message: TreeMessage | None) -> list[TreeMessage]:
        return self._children.get(None if message is None else message.message_id, [])

    def _list_below(self, top: TreeMessage) -> list[TreeMessage]:
        """The message and everything below it, parents before their replies."""
        found = [top]
        for message in found:  # grows during the loop
            found += self._replies(message)
        return found

    def _why_no_tree(self, root: TreeMessage) -> str | None:
        state = root.tree_state
        if state in GIVEN_UP:
            return "messages of trees that were given up (`tree_state`)"
        if state not in (READY, None) and not self._task.include_unreviewed:
            return "messages of trees that are not ready for export (`tree_state`)"
        return None

    def _select_usable(self, below: list[TreeMessage]) -> set[str]:
        """Ids of the messages that may be in a conversation, together with all their parents."""
        usable: set[str] = set()
        for message in below:
            if message is not below[0] and message.parent_id not in usable:
                self._left_out["messages below one that is left out"] += 1
            elif (reason := self._why_unusable(message)) is not None:
                self._left_out[reason] += 1
            else:
                usable.add(message.message_id)
        return usable

    def _why_unusable(self, message: TreeMessage) -> str | None:
        if message.deleted:
            return "deleted messages"
        if message.review_result is False:
            return "messages that reviewers rejected"
        if message.review_result is None and not self._task.include_unreviewed:
            return "messages without a finished review"
        if self._task.languages and message.lang not in self._task.languages:
            return "messages in another language"
        return None

    def _list_paths(self, root: TreeMessage, answered: set[str]) -> list[list[TreeMessage]]:
        """Root-to-leaf paths among the answered messages: the best-ranked one, or all."""
        finished: list[list[TreeMessage]] = []
        pending = [[root]]
        while pending:
            path = pending.pop()
            replies = sorted(
                (m for m in self._replies(path[-1]) if m.message_id in answered), key=_order
            )
            if not replies:
                finished.append(path)
            elif self._task.paths == "best":
                pending.append([*path, replies[0]])
            else:
                pending += [[*path, reply] for reply in reversed(replies)]
        return finished


def _order(message: TreeMessage) -> tuple[bool, float, str]:
    """A sort key that puts the best reply first: rank 0, then 1, ..., then replies without a rank;
    ties are sorted by id.
    """
    return message.rank is None, message.rank or 0, message.message_id
