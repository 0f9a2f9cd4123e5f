"""What all tests share: a clean environment, one real Slurm for the session, and the rule for machines without one.

Tests marked ``slurm``, ``mpi`` or ``hosts`` need programs that pip cannot bring. Where these are missing the tests skip
and name the cure; with HPCDS_REQUIRE_SLURM=1, as in continuous integration, they fail, so that a green run has really
run them.
"""

from __future__ import annotations

import os
from functools import cache
from typing import TYPE_CHECKING

import pytest
from hosts import Hosts, why_not
from hypothesis import HealthCheck, settings
from slurm_accounting import PROGRAMS as ACCOUNTING_PROGRAMS
from slurm_cluster import PROGRAMS, SlurmCluster, missing_programs

if TYPE_CHECKING:
    from collections.abc import Iterator

# How long an example takes says more about the machine than about the code.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

NEEDED_PROGRAMS = {
    "slurm": PROGRAMS,
    "mpi": ("mpirun",),
    "ssh": ("ssh", "sshd", "ssh-keygen", "pdsh"),
    "fish": ("fish",),
}

# What an outer job or launcher says about ranks must not reach a test.
FOREIGN_PREFIXES = ("SLURM_", "SBATCH_", "PMI", "OMPI_", "HPCDS_")
FOREIGN_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker, programs in NEEDED_PROGRAMS.items():
        if item.get_closest_marker(marker):
            _need(*programs)
    if item.get_closest_marker("hosts") and (reason := why_no_hosts()):
        _skip_or_fail(reason)


@cache
def why_no_hosts() -> str:
    return why_not()


def _need(*programs: str) -> None:
    """Skip, or fail where nothing may be skipped, unless all are installed."""
    if missing := missing_programs(*programs):
        _skip_or_fail(f"{', '.join(missing)}: not installed; run tests/install_system_packages.sh")


def _skip_or_fail(reason: str) -> None:
    if os.environ.get("HPCDS_REQUIRE_SLURM") == "1":
        pytest.fail(f"{reason} (HPCDS_REQUIRE_SLURM=1)", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name != "HPCDS_REQUIRE_SLURM" and (name in FOREIGN_NAMES or name.startswith(FOREIGN_PREFIXES)):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def slurm_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """One real Slurm for the session; each test finds it without jobs and with every node idle."""
    with SlurmCluster(tmp_path_factory.mktemp("slurm"), nodes=5, cpus_per_node=8) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def accounting_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """A small Slurm whose sacct answers; `SlurmCluster.stop` raises if its database is not gone with it."""
    _need(*ACCOUNTING_PROGRAMS)
    with SlurmCluster(tmp_path_factory.mktemp("accounting"), nodes=2, accounting=True) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    """Three hosts with sshd for the session; `_quiet_hosts` looks at each test's end for what it has left on them."""
    with Hosts(tmp_path_factory.mktemp("hosts"), 3) as three:
        yield three


@pytest.fixture(autouse=True)
def _quiet_hosts(request: pytest.FixtureRequest) -> Iterator[None]:
    if "hosts" not in request.fixturenames:
        yield
        return
    three: Hosts = request.getfixturevalue("hosts")
    yield
    left = three.left()
    for index in range(len(three.names)):
        three.kill_host(index)
    assert left == [], "nothing of a test may still run on a host"


@pytest.fixture(autouse=True)
def _reset_slurm_cluster(request: pytest.FixtureRequest) -> None:
    if "slurm_cluster" in request.fixturenames:
        request.getfixturevalue("slurm_cluster").reset()
