"""A private, real Slurm on one machine: munged, slurmctld and several slurmd, started and stopped by the tests.

Design. Nothing is faked but the GPUs and the number of machines: every node ``n1``, ``n2``, ... is a slurmd of its own
on 127.0.0.1 (``slurmd -N n1``), and jobs are really scheduled, signalled, preempted and requeued.

- *Private.* Configuration, key, sockets, state and logs live in one folder; ports are found free at each start.
  Clusters do not see each other, nor a Slurm that the machine already has. Any user can run one: jobs run as that user.
- *Fake GPUs* are links to /dev/null. Slurm asks only that the file of a GPU exists, so neither root nor mknod is
  needed; jobs get ``CUDA_VISIBLE_DEVICES=0,1``, and no program finds a GPU behind it.
- *Three partitions.* ``main``: preempted with 20 s of grace, then requeued. ``nograce``: preempted at once.
  ``urgent``: preempts the other two. Whole nodes are taken with ``--exclusive``.
- *Fast.* A requeued job waits for the life of its credential plus a second; ``cred_expire=5`` is the least that Slurm
  takes, so it runs again after 6 s instead of 121 s. Both schedulers look every second.
- *Accounting* only where asked for (``accounting=True``): MariaDB and slurmdbd in the same folder, so that sacct answers.
  Without it the cluster is one of those whose sacct says "Slurm accounting storage is disabled".
- *Nothing is left behind.* Each process of a cluster names a file of its folder in command line or environment, or
  descends from one that does; `SlurmCluster.stop` ends them all and proves it. Should this process die without it (a
  kill, a timeout of pytest), a reaper does it instead, which waits for the end of a pipe from here.

Source: https://slurm.schedmd.com/slurm.conf.html, https://slurm.schedmd.com/gres.conf.html
"""

from __future__ import annotations

import atexit
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from slurm_accounting import ACCOUNT, Accounting, user_name

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from typing_extensions import Self

T = TypeVar("T")

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "sinfo", "scancel", "scontrol")

DAEMONS = ("munged", "slurmctld", "slurmscriptd", "slurmd", "slurmstepd", "slurmdbd", "mariadbd")

# What a job or a launcher leaves in the environment, and what changes the defaults of Slurm's commands.
FOREIGN_PREFIXES = ("SLURM", "SBATCH_", "SRUN_", "SALLOC_", "SQUEUE_", "SINFO_", "SCANCEL_", "SCONTROL_", "PMI")

# munged and slurmstepd bind Unix sockets in the folder, whose paths may have 108 characters in all; the longest one is
# FOLDER/spool/n1/n1_4294967295.4294967295
LONGEST_FOLDER = 60

SETTINGS = {
    "ClusterName": "hpcds",
    "AuthType": "auth/munge",
    "ProctrackType": "proctrack/linuxproc",
    "TaskPlugin": "task/none",
    "SelectType": "select/cons_tres",
    "SelectTypeParameters": "CR_Core_Memory",
    "DefMemPerCPU": "100",  # without it a job that asks for no memory takes the whole node's
    "GresTypes": "gpu",
    "PreemptType": "preempt/partition_prio",
    "PreemptMode": "REQUEUE",
    "JobRequeue": "1",
    "KillWait": "8",
    "MinJobAge": "3600",  # finished jobs stay readable
    "ReturnToService": "2",
    "MessageTimeout": "30",  # a loaded machine is slow, not broken
    "SlurmctldTimeout": "60",
    "SlurmdTimeout": "15",  # a node whose slurmd is gone is down after about twice that
    "SlurmdParameters": "config_overrides",  # nodes claim more cores and memory than the machine has
    "SchedulerParameters": (
        "bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0,default_queue_depth=1000"
    ),
    "SlurmctldDebug": "verbose",
    "SlurmdDebug": "verbose",
}

# A job without a time limit has no EndTime, which no real cluster allows.
PARTITIONS = """\
PartitionName=main Nodes=ALL Default=YES DefaultTime=60 PriorityTier=1 GraceTime=20 PreemptMode=REQUEUE
PartitionName=nograce Nodes=ALL DefaultTime=60 PriorityTier=1 GraceTime=0 PreemptMode=REQUEUE
PartitionName=urgent Nodes=ALL DefaultTime=60 PriorityTier=10 PreemptMode=OFF
"""


class SlurmCluster:
    """A Slurm of its own in a folder: `start`, use, `stop`; or a ``with`` block."""

    def __init__(
        self,
        folder: Path,
        *,
        nodes: int = 4,
        gpus_per_node: int = 2,
        cpus_per_node: int = 4,
        accounting: bool = False,  # with MariaDB and slurmdbd
        settings: Mapping[str, str] | None = None,  # lines of slurm.conf that replace or join SETTINGS
    ) -> None:
        self.node_names = [f"n{index}" for index in range(1, nodes + 1)]
        self._gpus_per_node = gpus_per_node
        self._cpus_per_node = cpus_per_node
        self._settings = {**SETTINGS, **(settings or {})}
        self._with_accounting = accounting
        self._given_folder = folder
        self.folder = folder
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._reaper: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def conf(self) -> Path:
        """What SLURM_CONF names."""
        return self.folder / "slurm.conf"

    @property
    def jobs_folder(self) -> Path:
        """Where `run` and `submit` run: ``slurm-<job id>.out`` lands here."""
        return self.folder / "jobs"

    @property
    def env(self) -> dict[str, str]:
        """The environment in which Slurm's commands reach this cluster, free of any outer job."""
        env = {key: value for key, value in os.environ.items() if not key.startswith(FOREIGN_PREFIXES)}
        env["SLURM_CONF"] = str(self.conf)
        env["PATH"] = with_sbin(env.get("PATH", os.defpath))
        return env

    # Start and stop

    def start(self, timeout_s: float = 60) -> None:
        """Start every daemon; return when all nodes are idle.

        Raises:
            RuntimeError: the cluster is not up in time, or a daemon ended. The ends of the logs are in the message.

        """
        if self._daemons:
            return
        self._make_folder()
        atexit.register(self.stop)
        self._start_reaper()
        try:
            self._start_munged()
            if self._with_accounting:
                self._start_accounting()
            self._write_configuration()  # finds free ports: the less between this and the daemons, the better
            self._start_daemon("slurmctld", "-D", "-f", str(self.conf))
            for node in self.node_names:
                self._start_slurmd(node)
            self._wait_until_idle(timeout_s)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End every job and every daemon. May be called again.

        Raises:
            RuntimeError: a process of the cluster could not be ended.

        """
        if self._reaper is None:
            return
        slurmctld = self._daemons.get("slurmctld")
        if slurmctld and slurmctld.poll() is None:
            with suppress(RuntimeError, subprocess.TimeoutExpired):  # it may be what is broken
                self.cancel_all(timeout_s=5)
        self._end_daemons()
        left = end_all(lambda: processes_of(self.folder))
        self._stop_reaper()
        atexit.unregister(self.stop)
        if left:
            raise RuntimeError(f"cluster in {self.folder}: processes {left} could not be killed")

    def processes(self) -> list[int]:
        """Every live process of this cluster: daemons, steps, jobs, and commands that talk to it."""
        return processes_of(self.folder)

    # Use

    def run(self, *argv: str, check: bool = True, timeout_s: float = 120, text: str | None = None) -> Completed:
        """Run a command against this cluster; ``text`` is its standard input.

        Raises:
            RuntimeError: ``check`` and the command failed.

        """
        done = subprocess.run(
            argv,
            env=self.env,
            cwd=self.jobs_folder,
            input=text,
            stdin=subprocess.DEVNULL if text is None else None,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(argv)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def submit(self, script_text: str, *args: str) -> str:
        """Give a batch script to sbatch; ``args`` are options of sbatch."""
        answer = self.run("sbatch", "--parsable", *args, text=script_text).stdout
        return answer.strip().partition(";")[0]

    def job(self, job_id: str) -> dict[str, str]:
        """What ``scontrol show job`` says of a job, finished or not."""
        return parse_record(self.run("scontrol", "show", "job", "-o", job_id).stdout)

    def output(self, job_id: str) -> str:
        """What a job submitted without ``--output`` has printed so far."""
        path = self.jobs_folder / f"slurm-{job_id}.out"
        return path.read_text() if path.exists() else ""

    def wait_for(self, predicate: Callable[[], T], timeout_s: float, what: str) -> T:
        """Ask until the answer is true, and return it.

        Raises:
            RuntimeError: it did not become true in time. The queue is in the message.

        """
        end = time.monotonic() + timeout_s
        while not (answer := predicate()):
            if time.monotonic() > end:
                queue = self.run("squeue", "-o", "%i %P %T %r %N", check=False).stdout
                raise RuntimeError(f"{what}: not within {timeout_s} s\n{queue}")
            time.sleep(0.1)
        return answer

    def wait_for_state(self, job_id: str, state: str, timeout_s: float = 30) -> dict[str, str]:
        """Wait until a job is in a state such as ``RUNNING``, and return what scontrol says of it."""

        def in_state() -> dict[str, str] | None:
            job = self.job(job_id)
            return job if job["JobState"] == state else None

        found = self.wait_for(in_state, timeout_s, f"job {job_id} in state {state}")
        assert found is not None
        return found

    # Faults

    def kill_slurmd(self, node: str) -> None:
        """Kill the daemon of a node; its steps run on until Slurm notices, after about 30 s, and calls the node down."""
        daemon = self._daemons.pop(node)
        daemon.kill()
        daemon.wait()

    def kill_node(self, node: str) -> None:
        """What a power cut does: the daemon of a node, its steps and their tasks are gone at once.

        Slurm notices after about 30 s; ``scontrol update NodeName=... State=DOWN Reason=...`` tells it now.
        """
        self.kill_slurmd(node)
        end_all(lambda: processes_of(self.folder, node))

    def restart_slurmd(self, node: str) -> None:
        """Start the daemon of a node again, after killing it if need be; return when the node can take jobs."""
        if node in self._daemons:
            self.kill_slurmd(node)
        self._start_slurmd(node)
        usable = ("idle", "mixed", "allocated", "completing")  # one that does not answer yet has an asterisk
        self._wait_up(lambda: self._node_states().get(node) in usable, 30, f"node {node} back")

    def stop_slurmctld(self) -> None:
        """End the controller in order, as for an upgrade: jobs and steps run on, and Slurm's commands find nobody."""
        daemon = self._daemons.pop("slurmctld")
        daemon.terminate()
        daemon.wait(timeout=60)

    def start_slurmctld(self) -> None:
        """Start the controller again; return when it answers. It knows its jobs from ``StateSaveLocation``."""
        self._start_daemon("slurmctld", "-D", "-f", str(self.conf))
        self._wait_up(lambda: bool(self._node_states()), 60, "slurmctld back")

    def cancel_all(self, timeout_s: float = 30) -> None:
        """End every job now, and wait until the queue is empty.

        Slurm gives even ``scancel --signal=KILL`` a SIGTERM and KillWait first, so the tasks are killed from here, and
        with them any command that still talks to the cluster.
        """

        def queue_empty() -> bool:
            jobs = self.run("squeue", "-h", "-o", "%A", timeout_s=timeout_s).stdout.split()
            if jobs:
                self.run("scancel", *jobs, check=False, timeout_s=timeout_s)
                end_all(lambda: tasks_of(self.folder))
            return not jobs

        self.wait_for(queue_empty, timeout_s, "an empty queue")

    def reset(self) -> None:
        """Make it as new for the next test: no jobs, every daemon there, every node idle."""
        if "slurmctld" not in self._daemons:
            self.start_slurmctld()
        self.cancel_all()
        for node in self.node_names:
            if node not in self._daemons:
                self._start_slurmd(node)
        for node, state in self._node_states().items():
            if state != "idle":
                self.run("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)
        self._wait_until_idle(30)

    # Parts of start and stop

    def _make_folder(self) -> None:
        if len(str(self._given_folder)) > LONGEST_FOLDER:
            self.folder = Path(tempfile.mkdtemp(prefix="hpcds-slurm-", dir="/tmp"))
        names = ["state", "log", "gpu", "jobs", *(f"spool/{node}" for node in self.node_names)]
        for name in names:
            (self.folder / name).mkdir(parents=True, exist_ok=True)

    def _write_configuration(self) -> None:
        ports = free_ports(1 + len(self.node_names))
        self.conf.write_text(self._slurm_conf(ports))
        (self.folder / "gres.conf").write_text(self._gres_conf())

    def _slurm_conf(self, ports: list[int]) -> str:
        host = socket.gethostname().partition(".")[0]
        folder = self.folder
        places = {
            "SlurmctldHost": f"{host}(127.0.0.1)",
            "SlurmctldPort": str(ports[0]),
            "SlurmUser": str(os.getuid()),
            "SlurmdUser": str(os.getuid()),
            "AuthInfo": f"socket={folder}/munge.socket,cred_expire=5",
            "StateSaveLocation": f"{folder}/state",
            "SlurmdSpoolDir": f"{folder}/spool/%n",
            "SlurmctldPidFile": f"{folder}/slurmctld.pid",
            "SlurmdPidFile": f"{folder}/%n.pid",
            "SlurmctldLogFile": f"{folder}/log/slurmctld.log",
            "SlurmdLogFile": f"{folder}/log/%n.log",
        }
        lines = [f"{key}={value}" for key, value in {**places, **self._settings}.items()]
        size = f"Sockets=1 CoresPerSocket={self._cpus_per_node} ThreadsPerCore=1 RealMemory=64000"
        gres = f" Gres=gpu:{self._gpus_per_node}" if self._gpus_per_node else ""
        for node, port in zip(self.node_names, ports[1:], strict=True):
            lines.append(f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} {size}{gres}")
        return "\n".join(lines) + "\n" + PARTITIONS

    def _gres_conf(self) -> str:
        lines = []
        for node in self.node_names:
            for index in range(self._gpus_per_node):
                gpu = self.folder / "gpu" / f"{node}-{index}"
                if not gpu.is_symlink():
                    gpu.symlink_to("/dev/null")
                lines.append(f"NodeName={node} Name=gpu File={gpu}\n")
        return "".join(lines)

    def _start_munged(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        places = {name: f"--{name}-file={self.folder}/munged.{name}" for name in ("pid", "log", "seed")}
        # --force: pytest's folders are closed to other users, and munged says so as an error.
        sock = self.folder / "munge.socket"
        self._start_daemon(
            "munged", "--foreground", "--force", f"--socket={sock}", f"--key-file={key}", *places.values()
        )
        self._wait_up(sock.exists, 20, "munged's socket")

    def _start_accounting(self) -> None:
        accounting = Accounting(self.folder, *free_ports(2))
        self._settings |= accounting.settings
        accounting.prepare(self.env)
        self._start_daemon("mariadbd", *accounting.database(self.env)[1:])
        self._wait_up(accounting.database_is_up, 60, "the database")
        self._write_configuration()  # its clients read slurm.conf; slurmctld gets ports of its own later
        self._start_daemon("slurmdbd", "-D")
        self._wait_up(accounting.slurmdbd_is_up, 60, "slurmdbd")
        cluster = self._settings["ClusterName"]
        account, user = ("account", ACCOUNT, f"Cluster={cluster}"), ("user", user_name(), f"Account={ACCOUNT}")
        for words in (("cluster", cluster), account, user):
            self.run("sacctmgr", "-i", "add", *words)

    def _start_slurmd(self, node: str) -> None:
        # slurmstepd inherits the variable, and so `kill_node` knows its processes.
        self._start_daemon(node, "-D", "-N", node, "-f", str(self.conf), SLURMD_NODENAME=node)

    def _start_daemon(self, name: str, *args: str, **variables: str) -> None:
        program = "slurmd" if name in self.node_names else name
        path = shutil.which(program, path=self.env["PATH"])
        if path is None:
            raise RuntimeError(f"{program}: not installed; run tests/install_system_packages.sh")
        with (self.folder / "log" / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                [path, *args],
                env={**self.env, **variables},
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for pytest, which then stops the cluster in order
            )

    def _end_daemons(self) -> None:
        """Those that need another one end before it."""
        last = [name for name in ("slurmdbd", "mariadbd", "munged") if name in self._daemons]
        together = [name for name in self._daemons if name not in last]
        for names in (together, *([name] for name in last)):
            daemons = [self._daemons.pop(name) for name in names]
            for daemon in daemons:
                daemon.terminate()
            for daemon in daemons:
                with suppress(subprocess.TimeoutExpired):
                    daemon.wait(timeout=5)

    def _wait_up(self, predicate: Callable[[], bool], timeout_s: float, what: str) -> None:
        end = time.monotonic() + timeout_s
        while True:
            ended = [name for name, daemon in self._daemons.items() if daemon.poll() is not None]
            if not ended and predicate():
                return
            if ended or time.monotonic() > end:
                why = f"{', '.join(ended)} ended" if ended else f"not within {timeout_s} s"
                raise RuntimeError(f"cluster in {self.folder}: {what}: {why}\n{self._log_tails()}")
            time.sleep(0.1)

    def _wait_until_idle(self, timeout_s: float) -> None:
        expected = dict.fromkeys(self.node_names, "idle")
        self._wait_up(lambda: self._node_states() == expected, timeout_s, "every node idle")

    def _node_states(self) -> dict[str, str]:
        """Node to state; empty while slurmctld does not answer. ``idle*`` is one that has not reported yet."""
        try:
            done = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T", check=False, timeout_s=3)
        except subprocess.TimeoutExpired:
            return {}
        return dict(line.split() for line in done.stdout.splitlines())

    def _log_tails(self, lines: int = 15) -> str:
        tails = []
        for path in sorted((self.folder / "log").iterdir()):
            tail = path.read_text(errors="replace").splitlines()[-lines:]
            if tail:
                tails.append("\n".join([f"== {path.name}", *tail]))
        return "\n".join(tails)

    def _start_reaper(self) -> None:
        self._reaper = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), str(self.folder), str(self._given_folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _stop_reaper(self) -> None:
        if self._reaper is not None:
            self._reaper.communicate(timeout=30)
            self._reaper = None


Completed = subprocess.CompletedProcess[str]


def with_sbin(path: str) -> str:
    """A PATH on which the daemons are found for users who have no sbin in theirs."""
    return os.pathsep.join([path, "/usr/local/sbin", "/usr/sbin", "/sbin"])


def missing_programs(*programs: str) -> list[str]:
    """Those of the programs that are not installed."""
    path = with_sbin(os.environ.get("PATH", os.defpath))
    return [program for program in programs if shutil.which(program, path=path) is None]


def parse_record(text: str) -> dict[str, str]:
    """One line of ``scontrol show ... -o``; values may hold spaces and equals signs."""
    first_line = text.partition("\n")[0]
    return dict(re.findall(r"(\S+?)=(.*?)(?= +[A-Z][\w:/]*=|$)", first_line.strip()))


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on, below the range from which Linux gives out ports by itself.

    They are drawn by chance, so that two test runs which start together do not find the same ones free.
    """
    taken: list[socket.socket] = []
    candidates = iter(random.SystemRandom().sample(range(12000, 32000), 2000))
    try:
        while len(taken) < count:
            sock = socket.socket()
            taken.append(sock)
            try:
                sock.bind(("", next(candidates)))
            except OSError:
                taken.pop().close()
        return [sock.getsockname()[1] for sock in taken]
    finally:
        for sock in taken:
            sock.close()


@dataclass(frozen=True)
class Process:
    """A live process as /proc shows it."""

    pid: int
    parent: int
    name: str
    words: bytes  # command line and first environment, each word between NULs


def processes_of(folder: Path, node: str | None = None) -> list[int]:
    """Processes that name a file of the cluster's folder in command line or environment, and their descendants.

    With a node, only those of that node. Never this process or one of its ancestors.
    """
    marks = [b"\0SLURM_CONF=%b/" % os.fsencode(folder), b"\0SLURMD_NODENAME=%b\0" % os.fsencode(node)] if node else []
    marks = marks or [b"%b/" % os.fsencode(folder)]
    table = _process_table()
    return _descendants({pid for pid, process in table.items() if all(mark in process.words for mark in marks)}, table)


def tasks_of(folder: Path) -> list[int]:
    """The processes of a cluster without its daemons: batch scripts, tasks, what they started, and clients."""
    table = _process_table()
    return [pid for pid in processes_of(folder) if pid in table and table[pid].name not in DAEMONS]


def end_all(find: Callable[[], list[int]], timeout_s: float = 10) -> list[int]:
    """Kill what is found until nothing is; what is still there after the timeout is returned."""
    end = time.monotonic() + timeout_s
    while (left := find()) and time.monotonic() < end:
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    return left


def _process_table() -> dict[int, Process]:
    """Every process that may be read. The dead ones that nobody waited for are left out."""
    table = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):  # it ended meanwhile, or is another user's
                name, _, rest = (entry / "stat").read_text(errors="replace").partition(" (")[2].rpartition(") ")
                state, parent = rest.split()[:2]
                if state != "Z":
                    words = b"\0".join([b"", (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()])
                    table[int(entry.name)] = Process(int(entry.name), int(parent), name, words)
    return table


def _descendants(roots: set[int], table: Mapping[int, Process]) -> list[int]:
    """The roots and all below them, without this process and those above it."""
    above_me = _line_of(os.getpid(), table)
    roots = roots - above_me
    return sorted(pid for pid in table if pid not in above_me and not roots.isdisjoint(_line_of(pid, table)))


def _line_of(pid: int, table: Mapping[int, Process]) -> set[int]:
    """A process and its ancestors."""
    line: set[int] = set()
    while pid in table and pid not in line:
        line.add(pid)
        pid = table[pid].parent
    return line


def reap(folder: Path, given_folder: Path) -> None:
    """Wait until whoever started this has closed the pipe or died, then remove what is left of its cluster."""
    sys.stdin.buffer.read()
    end_all(lambda: processes_of(folder))
    if folder != given_folder:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    reap(Path(sys.argv[1]), Path(sys.argv[2]))
