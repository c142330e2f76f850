"""A Slurm cluster on this machine only: munged, slurmctld and one slurmd per node, as the user that
runs the tests. Nothing is installed or configured outside its folder. The GPUs are two device files
that every machine has.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import random
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import pytest

from runner.processes import die_with_parent

PROGRAMS: Final = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "munged": "munge",
}
SEARCH_PATH: Final = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
PATIENCE_SECONDS: Final = 600.0  # for runs that train on a busy machine
NUM_CPUS: Final = 4  # of each node, whatever the machine has
NUM_GPUS: Final = 2
MAX_ARRAY_SIZE: Final = 8

# Not the generator that plug-ins of pytest seed alike in every worker.
_CHANCE: Final = random.SystemRandom()

_SLURM_CONF: Final = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={controller_port}
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket,cred_expire=6
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
ReturnToService=2
MaxArraySize={max_array_size}
MinJobAge=86400
KillWait=2
BatchStartTimeout=1
SlurmdTimeout={slurmd_timeout}
InactiveLimit=0
GresTypes=gpu
NodeName={nodes} NodeHostname={host} NodeAddr=127.0.0.1 Port={node_ports} CPUs={num_cpus} Boards=1 \
SocketsPerBoard=1 CoresPerSocket={num_cpus} ThreadsPerCore=1 RealMemory=1000 \
Gres=gpu:{num_gpus} State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10
"""


def list_missing_packages() -> list[str]:
    """Debian packages of the missing programs."""
    return sorted(
        {
            package
            for name, package in PROGRAMS.items()
            if shutil.which(name, path=SEARCH_PATH) is None
        }
    )


# `REQUIRE_SLURM=1` is for test machines that all have Slurm: the fixtures fail without it.
needs_slurm: Final = pytest.mark.skipif(
    bool(list_missing_packages()) and not os.environ.get("REQUIRE_SLURM"),
    reason=f"not installed: {', '.join(list_missing_packages())}",
)


def wait_until(condition: Callable[[], bool], what: str, *, pause_seconds: float = 0.05) -> None:
    """Wait until a condition holds that another process decides."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"timed out: {what}"
        time.sleep(pause_seconds)


@dataclass
class LocalSlurm:
    """The daemons of one cluster; each can be started, stopped and killed separately."""

    root: Path
    num_nodes: int = 1
    slurmd_timeout: int = 30
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def node_names(self) -> list[str]:
        return [f"node{number}" for number in range(self.num_nodes)]

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables by which a command uses this cluster."""
        others = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM_", "SBATCH_"))
        }
        return {**others, "PATH": SEARCH_PATH, "SLURM_CONF": str(self.root / "slurm.conf")}

    def configure(self) -> None:
        """Write the files of the cluster, on ports that are free now."""
        for name in ("munge", "state", "spool", "log"):
            (self.root / name).mkdir()
        (self.root / "munge").chmod(0o755)  # munged refuses what others may write to
        key_path = self.root / "munge" / "key"
        key_path.write_bytes(os.urandom(256))
        key_path.chmod(0o600)
        controller_port, *node_ports = find_free_ports(1 + self.num_nodes)
        nodes = ",".join(self.node_names)
        text = _SLURM_CONF.format(
            root=self.root,
            host=socket.gethostname().partition(".")[0],
            user=pwd.getpwuid(os.getuid()).pw_name,
            controller_port=controller_port,
            nodes=nodes,
            node_ports=",".join(map(str, node_ports)),
            num_cpus=NUM_CPUS,
            num_gpus=NUM_GPUS,
            max_array_size=MAX_ARRAY_SIZE,
            slurmd_timeout=self.slurmd_timeout,
        )
        (self.root / "slurm.conf").write_text(text)
        (self.root / "gres.conf").write_text(
            f"NodeName={nodes} Name=gpu File=/dev/null,/dev/zero\n"
        )

    def start_all(self) -> None:
        """Start every daemon that does not run, and wait until the nodes take jobs."""
        self.start_munged()
        self.start_controller()
        for name in self.node_names:
            self.start_node(name)

    def start_munged(self) -> None:
        folder = self.root / "munge"
        (folder / "socket").unlink(missing_ok=True)
        files = {
            "key-file": "key",
            "socket": "socket",
            "pid-file": "pid",
            "seed-file": "seed",
            "log-file": "log",
        }
        options = [f"--{option}={folder / name}" for option, name in files.items()]
        self._start("munged", "munged", "--foreground", *options)
        answers = ["munge", "--no-input", f"--socket={folder / 'socket'}"]
        wait_until(lambda: self.succeeds(*answers), "munged answers")

    def start_controller(self) -> None:
        self._start("slurmctld", "slurmctld", "-D")
        wait_until(lambda: self.succeeds("squeue"), "slurmctld answers")

    def start_node(self, name: str) -> None:
        self._start(name, "slurmd", "-D", "-N", name)
        states = ("idle", "mixed", "allocated")
        wait_until(lambda: self.node_state(name) in states, f"{name} takes jobs")

    def _start(self, name: str, program: str, *arguments: str) -> None:
        if name in self.daemons:
            return
        path = shutil.which(program, path=SEARCH_PATH)
        assert path is not None, f"install {PROGRAMS[program]}"
        with (self.root / "log" / f"{name}.txt").open("ab") as log:
            self.daemons[name] = subprocess.Popen(
                [path, *arguments],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=partial(die_with_parent, os.getpid()),  # also when the tests are killed
            )

    def node_state(self, name: str) -> str:
        """The state that `sinfo` shows, with `*` if the node does not answer."""
        return self.run(
            "sinfo", "--noheader", "--Node", "--nodes", name, "--partition=low", "--format=%T"
        ).strip()

    def list_jobs(self) -> dict[str, str]:
        """States of all unfinished jobs, by `<job>` or `<array>_<task>`."""
        lines = self.run("squeue", "--noheader", "--array", "--format=%i %T").splitlines()
        return dict(line.split() for line in lines)

    def wait_until_idle(self) -> None:
        """Wait until no job is left, including those that a killed node lost: its daemon is asked
        for its jobs.
        """

        def is_idle() -> bool:
            jobs = self.list_jobs()
            if "RUNNING" in jobs.values():
                self.run("scontrol", "reconfigure")
            return jobs == {}

        wait_until(is_idle, "all jobs end", pause_seconds=0.5)

    def cancel_all(self) -> None:
        """Cancel all jobs of the cluster, and wait until they are gone."""
        if self.list_jobs():
            self.run("scancel", "--user", pwd.getpwuid(os.getuid()).pw_name)
            self.wait_until_idle()

    def succeeds(self, *command: str) -> bool:
        return self._call(*command).returncode == 0

    def run(self, *command: str) -> str:
        """The standard output of a command that must succeed."""
        result = self._call(*command)
        assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}\n{self.logs()}"
        return result.stdout

    def _call(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            env=self.environment,
            cwd=self.root,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            check=False,
        )

    def logs(self) -> str:
        """The end of every daemon's log."""
        paths = sorted((self.root / "log").glob("*.txt"))
        return "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in paths
        )

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        """End one daemon, by default as in a power loss; jobs stay alive."""
        daemon = self.daemons.pop(name)
        daemon.send_signal(number)
        daemon.wait()

    def kill_jobs(self, node: str | None = None) -> None:
        """SIGKILL for everything that jobs run on a node (or on all), their step daemons first;
        returns when all of it has ended, which a signal alone does not wait for.

        Looks again until it finds nothing: a process may fork between the look and its end, and
        what it has started is no descendant of a step daemon any more.
        """
        kill_until_gone(lambda: self._list_job_processes(node))

    def _list_job_processes(self, node: str | None) -> list[int]:
        steps = self.list_steps(node)
        below = [one for step in steps for one in list_descendants(step)]
        orphans = [pid for pid in self._list_own(node) if "SLURM_JOB_ID" in read_names(pid)]
        return list(dict.fromkeys((*steps, *below, *orphans)))

    def _list_own(self, node: str | None = None) -> list[int]:
        """Process ids of what was started in the environment of this cluster (and node)."""
        return [
            int(path.parent.name)
            for path in Path("/proc").glob("[0-9]*/environ")
            if self._wanted(node) <= set(read(path).split("\0"))
        ]

    def _wanted(self, node: str | None) -> set[str]:
        """Variables by which a process belongs to this cluster (and node)."""
        wanted = {f"SLURM_CONF={self.root / 'slurm.conf'}"}
        return wanted | (set() if node is None else {f"SLURMD_NODENAME={node}"})

    def list_steps(self, node: str | None = None) -> list[int]:
        """Process ids of this cluster's slurmstepd, found by their environment or that of their
        children.
        """
        wanted = self._wanted(node)
        steps = [
            int(path.parent.name)
            for path in Path("/proc").glob("[0-9]*/comm")
            if read(path) == "slurmstepd\n"
        ]
        return [
            step
            for step in steps
            if any(
                wanted <= set(read(Path(f"/proc/{pid}/environ")).split("\0"))
                for pid in (step, *list_descendants(step))
            )
        ]

    def kill_all(self) -> None:
        """Send SIGKILL to all daemons and jobs, as in a power loss; the folder stays."""
        for daemon in self.daemons.values():
            daemon.kill()
        for daemon in self.daemons.values():
            daemon.wait()
        self.daemons.clear()
        self.kill_jobs()
        kill_until_gone(self._list_own)  # such as what a daemon has forked just before it died


def kill_until_gone(list_pids: Callable[[], list[int]]) -> None:
    """SIGKILL for the listed processes; returns when all have ended and the list is empty."""
    while pids := list_pids():
        pidfds = []
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                pidfds.append(os.pidfd_open(pid))
                signal.pidfd_send_signal(pidfds[-1], signal.SIGKILL)
        for pidfd in pidfds:
            assert select.select([pidfd], [], [], PATIENCE_SECONDS)[0], "a process lives on"
            os.close(pidfd)


def read_names(pid: int) -> set[str]:
    """Names of the variables that a process was started with."""
    return {one.partition("=")[0] for one in read(Path(f"/proc/{pid}/environ")).split("\0")}


def read(path: Path) -> str:
    """The content of a file below `/proc`; empty if its process is gone."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def list_descendants(pid: int) -> list[int]:
    """Children, their children and so on, of every thread."""
    children = [
        int(one)
        for path in Path(f"/proc/{pid}/task").glob("*/children")
        for one in read(path).split()
    ]
    return children + [below for child in children for below in list_descendants(child)]


def find_free_ports(count: int) -> list[int]:
    """Different ports that nobody listens on at this moment, drawn by chance.

    All are below those that the kernel gives away by itself: no connection and no other server of
    the tests takes one of them before a daemon listens on it, or while that daemon is restarted.
    """
    first_given_away = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    candidates = range(first_given_away // 2, first_given_away)
    ports: set[int] = set()
    with ExitStack() as stack:
        while len(ports) < count:
            port = _CHANCE.choice(candidates)
            with contextlib.suppress(OSError):  # somebody listens on it
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
                ports.add(port)
    return sorted(ports)


@contextmanager
def local_slurm(num_nodes: int = 1, slurmd_timeout: int = 30) -> Iterator[LocalSlurm]:
    """A cluster that accepts jobs, and that is gone afterwards with all its jobs. Its folder is
    directly below the system's temporary folder, because a socket's path holds only 107 characters.
    """
    missing = list_missing_packages()
    assert not missing, f"apt-get install {' '.join(missing)}"
    root = Path(tempfile.mkdtemp(prefix="slurm-"))
    root.chmod(0o755)
    cluster = LocalSlurm(root, num_nodes, slurmd_timeout)
    try:
        cluster.configure()
        cluster.start_all()
        yield cluster
    finally:
        cluster.kill_all()
        shutil.rmtree(root)


@pytest.fixture(scope="session")
def shared_slurm() -> Iterator[LocalSlurm]:
    """One cluster of one node for all tests that do not change it."""
    with local_slurm() as cluster:
        yield cluster


@pytest.fixture
def own_slurm() -> Iterator[LocalSlurm]:
    """A cluster that the test may break."""
    with local_slurm() as cluster:
        yield cluster
