"""The failure derived from an exception, from the records of several ranks, or from a log alone."""

from __future__ import annotations

import errno
import itertools
import os
import typing
from pathlib import Path

import pytest

from runner.errors import DataError, DivergedError, PreemptedError, RefusedError
from runner.files import write_json_atomic
from runner.run.failures import (
    HINTS,
    build_failure,
    classify,
    explain_silence,
    is_address_in_use,
    read_log_tail,
)
from runner.run.paths import AttemptPaths
from runner.run.record import EXIT_CODES, Failure, FailureKind, load_failure

KINDS: tuple[FailureKind, ...] = typing.get_args(FailureKind)

# Texts as the libraries wrote them, raised as a plain RuntimeError.
RUNTIME_TEXTS: list[tuple[FailureKind, str]] = [
    (
        "out_of_memory",
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB",
    ),
    (
        "out_of_memory",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
    ),
    ("out_of_memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    (
        "out_of_memory",
        (
            "NCCL error in: ProcessGroupNCCL.cpp:3690, unhandled cuda error\nCuda failure 2 'out of"
            " memory'"
        ),
    ),
    (
        "out_of_memory",
        (
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate"
            " memory: you"
        ),
    ),
    (
        "diverged",
        "Current loss scale already at minimum - cannot decrease scale anymore. Exiting run.",
    ),
    ("diverged", "Function 'MmBackward0' returned nan values in its 0th output."),
    (
        "transient",
        (
            "[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"
            " [127.0.0.1]:9463"
        ),
    ),
    ("transient", "Connection reset by peer"),
    ("transient", "Timed out waiting 1800000ms for recv operation to complete"),
    (
        "transient",
        "The server socket has failed to listen on any local network address. code: EADDRINUSE",
    ),
    (
        "transient",
        "NCCL error in: ../NCCLUtils.cpp:77, unhandled system error, NCCL version 2.21.5",
    ),
    ("transient", "Error while serializing: I/O error: No space left on device (os error 28)"),
    (
        "transient",
        (
            "[enforce fail at inline_container.cc:668] . PytorchStreamWriter failed writing file"
            " data/0"
        ),
    ),
    ("transient", "CUDA error: CUDA-capable device(s) is/are busy or unavailable"),
    ("transient", "CUDA error: uncorrectable ECC error encountered"),
    ("configuration", "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 4000"),
    ("crashed", "CUDA error: an illegal memory access was encountered"),
    ("crashed", "The size of tensor a (3) must match the size of tensor b (4)"),
    ("crashed", "out of resource: shared memory, Required: 147456, Hardware limit: 101376"),
]


@pytest.mark.parametrize(("kind", "text"), RUNTIME_TEXTS)
def test_libraries_say_it_in_their_texts(kind: FailureKind, text: str) -> None:
    assert classify(RuntimeError(text)) == kind


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("configuration", RefusedError("no")),
        ("data", DataError("no")),
        ("diverged", DivergedError("no")),
        ("preempted", PreemptedError("asked to leave")),
        ("preempted", KeyboardInterrupt()),
        ("out_of_memory", MemoryError()),
        ("out_of_memory", OSError(errno.ENOMEM, "Cannot allocate memory")),
        ("transient", OSError(errno.ENOSPC, "No space left on device")),
        ("transient", OSError(errno.ESTALE, "Stale file handle")),
        (
            "transient",
            PermissionError(errno.EACCES, "Permission denied", "/data/out of memory.txt"),
        ),
        ("transient", ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")),
        ("transient", TimeoutError("no answer")),
        ("transient", OSError("remote storage cannot be read: EndpointConnectionError")),
        (
            "configuration",
            OSError("models/x is not a local folder and is not a valid model identifier listed on"),
        ),
        ("configuration", OSError("models/x does not appear to have a file named config.json")),
        ("configuration", ModuleNotFoundError("No module named 'flash_attn'")),
        ("crashed", ValueError("connection refused is no loss mode")),
        ("crashed", KeyError("timeout")),
        ("crashed", AssertionError("out of memory")),
        ("crashed", SystemExit(3)),
        ("crashed", ZeroDivisionError()),
    ],
)
def test_types_say_it_where_they_can(kind: FailureKind, error: BaseException) -> None:
    assert classify(error) == kind


def test_the_cause_says_it_where_the_exception_itself_does_not() -> None:
    outer = ValueError("cannot be saved")
    outer.__cause__ = OSError(errno.ENOSPC, "No space left on device", "/runs/x")
    assert classify(outer) == "transient"
    assert "disk full: /runs/x" in build_failure(outer, Path()).message
    looped = ValueError("a")
    looped.__cause__ = looped
    assert classify(looped) == "crashed"


def test_the_real_types_of_the_libraries() -> None:
    """Types that the installed libraries raise; a renamed one turns this red."""
    import httpx
    import torch
    from huggingface_hub import errors as hub
    from safetensors import SafetensorError
    from torch import distributed

    request = httpx.Request("GET", "https://example.org")

    def answer(kind: type[hub.HfHubHTTPError], status: int) -> hub.HfHubHTTPError:
        return kind("no", response=httpx.Response(status, request=request))

    expected: list[tuple[FailureKind, BaseException]] = [
        ("out_of_memory", torch.OutOfMemoryError("CUDA out of memory.")),
        ("out_of_memory", torch.AcceleratorError("CUDA error: out of memory")),
        ("transient", distributed.DistBackendError("no words that are known")),
        ("transient", distributed.DistStoreError("wait was given up")),
        (
            "transient",
            distributed.DistNetworkError("The client socket has failed to connect to [::]:1"),
        ),
        (
            "transient",
            SafetensorError(
                "Error while serializing: I/O error: No space left on device (os error 28)"
            ),
        ),
        ("transient", httpx.ConnectError("[Errno -3]", request=request)),
        ("transient", httpx.ReadTimeout("", request=request)),
        ("transient", answer(hub.HfHubHTTPError, 503)),
        ("transient", answer(hub.HfHubHTTPError, 429)),
        ("configuration", answer(hub.RepositoryNotFoundError, 401)),
        ("configuration", answer(hub.GatedRepoError, 403)),
        (
            "configuration",
            hub.OfflineModeIsEnabled(
                "Cannot reach https://huggingface.co: offline mode is enabled."
            ),
        ),
    ]
    assert [(type(error).__name__, classify(error)) for _, error in expected] == [
        (type(error).__name__, kind) for kind, error in expected
    ]
    with pytest.raises(RuntimeError) as raised:
        torch.empty(10**15)
    assert classify(raised.value) == "out_of_memory"


def test_every_kind_has_a_hint_and_an_exit_code() -> None:
    assert set(HINTS) == set(EXIT_CODES) == set(KINDS)
    assert all("\n" not in hint for hint in HINTS.values())


def test_a_message_is_bounded_and_holds_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORE_TOKEN", "canary-canary-canary")
    failure = build_failure(RuntimeError("canary-canary-canary was refused" + "x" * 10_000), Path())
    assert "canary" not in failure.message and len(failure.message) <= 4000


PEER_TEXTS = (
    "Connection closed by peer [127.0.0.1]:9463",
    "Broken pipe",
    "Timed out waiting 30000ms for recv",
)


@pytest.mark.parametrize("text", PEER_TEXTS)
def test_the_rank_that_knows_why_wins_whichever_wrote_first(text: str, tmp_path: Path) -> None:
    """All orders of writing, the reason on either rank."""
    lost = build_failure(RuntimeError(text), tmp_path)
    assert lost.has_lost_peer
    reasons = [
        build_failure(error, tmp_path)
        for error in (
            ValueError("why"),
            MemoryError("why"),
            DataError("why"),
            PreemptedError("why"),
            OSError(errno.ENOSPC, "No space left on device"),
        )
    ]
    for number, (reason, order) in enumerate(
        itertools.product(reasons, itertools.permutations([0, 1, 2]))
    ):
        files = AttemptPaths(tmp_path / str(number))
        for rank in order:
            reason_rank = number % 3
            write_json_atomic(
                files.failure_path(rank), (reason if rank == reason_rank else lost).model_dump()
            )
        assert load_failure(files) == reason


def test_a_rank_that_was_ended_by_the_launcher_does_not_hide_why(tmp_path: Path) -> None:
    files = AttemptPaths(tmp_path)
    assert load_failure(files) is None
    write_json_atomic(files.failure_path(0), Failure(kind="preempted", message="TERM").model_dump())
    write_json_atomic(files.failure_path(11), Failure(kind="crashed", message="why").model_dump())
    failure = load_failure(files)
    assert failure is not None and failure.message == "why"
    assert files.list_failure_paths() == [files.failure_path(0), files.failure_path(11)]


@pytest.mark.parametrize(
    ("kind", "log"),
    [
        ("lost", ""),
        ("lost", "step 3/9  loss 1.2\n"),
        (
            "lost",
            (
                "Traceback (most recent call last):\nsubprocess.CalledProcessError: Command '[...]'"
                " returned 1"
            ),
        ),
        ("lost", "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n====\n"),
        ("configuration", "ValueError: A `distributed_type` must be specified in the config file."),
        ("configuration", "yaml.parser.ParserError: while parsing a flow node"),
        (
            "configuration",
            "FileNotFoundError: The passed configuration file `nowhere.yaml` does not exist.",
        ),
        (
            "transient",
            (
                "ConnectionError: Tried to launch on port `29500`, but another process is"
                " utilizing it."
            ),
        ),
        (
            "transient",
            (
                "torch.distributed.DistNetworkError: The server socket has failed to listen. code:"
                " EADDRINUSE"
            ),
        ),
        (
            "transient",
            "OSError: [Errno 28] No space left on device\nsubprocess.CalledProcessError: Command",
        ),
        (
            "out_of_memory",
            "Error out of memory at line 380 in file /src/csrc/pythonInterface.cpp\n",
        ),
    ],
)
def test_a_log_alone(kind: FailureKind, log: str, tmp_path: Path) -> None:
    path = tmp_path / "log.txt"
    path.write_text(f"starting\n{log}")
    failure = explain_silence(path, 1)
    assert failure.kind == kind, failure
    assert is_address_in_use(failure) == ("port" in log or "EADDRINUSE" in log)


def test_the_tail_of_a_log_is_bounded_scrubbed_and_never_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STORE_TOKEN", "canary-canary-canary")
    path = tmp_path / "log.txt"
    assert read_log_tail(path) == ()
    path.write_bytes(
        b"\xff\x00 first\r\n\n" + b"long " * 1000 + b"\nwith canary-canary-canary\nbar 1\rbar 2\n"
    )
    first, long, secret, *bars = read_log_tail(path)
    assert (
        "first" in first
        and len(long) < 500
        and "canary" not in secret
        and bars == ["bar 1", "bar 2"]
    )
    path.write_text("".join(f"line {number} {'x' * 100}\n" for number in range(100_000)))
    assert [line.split()[1] for line in read_log_tail(path)] == [
        str(number) for number in range(99_985, 100_000)
    ]
    assert os.path.getsize(path) > 2**20
