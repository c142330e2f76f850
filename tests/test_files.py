"""Files that are whole or not there, rows that survive a kill, and a lease that dies with its
holder.
"""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from runner.errors import CorruptFileError
from runner.files import (
    append_jsonl,
    dump_json,
    follow_umask,
    hash_file,
    hash_json,
    load_json,
    load_jsonl,
    refuse_other_kind,
    write_bytes_atomic,
    write_json_atomic,
    write_json_unsynced,
    write_jsonl_atomic,
)
from runner.run.lease import Lease, is_leased
from tests.support.modes import list_other_modes, umask_of

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
ENCODABLE = st.characters(exclude_categories=["Cs"])


def test_a_failed_write_leaves_the_old_content_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file.json"
    write_json_atomic(path, {"a": 1})
    with pytest.raises(ValueError):
        write_json_atomic(path, {"a": float("nan")})
    with pytest.raises(TypeError):
        write_bytes_atomic(path, "a text")  # type: ignore[arg-type]
    assert load_json(path) == {"a": 1}
    assert [child.name for child in path.parent.iterdir()] == ["file.json"]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_every_writer_follows_the_umask(tmp_path: Path, umask: int) -> None:
    folder = tmp_path / "runs" / "model"
    with umask_of(umask):
        write_json_atomic(folder / "a.json", {})
        write_json_unsynced(folder / "b.json", {})
        write_jsonl_atomic(folder / "c.jsonl", [{}])
        append_jsonl(folder / "d.jsonl", {})
        Lease(folder / "lease").close()
        (folder / "inner").mkdir()
        save_file({"weight": np.zeros(2)}, folder / "inner" / "model.safetensors")
        private = set(list_other_modes(tmp_path / "runs", umask))
        assert private <= {str(folder / "inner" / "model.safetensors")}
        assert bool(private) == (umask != 0o077), "safetensors does not make files private any more"
        follow_umask(folder)
    assert list_other_modes(tmp_path / "runs", umask) == {}


def test_bits_of_a_mode_are_added_and_none_is_taken(tmp_path: Path) -> None:
    """A script stays executable, what a link leads to is left alone, and a folder of a group keeps
    its setgid bit, and the files their group.
    """
    outside = tmp_path / "outside"
    outside.write_text("")
    outside.chmod(0o600)
    folder = tmp_path / "folder"
    folder.mkdir()
    os.chown(folder, -1, 12345 if os.geteuid() == 0 else os.getegid())
    folder.chmod(0o2775)
    for name, mode in (("script.sh", 0o700), ("wide", 0o666), ("narrow", 0o600)):
        (folder / name).write_text("")
        (folder / name).chmod(mode)
    (folder / "link").symlink_to(outside)
    with umask_of(0o027):
        follow_umask(folder)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes == {"script.sh": 0o740, "wide": 0o666, "narrow": 0o640, "link": 0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o2775
    assert {path.lstat().st_gid for path in folder.iterdir()} == {folder.stat().st_gid}


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    """A writer in another process is killed while it replaces the file again and again."""
    path = tmp_path / "file.json"
    program = (
        "import sys; from pathlib import Path; from runner.files import write_json_atomic\n"
        "for number in range(10**9): write_json_atomic(Path(sys.argv[1]), [number] * 5000)"
    )
    writer = subprocess.Popen([sys.executable, "-c", program, str(path)])
    try:
        seen: set[int] = set()
        while len(seen) < 5:
            content = load_json(path)
            if content is not None:
                assert len(content) == 5000 and len(set(content)) == 1
                seen.add(content[0])
    finally:
        writer.kill()
        writer.wait()
    assert len(load_json(path)) == 5000


def test_json_is_laid_out_for_people_and_refuses_nan() -> None:
    assert dump_json({"b": [1], "a": "é"}) == '{\n  "a": "é",\n  "b": [\n    1\n  ]\n}\n'
    with pytest.raises(ValueError):
        dump_json(float("inf"))


def test_load_json_tells_absent_from_damaged(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    assert load_json(path) is None
    for content in (b"", b"{", b"\xff", b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(CorruptFileError, match=r"file\.json is not JSON"):
            load_json(path)


def test_an_unsynced_write_is_whole_for_a_reader(tmp_path: Path) -> None:
    write_json_unsynced(tmp_path / "progress.json", {"step": 1})
    assert load_json(tmp_path / "progress.json") == {"step": 1}
    assert len(list(tmp_path.iterdir())) == 1


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40
)
@given(
    rows=st.lists(
        st.dictionaries(st.text(ENCODABLE), st.text(ENCODABLE) | st.integers(), max_size=3),
        max_size=4,
    )
)
def test_rows_come_back_whatever_their_texts_hold(
    rows: list[dict[str, object]], tmp_path: Path
) -> None:
    written, appended = tmp_path / "written.jsonl", tmp_path / "appended.jsonl"
    appended.unlink(missing_ok=True)
    write_jsonl_atomic(written, rows)
    for row in rows:
        append_jsonl(appended, row)
    assert load_jsonl(written) == load_jsonl(appended) == rows


def test_rows_may_hold_every_line_separator(tmp_path: Path) -> None:
    rows = [{"text": "a\u2028b\u2029c\x85d\x0be\x0cf\rg\nh"}, {"text": "i"}]
    write_jsonl_atomic(tmp_path / "rows.jsonl", rows)
    assert load_jsonl(tmp_path / "rows.jsonl") == rows


def test_a_torn_last_line_is_left_out_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert load_jsonl(path) == []
    path.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert load_jsonl(path) == [{"a": 1}, {"a": 2}]
    path.write_text('{"a": 1}\n{"a"\n{"a": 3}\n')
    with pytest.raises(CorruptFileError, match=r"rows\.jsonl"):
        load_jsonl(path)


@given(value=JSON)
def test_a_hash_ignores_the_order_of_keys_only(value: object) -> None:
    assert hash_json({"x": value, "y": 1}) == hash_json({"y": 1, "x": value})
    assert hash_json({"x": value}) != hash_json({"x": [value]})


def test_hash_file_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert hash_file(tmp_path / "empty").startswith("e3b0c44298fc1c149afbf4c8996fb924")


def test_a_lease_has_one_holder(tmp_path: Path) -> None:
    path = tmp_path / "run" / "lease"
    assert not is_leased(path) and not path.exists()
    first, second = Lease(path), Lease(path)
    assert not is_leased(path), "opened, not yet taken"
    assert first.try_acquire() and not second.try_acquire() and is_leased(path)
    first.close()
    assert not is_leased(path)
    assert second.try_acquire()
    second.close()


def test_a_lease_lives_as_long_as_a_child_that_has_it_as_stdin(tmp_path: Path) -> None:
    path = tmp_path / "lease"
    lease = Lease(path)
    assert lease.try_acquire()
    readable, writable = os.pipe()
    child = subprocess.Popen(
        ["cat", f"/dev/fd/{readable}"], stdin=lease.fileno(), pass_fds=[readable]
    )
    lease.close()
    assert is_leased(path)
    assert not Lease(path).try_acquire()
    os.close(writable)
    child.wait()
    os.close(readable)
    assert not is_leased(path)


def test_children_that_are_not_given_the_lease_do_not_keep_it(tmp_path: Path) -> None:
    lease = Lease(tmp_path / "lease")
    assert lease.try_acquire()
    child = subprocess.Popen(["sleep", "1000"], stdin=subprocess.DEVNULL, close_fds=False)
    try:
        lease.close()
        assert not is_leased(tmp_path / "lease")
    finally:
        child.kill()
        child.wait()


def test_a_row_that_did_not_fit_leaves_no_half_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_jsonl(path, {"row": 1})
    code = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from runner.files import append_jsonl\n"
        # A file that may not grow behaves as on a full disk.
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))\n"
        "try:\n    append_jsonl(Path(sys.argv[1]), {'text': 'x' * 100})\n"
        "except OSError as error:\n    print(error.errno)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(errno.EFBIG)
    append_jsonl(path, {"row": 2})
    assert load_jsonl(path) == [{"row": 1}, {"row": 2}]


def test_who_only_looks_never_keeps_the_lease_from_its_taker(tmp_path: Path) -> None:
    """A run must not be left out of a sweep because somebody asked for its status at that instant,
    however slowly.
    """
    path = tmp_path / "lease"
    lease, holder = Lease(path), Lease(path)
    program = (
        "import fcntl, sys, time\nstream = open(sys.argv[1], 'rb')\nfcntl.flock(stream,"
        " fcntl.LOCK_SH)\n"
        "print(flush=True)\ntime.sleep(1)"  # `is_leased` on a slow file system
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE
    ) as watcher:
        assert watcher.stdout is not None and watcher.stdout.readline() and not is_leased(path)
        assert lease.try_acquire()
        assert not holder.try_acquire(), "this one is really held"
    lease.close()
    assert holder.try_acquire()
    holder.close()


def test_a_link_to_itself_is_said_to_lead_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "lost").symlink_to("nowhere")
    for name, words in (("loop", "leads in a circle"), ("lost", "leads nowhere")):
        with pytest.raises(CorruptFileError, match=words):
            refuse_other_kind(tmp_path / name)
