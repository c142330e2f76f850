"""Archives at a remote place: complete or absent, never mixed with another experiment's, clear
errors.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from runner.checkpoints.remote import RemoteFolder, open_named_archive, open_run_folder, retry
from runner.errors import CorruptFileError, RecipeError, RefusedError
from runner.recipe.parse import parse_recipe
from tests.conftest import RECIPE_TEXT
from tests.support.remote_places import s3_server

DIGEST = "d" * 64


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, Any]]:
    with s3_server("storage") as options:
        yield options


@pytest.fixture(params=["file", "memory", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> RemoteFolder:
    name = f"{request.node.name}/tests/run"
    if request.param == "s3":
        return RemoteFolder(f"s3://storage/{name}", request.getfixturevalue("s3"))
    return RemoteFolder(f"{request.param}://{tmp_path}/{name}", {})


def archive(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / f"{hashlib.sha256(content).hexdigest()}.zip"
    path.write_bytes(content)
    return path


def raw(folder: RemoteFolder) -> tuple[Any, str]:
    """The file system behind a folder, to do damage there."""
    return folder._fs, folder._root


def test_what_is_sent_is_listed_fetched_and_deleted(folder: RemoteFolder, tmp_path: Path) -> None:
    assert folder.list_steps() == []
    for step, content in ((12, b"twelve"), (4, b"four" * 100_000)):
        folder.send(archive(tmp_path, content), step)
    assert folder.list_steps() == [4, 12]
    folder.fetch(4, tmp_path / "fetched.zip")
    assert (tmp_path / "fetched.zip").read_bytes() == b"four" * 100_000
    folder.send(archive(tmp_path, b"another four"), 4)
    folder.fetch(4, tmp_path / "fetched.zip")
    assert (tmp_path / "fetched.zip").read_bytes() == b"another four"
    folder.delete(4)
    folder.delete(4)
    assert folder.list_steps() == [12]
    with pytest.raises(FileNotFoundError):
        folder.fetch(4, tmp_path / "fetched.zip")


def test_without_its_checksum_an_archive_does_not_count(
    folder: RemoteFolder, tmp_path: Path
) -> None:
    folder.send(archive(tmp_path, b"content"), 4)
    filesystem, root = raw(folder)
    filesystem.pipe_file(f"{root}/step-8.zip", b"still on its way")
    filesystem.pipe_file(f"{root}/step-x.zip", b"somebody's")
    assert folder.list_steps() == [4]
    with pytest.raises(FileNotFoundError, match="never finished"):
        folder.fetch(8, tmp_path / "fetched.zip")
    filesystem.pipe_file(f"{root}/step-4.zip", b"damaged")
    with pytest.raises(CorruptFileError, match="checksum"):
        folder.fetch(4, tmp_path / "fetched.zip")


def test_the_checksum_is_one_that_sha256sum_reads(tmp_path: Path) -> None:
    folder = RemoteFolder(f"file://{tmp_path}/place", {})
    folder.send(archive(tmp_path, b"content"), 4)
    subprocess.run(
        ["sha256sum", "--check", "--strict", "step-4.zip.sha256"],
        cwd=tmp_path / "place",
        check=True,
    )


def test_a_place_belongs_to_one_experiment(folder: RemoteFolder) -> None:
    folder.require_owner(DIGEST, claim=False)
    folder.require_owner("e" * 64, claim=True)
    folder.require_owner("e" * 64, claim=True)
    for claim in (False, True):
        with pytest.raises(RefusedError, match="another experiment"):
            folder.require_owner(DIGEST, claim=claim)


def test_a_misspelt_bucket_is_an_error_and_no_new_bucket(
    s3: dict[str, Any], tmp_path: Path
) -> None:
    folder = RemoteFolder("s3://bucked/run", s3)
    with pytest.raises(OSError):
        folder.require_owner(DIGEST, claim=True)
    with pytest.raises(OSError):
        folder.send(archive(tmp_path, b"content"), 4)
    assert not fsspec.filesystem("s3", **s3).exists("bucked")


def test_an_unknown_protocol_is_refused() -> None:
    with pytest.raises(RefusedError, match="nosuch"):
        RemoteFolder("nosuch://place", {})


def test_a_missing_package_is_named_with_the_way_to_get_it() -> None:
    code = """
import sys
sys.modules["s3fs"] = None  # as if it were not installed
from runner.errors import RefusedError
from runner.checkpoints.remote import RemoteFolder
try:
    RemoteFolder("s3://bucket/run", {})
except RefusedError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "pip install 'recipe-runner[s3]'" in result.stdout and "s3://" in result.stdout


def test_nothing_is_imported_before_a_place_is_opened() -> None:
    imports = "import sys, runner.checkpoints.remote, runner.checkpoints.restore"
    code = imports + "; print({'fsspec', 's3fs', 'torch'} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "set()\n"


def test_a_run_has_a_folder_of_its_own(tmp_path: Path) -> None:
    def parse(*overrides: str) -> Any:
        return parse_recipe(RECIPE_TEXT, where="recipe.yaml", overrides=overrides)

    assert open_run_folder(parse()) is None
    recipe = parse(
        f"checkpoints.remote={{url: 'file://{tmp_path}/', options: {{auto_mkdir: true}}}}"
    )
    folder = open_run_folder(recipe)
    assert folder is not None and folder.url == f"file://{tmp_path}/tests/base"
    assert open_named_archive("memory://a/b/step-12.zip", recipe)[1] == 12
    for url in ("memory://a/b", "memory://a/step-012.zip", "memory://a/step-1.zip.sha256"):
        with pytest.raises(RefusedError, match=r"step-100\.zip"):
            open_named_archive(url, recipe)


@pytest.mark.parametrize(
    ("url", "options", "problem"),
    [
        ("ftp://me:secret@host/place", "{}", "password"),
        ("s3://bucket", "{secret: x}", "secret"),
        ("s3://bucket", "{key: x}", "secret"),
        ("s3://bucket", "{client_kwargs: {aws_secret_access_key: x}}", "secret"),
        ("abfs://container@account.example/place", "{}", None),
    ],
)
def test_secrets_never_come_from_a_recipe(url: str, options: str, problem: str | None) -> None:
    overrides = (f"checkpoints.remote={{url: '{url}', options: {options}}}",)
    if problem is None:
        parse_recipe(RECIPE_TEXT, where="recipe.yaml", overrides=overrides)
        return
    with pytest.raises(RecipeError, match=problem):
        parse_recipe(RECIPE_TEXT, where="recipe.yaml", overrides=overrides)


def test_errors_are_tried_again_but_not_ours() -> None:
    stop, calls = threading.Event(), []

    def work(error: Exception | None) -> str:
        calls.append(error)
        if error is not None and len(calls) < 2:
            raise error
        return "done"

    assert retry(lambda: work(OSError("try again")), 1, stop) == ("done", 2)
    calls.clear()
    with pytest.raises(OSError):
        retry(lambda: work(OSError("no more")), 0, stop)
    calls.clear()
    with pytest.raises(RefusedError):
        retry(lambda: work(RefusedError("never again")), 5, stop)
    assert len(calls) == 1
    calls.clear()
    stop.set()
    with pytest.raises(OSError):
        retry(lambda: work(OSError("stopped")), 5, stop)
    assert len(calls) == 1, "no pause and no further try once it is to stop"
