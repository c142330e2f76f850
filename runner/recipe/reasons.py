"""The reasons for files and messages that are left out, in the singular.

Reasons are stored in the plural, next to their counts.
"""

from __future__ import annotations

from typing import Final

_SINGULAR: Final = {
    "deleted messages": "deleted message",
    "files that hold no rows": "file that holds no rows",
    "files that match no split of the README": "file that matches no split of the README",
    "files whose names contain no split": "file whose name contains no split",
    "hidden files": "hidden file",
    "links to folders": "link to a folder",
    "messages below one that is left out": "message below one that is left out",
    "messages in another language": "message in another language",
    "messages of trees that are not ready": "message of a tree that is not ready",
    "messages of trees that were given up": "message of a tree that was given up",
    "messages that no assistant answers": "message that no assistant answers",
    "messages that occur twice": "message that occurs twice",
    "messages that reply to each other in a circle": "message that replies to itself",
    "messages that reviewers rejected": "message that reviewers rejected",
    "messages whose parent is missing": "message whose parent is missing",
    "messages without a finished review": "message without a finished review",
    "replies outside the best-ranked path": "reply outside the best-ranked path",
}


def count_reason(number: int, reason: str) -> str:
    """A number of things with their stored reason.

    >>> count_reason(1, "hidden files (.a)"), count_reason(1_200, "hidden files")
    ('1 hidden file (.a)', '1,200 hidden files')
    """
    if number == 1:
        for many, one in _SINGULAR.items():
            if reason.startswith(many):
                return f"1 {one}{reason.removeprefix(many)}"
    return f"{number:,} {reason}"
