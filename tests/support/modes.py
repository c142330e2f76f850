"""The modes of files that were written under a umask."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def umask_of(umask: int) -> Iterator[None]:
    """Set the umask for everything that is written or started meanwhile."""
    before = os.umask(umask)
    try:
        yield
    finally:
        os.umask(before)


def list_other_modes(folder: Path, umask: int) -> dict[str, str]:
    """The files and folders, from `folder` on, whose mode is not the one of the umask."""
    found = {}
    for path in (folder, *sorted(folder.rglob("*"))):
        mode = path.lstat().st_mode
        wanted = 0o777 if stat.S_ISDIR(mode) else 0o666
        if not stat.S_ISLNK(mode) and stat.S_IMODE(mode) & 0o777 != wanted & ~umask:
            found[str(path)] = oct(stat.S_IMODE(mode))
    return found
