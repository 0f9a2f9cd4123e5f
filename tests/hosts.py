"""Several hosts on one machine, for what starts ranks over ssh: network namespaces, each with an sshd of its own.

Design. A host ``w1``, ``w2``, ... is a set of Linux namespaces: its own network (``eth0`` at 10.77.0.1, .2, ... on a
switch that all share), its own host name, its own ``/etc/hosts``, ``/run`` and ``/dev/shm``; all other files are those
of this machine. What is real: ssh, its keys, routes, ports, refused and lost connections.

- *Private.* No interface, address, name or file outside the namespaces and one folder; any number of harnesses run
  side by side. Inside, plain ``ssh w2`` works for every program, with no option: ``/etc/ssh/ssh_config`` is the
  harness's, and root's home is an empty folder of it, whose shell reads nobody's ``.bashrc``. Outside, nothing is
  reached: programs run on a host by `Hosts.run_on` and `Hosts.start_on`.
- *As unkind as Debian.* A host's own name resolves to 127.0.1.1 on itself. ``w99`` has an address where nobody answers.
- *Nothing is left behind.* Each host is held by an anchor: a process that waits for the end of a pipe from here, then
  kills whatever lives in its namespaces, and ends; with it the kernel removes them. Hence also after a kill of pytest.
  What is left where the anchors were killed too, the next harness removes.

Needs root, for namespaces and for sshd.

Source: https://man7.org/linux/man-pages/man7/namespaces.7.html
"""

from __future__ import annotations

import atexit
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slurm_cluster import end_all, missing_programs, with_sbin

if TYPE_CHECKING:
    from collections.abc import Mapping

    from typing_extensions import Self

PROGRAMS = ("ip", "unshare", "nsenter", "sshd", "ssh", "ssh-keygen", "pdsh", "mpirun.openmpi", "mpiexec.mpich")

NETWORK = "10.77.0."
NOBODY = "w99"  # its address is in no host's possession

# In the environment of every process of a harness, and in the command line of its sshd, which wipes its own: whose it is.
MARK = "HOSTS_OF"

SSH_CONFIG = """\
Host *
    User root
    IdentityFile {folder}/id
    IdentitiesOnly yes
    UserKnownHostsFile {folder}/known_hosts
    StrictHostKeyChecking yes
    BatchMode yes
    ConnectTimeout 20
    LogLevel ERROR
"""

SSHD_CONFIG = """\
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/id.pub
PermitRootLogin yes
PasswordAuthentication no
KbdInteractiveAuthentication no
StrictModes no
UsePAM no
UseDNS no
PidFile none
MaxStartups 1000
LogLevel VERBOSE
"""


def why_not() -> str:
    """Why there can be no hosts on this machine; empty where there can."""
    if missing := missing_programs(*PROGRAMS):
        return f"{', '.join(missing)}: not installed; run tests/install_system_packages.sh"
    if os.geteuid() != 0:
        return "network namespaces with sshd: need root"
    done = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "ip", "link", "add", "bridge0", "type", "bridge"],
        env={**os.environ, "PATH": with_sbin(os.environ.get("PATH", os.defpath))},
        capture_output=True,
        text=True,
        check=False,
    )
    return f"network namespaces: not permitted here: {done.stderr.strip()}" if done.returncode else ""


class Hosts:
    """Hosts ``w1`` to ``w<count>`` in a folder: `start`, use, `stop`; or a ``with`` block."""

    def __init__(self, folder: Path, count: int = 3) -> None:
        self.folder = folder / "hosts"
        self.names = [f"w{index}" for index in range(1, count + 1)]
        self._anchors: list[subprocess.Popen[bytes]] = []  # the last one is the switch
        self._sshd: dict[int, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def ssh_config(self) -> Path:
        """What ``ssh -F`` takes; on a host it is the default."""
        return self.folder / "ssh_config"

    @property
    def home(self) -> Path:
        """The home of root on all hosts."""
        return self.folder / "home"

    def address(self, index: int) -> str:
        """The address of a host's eth0."""
        return f"{NETWORK}{index + 1}"

    # Start and stop

    def start(self) -> None:
        """Start every host; return when all of them take connections."""
        remove_stale()
        self.folder.mkdir(parents=True)
        self._write_keys()
        atexit.register(self.stop)
        try:
            for name in [*self.names, "switch"]:
                self._start_anchor(name)
            self._connect()
            for index in range(len(self.names)):
                self.start_sshd(index)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End everything that runs on the hosts, and the hosts. May be called again.

        Raises:
            RuntimeError: a process of a host could not be ended.

        """
        anchors, self._anchors = self._anchors, []
        networks = [network_of(anchor.pid) for anchor in anchors]
        for anchor in anchors:
            with suppress(BrokenPipeError):
                _pipe(anchor).close()
        for process in [*anchors, *self._sshd.values()]:
            process.wait(timeout=60)
        self._sshd.clear()
        atexit.unregister(self.stop)
        if left := end_all(lambda: [pid for network in networks for pid in processes_in(network)]):
            raise RuntimeError(f"hosts in {self.folder}: processes {left} could not be killed")

    # Use

    def run_on(
        self, index: int, argv: list[str], env: Mapping[str, str] | None = None, *, timeout_s: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """Run a program on a host, and return what it said."""
        started = self.start_on(index, argv, env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            out, err = started.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            started.kill()
            out, err = started.communicate()
            raise RuntimeError(f"{argv} on {self.names[index]}: not within {timeout_s} s\n{out}{err}") from None
        return subprocess.CompletedProcess(argv, started.returncode, out, err)

    def start_on(
        self, index: int, argv: list[str], env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[Any]:
        """Start a program on a host, in the folder ``cwd`` or this one; the process is the program itself.

        Args:
            index: of the host, from 0.
            argv: the program and its arguments.
            env: variables on top of this process's.
            options: of ``subprocess.Popen``.

        """
        cwd = str(options.pop("cwd", Path.cwd()))
        enter = ["nsenter", f"--target={self._anchors[index].pid}", "--net", "--uts", "--mount", "--"]
        own = {"PATH": with_sbin(os.environ.get("PATH", os.defpath)), "HOME": str(self.home), MARK: me()}
        return subprocess.Popen(
            [*enter, "env", f"--chdir={cwd}", *argv],
            env={**os.environ, **own, **(env or {})},
            **{"stdin": subprocess.DEVNULL, **options},
        )

    def processes(self, index: int) -> dict[int, str]:
        """What runs on a host, pid to command line; not what keeps it up: its sshd, and connections that end."""
        own = {self._anchors[index].pid}
        found = {pid: command_of(pid) for pid in processes_in(network_of(self._anchors[index].pid)) if pid not in own}
        return {pid: command for pid, command in found.items() if command and not command.startswith("sshd: ")}

    def left(self, timeout_s: float = 60) -> list[str]:
        """Wait until nothing runs on any host, and return what still does then."""
        end = time.monotonic() + timeout_s
        while True:
            left = [
                f"{name}: {pid} {command}"
                for index, name in enumerate(self.names)
                for pid, command in self.processes(index).items()
            ]
            if not left or time.monotonic() > end:
                return left
            time.sleep(0.05)

    # Faults

    def kill_host(self, index: int) -> None:
        """Kill everything that runs on a host but its sshd."""
        end_all(lambda: list(self.processes(index)))

    def set_link(self, index: int, *, up: bool) -> None:
        """Pull, or put back, the network cable of a host: no connection ends, nothing arrives."""
        self._on_switch("ip", "link", "set", f"to{index + 1}", "up" if up else "down")

    def stop_sshd(self, index: int) -> None:
        """Connections to this host are refused from now on; those that exist go on."""
        sshd = self._sshd.pop(index)
        sshd.terminate()
        sshd.wait(timeout=60)

    def start_sshd(self, index: int, port: int = 22) -> None:
        """Start the sshd of a host; return when it takes connections."""
        # sshd starts itself again for each connection, and wants to know where it is.
        program = shutil.which("sshd", path=with_sbin(os.environ.get("PATH", os.defpath))) or "/usr/sbin/sshd"
        log = self.folder / f"sshd-{self.names[index]}.log"
        argv = [program, "-D", "-f", str(self.folder / "sshd_config"), "-E", str(log), "-p", str(port)]
        argv += ["-o", f"SetEnv={MARK}={me()}"]
        sshd = self._sshd[index] = self.start_on(index, argv, cwd=self.folder, start_new_session=True)
        _wait_for(lambda: sshd.poll() is not None or listens(sshd.pid, port), "an sshd that listens")
        if sshd.poll() is not None:
            raise RuntimeError(f"{' '.join(argv)}: exit code {sshd.returncode}\n{log.read_text()}")

    # Parts of start

    def _write_keys(self) -> None:
        for name in ("id", "host_key"):
            argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name)]
            subprocess.run(argv, check=True)
        key = (self.folder / "host_key.pub").read_text()
        (self.folder / "known_hosts").write_text(f"* {key}")
        self.ssh_config.write_text(SSH_CONFIG.format(folder=self.folder))
        (self.folder / "sshd_config").write_text(SSHD_CONFIG.format(folder=self.folder))
        self.home.mkdir()
        users = [line.split(":") for line in Path("/etc/passwd").read_text().splitlines()]
        own = [[*user[:5], str(self.home), "/bin/sh"] if user[0] == "root" else user for user in users]
        (self.folder / "passwd").write_text("".join(f"{':'.join(user)}\n" for user in own))
        others = [f"{self.address(index)} {name}" for index, name in enumerate(self.names)] + [f"{NETWORK}99 {NOBODY}"]
        for name in self.names:
            lines = ["127.0.0.1 localhost", f"127.0.1.1 {name}", *(line for line in others if line.split()[1] != name)]
            (self.folder / f"{name}.hosts").write_text("\n".join(lines) + "\n")

    def _start_anchor(self, name: str) -> None:
        anchor = subprocess.Popen(
            ["unshare", "--net", "--uts", "--mount", sys.executable, __file__, name, str(self.folder)],
            env={**os.environ, "PATH": with_sbin(os.environ.get("PATH", os.defpath)), MARK: me()},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for pytest
        )
        self._anchors.append(anchor)
        if anchor.stdout is None or anchor.stdout.readline() != b"up\n":
            raise RuntimeError(f"host {name}: could not be made")

    def _connect(self) -> None:
        """Each host's eth0 at the other end of a cable to the switch."""
        self._on_switch("ip", "link", "add", "switch", "type", "bridge")
        self._on_switch("ip", "link", "set", "switch", "up")
        for index in range(len(self.names)):
            pid, port = str(self._anchors[index].pid), f"to{index + 1}"
            self._on_switch("ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", pid)
            self._on_switch("ip", "link", "set", port, "master", "switch", "up")
            for words in (["addr", "add", f"{self.address(index)}/24", "dev", "eth0"], ["link", "set", "eth0", "up"]):
                done = self.run_on(index, ["ip", *words])
                if done.returncode:
                    raise RuntimeError(f"ip {' '.join(words)}: {done.stderr}")

    def _on_switch(self, *argv: str) -> None:
        done = self.run_on(-1, list(argv))
        if done.returncode:
            raise RuntimeError(f"{' '.join(argv)}: {done.stderr}")


def me() -> str:
    """This process, so that no later one is taken for it: pid and time of its start."""
    return mark_of(os.getpid())


def mark_of(pid: int) -> str:
    """Pid and time of the start of a process; empty if there is none."""
    with suppress(OSError):
        return f"{pid}-{Path(f'/proc/{pid}/stat').read_text().rpartition(') ')[2].split()[19]}"
    return ""


def network_of(pid: int) -> str:
    """The network namespace of a process; empty if it has ended."""
    with suppress(OSError):
        return str(Path(f"/proc/{pid}/ns/net").readlink())
    return ""


def processes_in(network: str) -> list[int]:
    """The live processes of a network namespace."""
    pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return [pid for pid in pids if network and network_of(pid) == network]


def command_of(pid: int) -> str:
    """The command line of a process; empty if it has ended, or is a daemon that a test did not start."""
    with suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        return "" if "/sshd -D -f " in words else words
    return ""


def listens(pid: int, port: int) -> bool:
    """Whether somebody listens on a TCP port in the network namespace of a process."""
    with suppress(OSError):
        lines = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
        return any(words[1].endswith(f":{port:04X}") and words[3] == "0A" for words in lines)
    return False


def remove_stale() -> None:
    """End what harnesses have left whose pytest is gone and whose anchors were killed."""
    here = network_of(os.getpid())
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (owner := _owner_of(entry)) and mark_of(int(owner.partition("-")[0])) != owner:
            network = network_of(int(entry.name))
            if network != here:
                end_all(lambda network=network: processes_in(network))


def _owner_of(entry: Path) -> str:
    with suppress(OSError):
        words = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
        if found := re.search(rf"{MARK}=(\d+-\d+)".encode(), words):
            return found[1].decode()
    return ""


def _pipe(anchor: subprocess.Popen[bytes]) -> Any:
    if anchor.stdout is not None:
        anchor.stdout.close()
    return anchor.stdin


def _wait_for(predicate: Any, what: str, timeout_s: float = 60) -> None:
    end = time.monotonic() + timeout_s
    while not predicate():
        if time.monotonic() > end:
            raise RuntimeError(f"{what}: not within {timeout_s} s")
        time.sleep(0.02)


def hold(name: str, folder: Path) -> None:
    """Be the anchor of a host: make it, hold it until whoever started this is gone, then end all that runs on it."""
    if name != "switch":
        socket.sethostname(name)
        mounts = [
            ["mount", "-t", "tmpfs", "tmpfs", "/run"],
            ["mount", "-t", "tmpfs", "tmpfs", "/dev/shm"],  # noqa: S108 - it is the one of the namespace
            ["mount", "--bind", str(folder / f"{name}.hosts"), "/etc/hosts"],
            ["mount", "--bind", str(folder / "ssh_config"), "/etc/ssh/ssh_config"],
            ["mount", "--bind", str(folder / "passwd"), "/etc/passwd"],
        ]
        for argv in mounts:
            subprocess.run(argv, check=True)
        Path("/run/sshd").mkdir(mode=0o755)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdout.write("up\n")
    sys.stdout.flush()
    sys.stdin.buffer.read()
    mine = network_of(os.getpid())
    end_all(lambda: [pid for pid in processes_in(mine) if pid != os.getpid()])


if __name__ == "__main__":
    hold(sys.argv[1], Path(sys.argv[2]))
