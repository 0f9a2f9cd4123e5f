"""What all tests share: a clean environment, one real Slurm for the session, and the rule for machines without one.

Tests marked ``slurm`` or ``mpi`` need programs that pip cannot bring. Where these are missing the tests skip and name
the cure; with HPCDS_REQUIRE_SLURM=1, as in continuous integration, they fail, so that a green run has really run them.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings
from slurm_accounting import PROGRAMS as ACCOUNTING_PROGRAMS
from slurm_cluster import PROGRAMS, SlurmCluster, missing_programs

if TYPE_CHECKING:
    from collections.abc import Iterator

# How long an example takes says more about the machine than about the code.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

NEEDED_PROGRAMS = {"slurm": PROGRAMS, "mpi": ("mpirun",), "ssh": ("ssh", "sshd", "ssh-keygen")}

# What an outer job or launcher says about ranks must not reach a test.
FOREIGN_PREFIXES = ("SLURM_", "SBATCH_", "PMI", "OMPI_", "HPCDS_")
FOREIGN_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker, programs in NEEDED_PROGRAMS.items():
        if item.get_closest_marker(marker):
            _need(*programs)


def _need(*programs: str) -> None:
    """Skip, or fail where nothing may be skipped, unless all are installed."""
    if missing := missing_programs(*programs):
        reason = f"{', '.join(missing)}: not installed; run tests/install_system_packages.sh"
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


@pytest.fixture(autouse=True)
def _reset_slurm_cluster(request: pytest.FixtureRequest) -> None:
    if "slurm_cluster" in request.fixturenames:
        request.getfixturevalue("slurm_cluster").reset()
