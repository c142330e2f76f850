"""The exit of a training process: nothing that was written gets lost if it exits without the
interpreter's teardown, and it does not exit so if other work needs the teardown.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Final

import pytest

from runner.recipe.parse import Recipe, parse_recipe
from runner.sft.leave import may_exit_immediately
from runner.sft.startup import WorldPlace
from tests.conftest import ROOT, Project
from tests.recipe.test_parse import TEXT
from tests.support.training_runs import launch, read_log

# Like a library or a user's plug-in: files that stay open, and work at the end.
_WRITER: Final = """\
import atexit, gzip, io, logging, os, sys, tempfile, threading, time, zipfile, ctypes
from runner.sft.leave import exit_immediately

text = open("text", "w"); text.write("a line\\nhalf a line")
binary = open("binary", "wb"); binary.write(b"some bytes")
both = open("both", "w+b"); both.write(b"read and written")
packed = gzip.open("packed.gz", "wt"); packed.write("packed text")
inner = open("inner.gz", "wb"); outer = gzip.GzipFile(fileobj=inner, mode="w"); outer.write(b"deep")
archive = zipfile.ZipFile("archive.zip", "w"); archive.writestr("member", "of an archive")
member = archive.open("second", "w"); member.write(b"still open")
temporary = tempfile.NamedTemporaryFile(dir=".", prefix="temporary"); temporary.write(b"x")
folder = tempfile.TemporaryDirectory(dir=".", prefix="folder")
logging.basicConfig(filename="log", level="INFO"); logging.info("logged")
cycle = [open("cycle", "w")]; cycle.append(cycle); cycle[0].write("in a cycle"); del cycle

class OwnFile(io.TextIOWrapper):
    pass

own = OwnFile(open("own", "wb")); own.write("of a class of its own")

def at_the_end():
    with open("metrics", "w") as stream:
        stream.write("written at the end")
    late.write("late")

late = open("late", "w")
atexit.register(at_the_end)

def work():
    time.sleep(0.2)
    with open("thread", "w") as stream:
        stream.write("waited for")

threading.Thread(target=work).start()
libc = ctypes.CDLL(None)
libc.fopen.restype = ctypes.c_void_p
stream = libc.fopen(b"of_c", b"w")
libc.fputs(b"C's own buffer", ctypes.c_void_p(stream))
sys.stdout.write("printed without an end of line")
sys.stderr.write("said")
exit_immediately(int(sys.argv[1]))
"""
_LEFT: Final = {
    "text": "a line\nhalf a line",
    "binary": "some bytes",
    "both": "read and written",
    "log": "INFO:root:logged\n",
    "cycle": "in a cycle",
    "own": "of a class of its own",
    "metrics": "written at the end",
    "late": "late",
    "thread": "waited for",
    "of_c": "C's own buffer",
}


@pytest.mark.parametrize("status", [0, 7])
def test_nothing_that_was_written_is_lost(tmp_path: Path, status: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _WRITER, str(status)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert (done.returncode, done.stdout) == (status, "printed without an end of line")
    assert done.stderr == "said"
    assert {name: (tmp_path / name).read_text() for name in _LEFT} == _LEFT
    assert gzip.decompress((tmp_path / "packed.gz").read_bytes()) == b"packed text"
    assert gzip.decompress((tmp_path / "inner.gz").read_bytes()) == b"deep"
    with zipfile.ZipFile(tmp_path / "archive.zip") as archive:
        assert archive.read("member") == b"of an archive"
        assert archive.read("second") == b"still open"
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {*_LEFT, "packed.gz", "inner.gz", "archive.zip"}, "no temporary file is left"


def test_a_full_disk_does_not_keep_it(tmp_path: Path) -> None:
    program = (
        "import sys; from runner.sft.leave import exit_immediately\n"
        "full = open('/dev/full', 'w'); full.write('x')\n"
        "other = open('other', 'w'); other.write('y')\n"
        "exit_immediately(0)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "other").read_text() == "y"


def load(*overrides: str) -> Recipe:
    return parse_recipe(TEXT, where="r.yaml", overrides=overrides)


def test_a_plain_run_of_one_process_may_exit_immediately() -> None:
    if sys.gettrace() is None and "coverage" not in sys.modules:
        assert may_exit_immediately(load(), WorldPlace())
    assert not may_exit_immediately(load(), WorldPlace(world_size=2))
    assert not may_exit_immediately(load("tracking.report_to=[tensorboard]"), WorldPlace())


@pytest.mark.parametrize(
    ("begun", "may"),
    [
        ("", True),
        ("sys.settrace(lambda *_: None)", False),
        ("sys.setprofile(lambda *_: None)", False),
        ("sys.modules['coverage'] = sys", False),
        ("os.environ['COVERAGE_PROCESS_START'] = 'x'", False),
        ("os.environ['ACCELERATE_USE_DEEPSPEED'] = 'true'", False),
        ("import torch.distributed", True),
        (
            "import torch.distributed as d; d.init_process_group("
            "'gloo', store=d.HashStore(), rank=0, world_size=1)",
            False,
        ),
    ],
)
def test_who_is_watched_leaves_as_any_program(begun: str, may: bool, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(TEXT)
    program = (
        "import json, os, sys\n"
        "from runner.recipe.parse import load_recipe\n"
        "from runner.sft.leave import may_exit_immediately\n"
        "from runner.sft.startup import WorldPlace\n"
        "from pathlib import Path\n"
        f"{begun}\n"
        "answer = may_exit_immediately(load_recipe(Path('recipe.yaml')), WorldPlace())\n"
        "sys.settrace(None); sys.setprofile(None)\n"
        "print(json.dumps(answer))"
    )
    environment = {name: value for name, value in os.environ.items() if "COVERAGE" not in name}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) is may


# In the training process only. The last step of a teardown shows that there was one.
_PLUG_IN: Final = """\
import atexit, os, sys

if "runner.sft" in sys.orig_argv and "launch" not in sys.orig_argv:
    metrics = open(os.environ["PLUG_IN_FILE"], "w")
    metrics.write("kept open, ")
    atexit.register(lambda: metrics.write("written at the end"))

    class Witness:
        def __del__(self, tell=os.write):
            tell(2, b"the interpreter was taken apart\\n")

    sys.witness = Witness()
"""


@pytest.mark.slow
def test_a_finished_trainer_leaves_at_once_and_keeps_what_others_wrote(
    project: Project, tmp_path: Path
) -> None:
    project.add_model()
    hook_dir = tmp_path / "hook"
    hook_dir.mkdir()
    (hook_dir / "sitecustomize.py").write_text(_PLUG_IN)
    environment = {
        "PLUG_IN_FILE": str(tmp_path / "metrics"),
        "PYTHONPATH": f"{hook_dir}:{os.environ.get('PYTHONPATH', '')}",
    }
    short = ("data.num_train_samples=4", "training.num_train_epochs=1", "checkpoints.save_steps=1")
    rest = ("evaluation={eval_strategy: 'no', eval_steps: null}", "data.num_test_samples=2")
    paths = launch(project, "left", *short, *rest, environment=environment)
    assert (tmp_path / "metrics").read_text() == "kept open, written at the end"
    log = read_log(paths)
    assert "completed at step 1" in log and "taken apart" not in log
    watched = {**environment, "COVERAGE_PROCESS_START": ""}
    paths = launch(project, "watched", *short, *rest, environment=watched)
    assert (tmp_path / "metrics").read_text() == "kept open, written at the end"
    assert "taken apart" in read_log(paths), "otherwise the first half shows nothing"
