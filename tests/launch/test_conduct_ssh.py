"""Launches over a real sshd of the test's own on 127.0.0.1: as any user, and without any file of the user's.

Not even the shell's: a ``.bashrc`` may take locks (pyenv's waits a minute for one that a killed session has left).
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from launches import MARK, Launch, python, wait_until
from slurm_cluster import free_ports, with_sbin

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.ssh

SSHD_CONFIG = """\
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
PidFile none
StrictModes no
UsePAM no
PermitRootLogin yes
PasswordAuthentication no
KbdInteractiveAuthentication no
SetEnv {mark}={mark_of} HOME={folder}
"""
SSH_CONFIG = """\
Host refused
  User nobody-of-this-name
Host closed
  Port 1
Host *
  User {user}
  HostName 127.0.0.1
  Port {port}
  IdentityFile {folder}/user
  IdentitiesOnly yes
  StrictHostKeyChecking no
  UserKnownHostsFile {folder}/known
"""


class Sshd:
    """One sshd, in whose sessions a variable says whose they are."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mark = uuid.uuid4().hex
        self.port = free_ports(1)[0]
        for name in ("host", "user"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
        given = {"port": self.port, "folder": folder, "user": getpass.getuser(), "mark": MARK, "mark_of": self.mark}
        (folder / "sshd_config").write_text(SSHD_CONFIG.format(**given), encoding="utf-8")
        (folder / "config").write_text(SSH_CONFIG.format(**given), encoding="utf-8")
        program = shutil.which("sshd", path=with_sbin(os.environ.get("PATH", os.defpath)))
        assert program is not None
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, parents=True, exist_ok=True)
        command = [program, "-D", "-e", "-f", str(folder / "sshd_config")]
        with (folder / "sshd.log").open("wb") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=log)
        wait_until(self._answers)

    def _answers(self) -> bool:
        assert self.process.poll() is None, (self.folder / "sshd.log").read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def launch(self, folder: Path, command: list[str], names: list[str], **fields: Any) -> Launch:
        """One rank on each host, over this sshd."""
        config = ["-F", str(self.folder / "config")]
        if fields.get("launcher") == "pdsh":
            fields["environ"] = {"PDSH_SSH_ARGS_APPEND": " ".join(config)}
        else:
            fields |= {"launcher": "ssh", "launcher_args": config}
        launch = Launch(folder, command, [1] * len(names), names=names, **fields)
        launch.marks.append(self.mark)
        return launch

    def sessions(self) -> list[int]:
        """The processes of sshd that serve a connection each."""
        below = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True, check=False)
        return [int(pid) for pid in below.stdout.split()]


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    sshd = Sshd(tmp_path_factory.mktemp("sshd"))
    yield sshd
    for pid in sshd.sessions():
        os.kill(pid, signal.SIGKILL)
    sshd.process.kill()
    sshd.process.wait()


def test_ranks_on_two_hosts_are_as_those_on_one(sshd: Sshd, tmp_path: Path) -> None:
    values = ["two\nlines 'x' \"y\" $HOME,\\", "\udcff"]
    rank = """
catch("USR1", "INT")
print(os.getcwd(), rank, size, os.environ["LOCAL_RANK"], os.environ["MASTER_ADDR"], "SSH_CONNECTION" in os.environ, flush=True)
with open(f"told-{rank}", "wb") as file:
    file.write(os.fsencode(sys.argv[1]) + os.fsencode(os.environ["V"]))
note(os.getpid())
note("ready")
while True:
    time.sleep(1000)
"""
    with sshd.launch(tmp_path, [*python(rank), values[0]], ["w1", "w2"], env={"V": values[1]}, prefix=True) as launch:
        launch.wait_for("ready")
        launch.process.send_signal(signal.SIGUSR1)
        launch.wait_for("USR1")
        assert len(sshd.sessions()) == 2
        os.kill(int(launch.notes(1)[0]), signal.SIGKILL)
        launch.finish()
        assert launch.left() == []
    assert (launch.code, launch.last_line) == (137, "hpcds run: rank 1 on w2: killed by SIGKILL (out of memory?)")
    lines = sorted(launch.out.decode().splitlines())
    assert lines == [f"[rank {rank}] {tmp_path} {rank} 2 0 127.0.0.1 True" for rank in range(2)]
    assert (tmp_path / "told-1").read_bytes() == b"".join(map(os.fsencode, values))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("refused", "Permission denied"),
        ("closed", "Connection refused"),
    ],
)
def test_a_host_that_does_not_let_us_in_is_named(sshd: Sshd, tmp_path: Path, name: str, words: str) -> None:
    with sshd.launch(tmp_path, ["sleep", "1000"], ["w1", name]) as launch:
        launch.finish()
    assert launch.code == 1
    assert launch.last_line.startswith(f"hpcds: host {name!r}: no agent has come (ssh {name}: exit code 255: ")
    assert words in launch.last_line


def test_a_host_without_our_python_is_named(sshd: Sshd, tmp_path: Path) -> None:
    # A Python that only this side has: a link that is gone when the other side looks.
    gone = tmp_path / "python"
    gone.symlink_to(sys.executable)
    with sshd.launch(tmp_path, ["true"], ["w1"], python=str(gone)) as launch:
        launch.finish()
    assert launch.code == 1
    assert launch.last_line.startswith("hpcds: host 'w1': no agent has come (ssh w1: exit code 12")
    assert f"{gone}: " in launch.last_line


def test_a_host_whose_connection_is_lost_is_named_and_ends_its_ranks(sshd: Sshd, tmp_path: Path) -> None:
    rank = 'catch("TERM", call=lambda: sys.exit(0))\nnote("ready")\ntime.sleep(1000)'
    with sshd.launch(tmp_path, python(rank), ["w1", "w2"]) as launch:
        launch.wait_for("ready")
        os.kill(sshd.sessions()[0], signal.SIGKILL)
        launch.finish()
        wait_until(lambda: not launch.left())
    assert launch.code == 1
    assert "lost with its ranks (ssh w" in launch.last_line
    assert [launch.notes(rank) for rank in range(2)] == [["ready", "TERM"]] * 2


def test_a_killed_launcher_leaves_nothing_on_other_hosts(sshd: Sshd, tmp_path: Path) -> None:
    rank = 'catch("TERM")\nnote("ready")\nwhile True: time.sleep(1000)'
    with sshd.launch(tmp_path, python(rank), ["w1", "w2"], grace_s=0.5) as launch:
        launch.wait_for("ready")
        launch.process.kill()
        wait_until(lambda: not launch.left())
    assert launch.notes(0) == ["ready", "TERM"]


def test_pdsh_brings_agents_too(sshd: Sshd, tmp_path: Path) -> None:
    rank = 'note("ready")\nmeet()\nsys.exit(75 * rank)'
    with sshd.launch(tmp_path, python(rank), ["w1", "w2"], launcher="pdsh") as launch:
        assert launch.finish().code == 75
        assert launch.left() == []
    with sshd.launch(tmp_path, ["sleep", "1000"], ["w1", "refused"], launcher="pdsh") as launch:
        assert launch.finish().code == 1
    assert launch.last_line.startswith("hpcds: agents: not all can come (pdsh: ")
    assert "Permission denied" in launch.last_line


def test_many_hosts_come_a_few_at_a_time(sshd: Sshd, tmp_path: Path) -> None:
    names = [f"w{index}" for index in range(4)]
    with sshd.launch(tmp_path, ["sh", "-c", "echo $RANK"], names) as launch:
        launch.finish()
    assert sorted(launch.out.split()) == [b"0", b"1", b"2", b"3"]
