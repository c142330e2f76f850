"""The exit of a training process whose run is complete: open files are closed, and the process
exits without the interpreter's teardown.

Tearing down torch, transformers and the rest module by module takes about as long as ten steps of a
small model, and no part of a run depends on it.
"""

from __future__ import annotations

import _io
import atexit
import contextlib
import ctypes
import gc
import os
import sys
import tempfile
import threading
import zipfile
from typing import Any, Final, NoReturn

from runner.recipe.parse import Recipe
from runner.sft.startup import WorldPlace, uses_deepspeed

# Types of files that Python would close, or delete, when it collects them. `io.IOBase` itself would
# be checked against every existing object, and its check runs code of some of them.
_CLOSED_WHEN_COLLECTED: Final = (
    _io._IOBase,
    tempfile._TemporaryFileWrapper,
    zipfile.ZipFile,
)
_STANDARD_DESCRIPTORS: Final = (0, 1, 2)


def leave(status: int, recipe: Recipe, place: WorldPlace, *, is_forked: bool = False) -> NoReturn:
    """End this process once the result is on disk: immediately if that is safe, else as Python
    normally does.
    """
    # Objects frozen before the training would otherwise be neither found here nor closed by the
    # interpreter. In a fork they are the worker's imports, and include no file of this run.
    if not is_forked:
        gc.unfreeze()
    if may_exit_immediately(recipe, place):
        exit_immediately(status)
    sys.exit(status)


def may_exit_immediately(recipe: Recipe, place: WorldPlace) -> bool:
    """True if nothing in this process is known to do its last work at the interpreter's exit.

    At that point trackers upload, process groups and DeepSpeed end their threads, and coverage and
    debuggers write their data.
    """
    is_alone = place.world_size == 1 and not _has_process_group()
    has_others = bool(recipe.tracking.report_to) or uses_deepspeed()
    return is_alone and not has_others and not _is_traced()


def _has_process_group() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def _is_traced() -> bool:
    if "coverage" in sys.modules or "COVERAGE_PROCESS_START" in os.environ:
        return True
    monitoring = getattr(sys, "monitoring", None)  # since Python 3.12
    tools = [monitoring.get_tool(number) for number in range(6)] if monitoring is not None else []
    return sys.gettrace() is not None or sys.getprofile() is not None or any(tools)


def exit_immediately(status: int) -> NoReturn:
    """End this process as Python would, but without the teardown of modules.

    Waits for threads, calls the functions of `atexit` (logging closes its files there), and closes
    the files of Python and of C.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    _close_files()
    ctypes.CDLL(None).fflush(None)
    os._exit(status)


def _close_files() -> None:
    """Flush and close files that are open for writing. Closing writes the end of an archive and
    deletes a temporary file.
    """
    found = [one for one in gc.get_objects() if issubclass(type(one), _CLOSED_WHEN_COLLECTED)]
    # From the outside inwards: the end of a `GzipFile` is written to the buffered file below it.
    found.sort(key=_rank)
    for file in found:
        # Python ignores a full disk here too.
        with contextlib.suppress(Exception):
            if _is_standard(file):
                file.flush()
            elif not _is_read_only(file):
                file.close()


def _rank(file: Any) -> int:
    if isinstance(file, _io.TextIOWrapper):
        return 0
    if isinstance(file, zipfile.ZipFile):
        return 2  # after the member that is being written
    if isinstance(file, _io._IOBase) and type(file).__module__ == "_io":
        return 4 if isinstance(file, _io.FileIO) else 3
    return 1


def _is_standard(file: Any) -> bool:
    try:
        return file.fileno() in _STANDARD_DESCRIPTORS
    except (AttributeError, OSError, ValueError):  # in an archive, in memory, or closed
        return False


def _is_read_only(file: Any) -> bool:
    return isinstance(file, _io._IOBase) and not file.writable()
