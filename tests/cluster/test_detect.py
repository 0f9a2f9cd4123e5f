"""Which cluster this is, and what a Slurm says of itself, from answers that clusters give."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import pytest
from fakes import FakeShell, fake_program, refusal

from hpc_ds.cluster.connect import detect
from hpc_ds.cluster.parse import parse_config, parse_gpus
from hpc_ds.cluster.probe import probe
from hpc_ds.config.model import check
from hpc_ds.config.site import SiteConfig
from hpc_ds.errors import CommandError, ParseError

if TYPE_CHECKING:
    from pathlib import Path

SINFO = "sinfo --noheader --format=%R"
CONFIG = "scontrol show config"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of one's own, and a PATH on which there is a Slurm."""
    for name in ("sbatch", "sinfo"):
        fake_program(tmp_path / "bin", name, "exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("CC_CLUSTER", raising=False)
    return tmp_path


def own_site(home: Path, name: str, **by: Any) -> None:
    path = home / ".config" / "hpcds" / "sites" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"name": name, "description": "d", "scheduler": "slurm", "detect": by}))


def test_a_cluster_that_no_file_names_is_any_slurm() -> None:
    shell = FakeShell({SINFO: "main\n"})
    assert detect(shell).site == "slurm"
    assert len(shell.commands) == 1, "Slurm is asked for its name only where somebody would know it"


@pytest.mark.parametrize("cluster", ["narval", "fir", "nibi", "rorqual", "trillium"])
def test_the_clusters_of_the_alliance_say_who_they_are(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC_CLUSTER", cluster)
    found = detect(FakeShell({SINFO: "main\n"}))
    assert (found.site, found.because) == ("alliance-canada", f"CC_CLUSTER is {cluster}")
    monkeypatch.setenv("CC_CLUSTER", "another")
    assert detect(FakeShell({SINFO: "main\n"})).site == "slurm"


def test_the_name_of_the_cluster_decides(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_site(home, "mine", cluster_names=["alpha", "beta"])
    answers = {SINFO: "main\n", CONFIG: "ClusterName             = beta\nSLURM_VERSION = 22.05.8\n"}
    found = detect(FakeShell(answers))
    assert (found.site, found.because, found.cluster) == ("mine", "Slurm calls its cluster beta", "beta")
    assert detect(FakeShell({**answers, CONFIG: "ClusterName = gamma\n"})).site == "slurm"
    assert detect(FakeShell({**answers, CONFIG: refusal("Unable to contact slurm controller")})).site == "slurm"
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "alpha")
    shell = FakeShell({SINFO: "main\n"})
    assert detect(shell).site == "mine", "a job knows the name of its cluster"


def test_the_name_of_the_host_decides(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_site(home, "mine", hosts=["login[1-4].mine.example", "n*"])
    monkeypatch.setenv("SLURMD_NODENAME", "n17")
    assert detect(FakeShell({SINFO: "main\n"})).because == "this host is n17"
    monkeypatch.setenv("SLURMD_NODENAME", "m17")
    assert detect(FakeShell({SINFO: "main\n"})).site == "slurm"


def test_the_users_own_file_comes_first_and_a_broken_one_is_passed_over(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_site(home, "zulu", variables={"CC_CLUSTER": ["fir"]})
    own_site(home, "bad", hosts="*")
    (home / ".config" / "hpcds" / "sites" / "worse.json").write_text("{")
    monkeypatch.setenv("CC_CLUSTER", "fir")
    assert detect(FakeShell({SINFO: "main\n"})).site == "zulu"


def test_where_no_slurm_answers_it_is_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC_CLUSTER", "fir")
    assert detect(FakeShell({SINFO: refusal("no")})).site == "local"
    assert detect(FakeShell({SINFO: " \n"})).site == "local"
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert detect(FakeShell({})).because == "there is no sbatch here"


GRES = {
    "gpu:2": 2,
    "gpu:a100:4(S:0-1)": 4,
    "gpu:a100:4(S:0-1),nvme:1": 4,
    "gpu:tesla:2,gpu:kepler:1": 3,
    "gpu:a100_3g.20gb:8(S:0)": 8,
    "nvme:4": 0,
    "mygpu:4": 0,
    "(null)": 0,
    "": 0,
}


@pytest.mark.parametrize(("gres", "count"), GRES.items())
def test_gpus_are_counted(gres: str, count: int) -> None:
    assert parse_gpus(gres) == count


def test_the_configuration_of_slurm_is_read() -> None:
    text = (
        "Configuration data as of now\nA = (null)\nClusterName   = x y\nP = a=1,b=2\n\nSlurmctld(primary) at n is UP\n"
    )
    assert parse_config(text) == {"ClusterName": "x y", "P": "a=1,b=2"}


PARTITION = (
    "PartitionName=gpu AllowGroups=ALL Default=YES DefaultTime=NONE GraceTime=0 MaxNodes=8 MaxTime=2-00:00:00 MinNodes=2 "
    "OverSubscribe=EXCLUSIVE PreemptMode=OFF State=UP TotalCPUs=640 TotalNodes=10\n"
    "PartitionName=old DefaultTime=00:30:00 MaxNodes=UNLIMITED MaxTime=UNLIMITED MinNodes=0 OverSubscribe=NO State=DOWN "
    "TotalNodes=1\n"
)
ANSWERS = {
    CONFIG: "ClusterName = deep thought\nJobRequeue = 0\nPreemptType = preempt/qos\nSelectType = select/cons_res\n"
    "SLURM_VERSION = 20.11.9\n",
    "scontrol show partition": PARTITION,
    "sinfo": "gpu|64|gpu:a100:4(S:0-1)\ngpu|128+|gpu:a100:8\nold|8|(null)\n",
    "sacctmgr": refusal("You are not running a supported accounting_storage plugin"),
}


def test_a_slurm_says_what_it_is() -> None:
    data = probe(None, FakeShell(ANSWERS))
    site: SiteConfig = check(SiteConfig, data, "site.json")
    assert (site.name, site.description) == ("deep-thought", "cluster deep thought, Slurm 20.11.9")
    assert (site.gpu_request, site.requeued_on_node_failure, site.default_partition) == ("gres", False, "gpu")
    assert data["partitions"] == {
        "gpu": {
            "walltime": "2-00:00:00",
            "max_nodes": 8,
            "min_nodes": 2,
            "cpus_per_node": 128,
            "gpus_per_node": 8,
            "whole_nodes": "always",
        }
    }, "of nodes that differ the largest counts; a partition that is down is left out"
    assert site.qos == {}
    assert site.unverified == []


def test_what_is_no_slurm_is_said_to_be_none() -> None:
    with pytest.raises(ParseError, match="no cluster or no partition in it; is this Slurm"):
        probe(None, FakeShell({**ANSWERS, "scontrol show partition": "junk\n"}))
    with pytest.raises(ParseError):
        probe(None, FakeShell({**ANSWERS, CONFIG: "junk"}))
    with pytest.raises(CommandError):
        probe(None, FakeShell({**ANSWERS, CONFIG: refusal("Unable to contact slurm controller")}))
