"""``hpcds doctor`` for real: on this machine, and over ssh on hosts of which one is ill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from hpc_ds.cli.main import app

if TYPE_CHECKING:
    from pathlib import Path

    from hosts import Hosts

DOCTOR = [sys.executable, "-m", "hpc_ds", "doctor"]
ENV = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
SHM = "/dev/shm"  # noqa: S108 - each host has one of its own
WRONG = {
    "train.py": "'train.py': hpcds doctor runs no script; leave it out",
    "--module": "--module: is for the script of hpcds run; leave it out",
    "--slow often": "--slow 'often': neither warn nor fail; use one of them",
    "--nodes 2": "--nodes: no such option",
    "-Hno-such-file": "hostfile 'no-such-file': No such file or directory",
}


def failures(data: dict[str, Any]) -> list[tuple[str, str]]:
    return [(one["node"], one["check"]) for one in data["findings"] if one["level"] == "fail"]


@pytest.mark.parametrize("words", WRONG)
def test_what_the_doctor_cannot_do(words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception, match=WRONG[words]) as raised:
        app(["doctor", *words.split()], standalone_mode=False)
    assert type(raised.value).__module__ == "hpc_ds.errors"


def test_the_plan_is_printed_and_nothing_started(capsys: pytest.CaptureFixture[str]) -> None:
    app(["doctor", "--num_gpus", "2", "--dry-run", "--limit", "60"], standalone_mode=False)
    said = capsys.readouterr().out
    assert "launcher local, 2 ranks on 1 host" in said
    assert "-m hpc_ds.runtime.doctor --limit=60" in said


@pytest.mark.ranks
def test_this_machine_is_looked_at_and_a_folder_that_is_not_there_is_found(tmp_path: Path) -> None:
    missing = tmp_path / "not-mounted"
    command = [*DOCTOR, "--num_gpus", "2", "--look-at", str(missing), "--json"]
    done = subprocess.run(
        command, env={**os.environ, **ENV, "CUDA_VISIBLE_DEVICES": ""}, cwd=tmp_path, capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    data = json.loads(done.stdout)
    assert failures(data) == [("localhost", "disk")], done.stdout
    assert f"{missing} cannot be used: No such file or directory" in done.stdout
    assert not data["ok"]
    (node,) = data["nodes"]
    assert (node["node"], node["level"], node["ranks"], node["gpus"]) == ("localhost", "fail", 2, 0)
    assert node["memory_mib"] > 0
    for record in data["records"]:
        assert (record["phase"], record["errors"]) == ("done", {})
        assert record["hostname"] == os.uname().nodename
        assert record["cores"] == sorted(os.sched_getaffinity(0))
        assert record["versions"]["python"] == sys.version.split()[0]
        assert record["limits"]["open_files"] is None or record["limits"]["open_files"] > 0
        assert record["speed"]["matmul_s"] > 0
        assert [one["bytes"] for one in record["all_reduce"]] == [8, 1 << 13, 1 << 20, 1 << 23]
    written = {folder["path"]: folder for folder in data["records"][0]["folders"]}
    assert written[str(tmp_path)]["write_s"] >= 0
    assert not list(tmp_path.iterdir()), "what was written for a try is gone"


def over_hosts(folder: Path) -> list[str]:
    (folder / "hostfile").write_text("w1 slots=1\nw2 slots=1\nw3 slots=1\n")
    return [*DOCTOR, "-H", str(folder / "hostfile"), "--env", "GLOO_SOCKET_IFNAME=eth0", "--json"]


@pytest.mark.hosts
def test_a_host_that_cannot_be_reached_is_named(hosts: Hosts, tmp_path: Path) -> None:
    hosts.stop_sshd(1)
    try:
        refused = hosts.run_on(0, over_hosts(tmp_path), ENV)
    finally:
        hosts.start_sshd(1)
    assert refused.returncode == 1, refused.stdout + refused.stderr
    data = json.loads(refused.stdout)
    assert failures(data) == [("w2", "start")]
    assert "Connection refused" in data["findings"][0]["words"]
    assert [node["level"] for node in data["nodes"]] == ["unknown", "fail", "unknown"]


@pytest.mark.hosts
def test_of_three_hosts_the_one_with_a_full_tmpfs_and_the_one_with_a_slow_link_are_named(
    hosts: Hosts, tmp_path: Path
) -> None:
    fill = "mount -o remount,size=1m /dev/shm && head -c 2m /dev/zero >/dev/shm/full"
    hosts.run_on(1, ["sh", "-c", fill])
    limit = ["tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", "400mbit", "burst", "64kb", "latency", "50ms"]
    limited = hosts.run_on(2, limit).returncode == 0  # a kernel may be without it
    command = over_hosts(tmp_path)
    try:
        done = hosts.run_on(0, command, ENV, timeout_s=400)
    finally:
        hosts.run_on(1, ["sh", "-c", "rm -f /dev/shm/full; mount -o remount,size=50% /dev/shm"])
        hosts.run_on(2, ["tc", "qdisc", "del", "dev", "eth0", "root"])
    assert done.returncode == 1, done.stdout + done.stderr
    data = json.loads(done.stdout)
    full = next(one for one in data["findings"] if one["check"] == "disk" and one["level"] == "fail")
    assert (full["node"], full["words"]) == ("w2", f"{SHM} cannot be used: No space left on device")
    assert [node["node"] for node in data["nodes"]] == ["w1", "w2", "w3"]
    assert [record["hostname"] for record in data["records"]] == ["w1", "w2", "w3"]
    assert all(len(record["links"]) == 2 for record in data["records"]), "each receives from both others"
    assert ("w1", "disk") not in failures(data)
    if limited:
        slow = [one for one in data["findings"] if one["check"] == "link"]
        assert [(one["node"], one["level"]) for one in slow] == [("w3", "fail")], slow
