"""Whole launches on this machine: exit codes, what ranks are given, what they leave, and where their words go."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from launches import Launch, launched, python, wait_until

if TYPE_CHECKING:
    from pathlib import Path


PER_RANK = {"environs": {}, "per_rank": True}


@pytest.mark.parametrize(
    ("ends", "code", "words"),
    [
        ("exit 0", 0, ""),
        ("exit $((RANK * 75))", 75, ""),
        ("[ $RANK = 0 ] && exit 75; exit 7", 7, "rank 1 on localhost: exit code 7"),
        (
            "[ $RANK = 1 ] && kill -9 $$; exec sleep 1000",
            137,
            "rank 1 on localhost: killed by SIGKILL (out of memory?)",
        ),
    ],
)
def test_the_exit_code_is_that_of_the_rank_that_failed_first(tmp_path: Path, ends: str, code: int, words: str) -> None:
    launch = launched(tmp_path, ["bash", "-c", ends])
    assert launch.code == code
    assert launch.last_line == (f"hpcds run: {words}" if words else "")


def test_a_failure_ends_the_others_and_what_they_have_started(tmp_path: Path) -> None:
    # Rank 0 wants to live on, and has a child, a daemon in its session, and one that has left it.
    stubborn = """
import subprocess
if rank == 0:
    catch("TERM")
    subprocess.Popen(["sh", "-c", "trap '' TERM; sleep 1000 & sleep 1000"])
    subprocess.Popen(["sh", "-c", "sleep 1000 & exit"])
    subprocess.Popen(["setsid", "sh", "-c", "trap '' TERM; sleep 1000 & exit"])
meet()
if rank == 1:
    sys.exit(3)
while True:
    time.sleep(1000)
"""
    launch = launched(tmp_path, python(stubborn), grace_s=1.0)
    assert launch.code == 3
    assert launch.err.splitlines() == [
        "hpcds run: rank 1 on localhost: exit code 3; the others are told to end",
        "hpcds run: rank 1 on localhost: exit code 3",
    ]
    assert launch.notes(0) == ["here", "TERM"]


# Values that a shell, srun --export, ssh or a list with commas would change.
VALUES = [
    "",
    " two  words ",
    "a,b",
    'it\'s "quoted" $HOME `x` \\n',
    "two\nlines\n",
    "ünï©ode 火",
    "not utf-8: \udcff\udc80",
    "=",
    "%n %%",
]


def test_arguments_and_environment_arrive_byte_for_byte(tmp_path: Path) -> None:
    tell = """
import json
told = {"argv": [os.fsencode(word).hex() for word in sys.argv[1:]],
        "env": {name.hex(): value.hex() for name, value in os.environb.items()}, "cwd": os.getcwd(),
        "stdin": os.readlink("/proc/self/fd/0"), "open": len(os.listdir("/proc/self/fd")), "session": os.getsid(0) == os.getpid()}
json.dump(told, open(f"told-{rank}", "w"))
"""
    env = {f"V{index}": value for index, value in enumerate(VALUES)}
    launched(tmp_path, [*python(tell), *VALUES], env=env, environ={"MINE": "kept", "HPCDS_TOKEN": "secret"})
    for rank in range(2):
        told = json.loads((tmp_path / f"told-{rank}").read_text(encoding="utf-8"))
        given = {os.fsdecode(bytes.fromhex(k)): os.fsdecode(bytes.fromhex(v)) for k, v in told["env"].items()}
        assert [os.fsdecode(bytes.fromhex(word)) for word in told["argv"]] == VALUES
        assert {name: given[name] for name in env} == env
        assert (given["RANK"], given["LOCAL_RANK"], given["WORLD_SIZE"], given["MINE"]) == (
            str(rank),
            str(rank),
            "2",
            "kept",
        )
        assert (given["MASTER_ADDR"], given["PYTHONUNBUFFERED"]) == ("127.0.0.1", "1")
        assert int(given["MASTER_PORT"]) > 1023
        assert "HPCDS_TOKEN" not in given
        assert (told["cwd"], told["stdin"], told["session"]) == (str(tmp_path), "/dev/null", True)
        assert told["open"] == 4  # and the folder of descriptors itself


@pytest.mark.parametrize(("length", "agents"), [(10_000_000, {}), (2_000_000, {"starter": "tcp", "options": PER_RANK})])
def test_lines_of_ranks_are_not_torn(tmp_path: Path, length: int, agents: dict[str, Any]) -> None:
    write = """
length = int(sys.argv[1])
meet()
letter = b"ab"[rank:rank + 1]
for _ in range(200):
    os.write(1, letter * 10)
    time.sleep(0.001)
    os.write(1, letter * 10 + b"\\n")
for _ in range(2):
    long = memoryview(letter * length + b"\\n")
    while long:
        long = long[os.write(1, long):]
os.write(1, letter * 5)
"""
    launch = launched(tmp_path, [*python(write), str(length)], **agents)
    assert launch.code == 0
    lengths = {
        letter: sorted(len(line) for line in launch.out.splitlines() if line[:1] == letter) for letter in (b"a", b"b")
    }
    assert set(re.findall(rb"ab|ba", launch.out)) == set()
    for letter in (b"a", b"b"):
        assert lengths[letter] == [5] + [20] * 200 + [length] * 2


def test_output_is_passed_on_byte_for_byte(tmp_path: Path) -> None:
    write = """
data = bytes(range(256)) * 4096
os.write(2, b"10%\\r")
while data:
    data = data[os.write(1, data):]
os.write(2, b"20%\\r100%\\r\\n\\n")
os.write(2, b"no end")
"""
    launch = launched(tmp_path, python(write), ranks=[1])
    assert launch.code == 0
    assert launch.out == bytes(range(256)) * 4096
    assert launch.err == "10%\r20%\r100%\r\n\nno end"


def test_a_partial_line_is_shown_while_its_rank_waits(tmp_path: Path) -> None:
    ask = """
os.write(1, b"name? ")
while not os.path.exists("answered"):
    time.sleep(0.01)
os.write(1, b"thanks\\n")
"""
    with Launch(tmp_path, python(ask), ranks=[1], prefix=True) as launch:
        seen = b""
        while not seen.endswith(b"? "):
            seen += os.read(launch.process.stdout.fileno(), 100)
        (tmp_path / "answered").touch()
        launch.finish()
    assert seen + launch.out == b"[rank 0] name? thanks\n"


def test_output_that_nobody_reads_makes_ranks_wait(tmp_path: Path) -> None:
    write = """
for count in range(200):
    data = b"x" * 999_999 + b"\\n"
    while data:
        data = data[os.write(1, data):]
    with open("written.new", "w") as file:
        file.write(str(count + 1))
    os.rename("written.new", "written")
"""
    with Launch(tmp_path, python(write), ranks=[1]) as launch:
        written = tmp_path / "written"
        wait_until(written.exists)
        before, count = -1, int(written.read_text())
        while count != before:
            subprocess.run(["sleep", "1"], check=True)
            before, count = count, int(written.read_text())
        assert count < 100
        launch.finish()
    assert (launch.code, len(launch.out)) == (0, 200_000_000)


def test_a_launch_that_is_told_to_end_does_not_wait_for_its_reader(tmp_path: Path) -> None:
    with Launch(tmp_path, ["bash", "-c", "echo $RANK > notes-$RANK; exec yes"], grace_s=0.5) as launch:
        wait_until(lambda: launch.notes(0) and launch.notes(1))
        launch.process.terminate()
        wait_until(lambda: launch.process.poll() is not None)
        assert (launch.process.returncode, launch.left()) == (143, [])


def test_an_end_of_the_reader_ends_the_launch(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    with Launch(tmp_path, ["yes"], stdout=writer) as launch:
        os.close(writer)
        os.read(reader, 10)
        os.close(reader)
        launch.finish()
    assert (launch.code, launch.err) == (141, "")


def test_each_rank_has_a_log_where_one_is_asked_for(tmp_path: Path) -> None:
    launch = launched(tmp_path, ["bash", "-c", "echo out $RANK; echo err $RANK >&2"], log_dir="logs/new")
    assert (launch.code, launch.out, launch.err) == (0, b"", "")
    logs = sorted((tmp_path / "logs" / "new").iterdir())
    assert [re.sub(r"^\d{14}_", "", log.name) for log in logs] == ["rank0.log", "rank1.log"]
    assert [log.read_text() for log in logs] == ["out 0\nerr 0\n", "out 1\nerr 1\n"]


def test_a_script_is_sourced_before_the_command(tmp_path: Path) -> None:
    (tmp_path / "activate").write_text("export FROM='a script'\n")
    launch = launched(
        tmp_path, ["bash", "-c", 'echo "$FROM" "$1"', "x", "two  words"], ranks=[1], venv_script="activate"
    )
    assert (launch.code, launch.out) == (0, b"a script two  words\n")


def test_a_script_that_is_sourced_sees_no_arguments_and_cannot_change_the_command(tmp_path: Path) -> None:
    """As conda's activate, which reads its arguments, and others that set their own."""
    (tmp_path / "activate").write_text('echo "$#"; set -u; set -- a b; declare -x FROM=there\n')
    tell = ["bash", "-c", 'echo "$FROM" "$1"', "x", "two  words"]
    launch = launched(tmp_path, tell, ranks=[1], venv_script="activate")
    assert (launch.code, launch.out) == (0, b"0\nthere two  words\n")


def test_many_ranks_need_no_higher_limit_of_open_files_and_are_given_none(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    try:
        launch = launched(tmp_path, ["sh", "-c", "ulimit -Sn"], ranks=[100])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert (launch.code, launch.out) == (0, b"64\n" * 100)


def test_ranks_have_cores_of_their_own(tmp_path: Path) -> None:
    ours = sorted(os.sched_getaffinity(0))
    tell = ["bash", "-c", 'echo $OMP_NUM_THREADS; taskset -cp $$ | sed "s/.*: //"']
    launch = launched(tmp_path, tell, ranks=[1], bind_cores=True, core_list=str(ours[-1]))
    assert launch.out == f"1\n{ours[-1]}\n".encode()
    foreign = max(ours) + 1
    launch = launched(tmp_path, tell, ranks=[1], bind_cores=True, core_list=f"{ours[-1]},{foreign}")
    assert launch.code == 1
    assert f"core list '{ours[-1]},{foreign}': {foreign} not among the cores that may be used here" in launch.last_line
    launch = launched(tmp_path, tell, ranks=[1], bind_cores=True, env={"KMP_AFFINITY": "compact"})
    assert launch.last_line.startswith("hpcds: KMP_AFFINITY 'compact': ")


@pytest.mark.parametrize(
    ("command", "fields", "words"),
    [
        (["no-such-program"], {}, "rank 0 on {host}: 'no-such-program': No such file or directory"),
        (["true"], {"cwd": "/no/such/folder"}, "rank 0 on {host}: '/no/such/folder': No such file or directory"),
        (["true"], {"log_dir": "/proc/no"}, "rank 0 on {host}: '/proc/no': No such file or directory"),
    ],
)
def test_a_rank_that_cannot_be_started_is_named(
    tmp_path: Path, command: list[str], fields: dict[str, str], words: str
) -> None:
    launch = launched(tmp_path, command, **fields)
    assert launch.code == 1
    assert launch.last_line.startswith(f"hpcds: {words.format(host=os.uname().nodename)}")


def test_two_launches_have_two_ports_and_a_port_that_is_taken_is_refused(tmp_path: Path) -> None:
    wait = python("""
note(os.environ["MASTER_PORT"])
while not os.path.exists("../go"):
    time.sleep(0.01)
""")
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    with Launch(folders[0], wait) as one, Launch(folders[1], wait) as two:
        wait_until(lambda: one.notes(0) and two.notes(0))
        assert one.notes(0) != two.notes(0)
        taken = launched(tmp_path, ["true"], master_port=int(one.notes(0)[0]))
        (tmp_path / "go").touch()
        assert (one.finish().code, two.finish().code) == (0, 0)
    assert taken.code == 1
    assert taken.last_line.startswith(f"hpcds: master port {one.notes(0)[0]}: in use on ")


@pytest.mark.ranks
def test_torch_can_listen_on_the_reserved_port(tmp_path: Path) -> None:
    store = """
import os
from torch.distributed import TCPStore
store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), 2, os.environ["RANK"] == "0")
store.set(os.environ["RANK"], "here")
print(store.get(str(1 - int(os.environ["RANK"]))))
"""
    launch = launched(tmp_path, [sys.executable, "-c", store])
    assert (launch.code, launch.out) == (0, b"b'here'\n" * 2)
