"""Command lines for MPI's launchers, whole; that they work with Open MPI and MPICH, tests/launch/test_launchers.py shows."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from fakes import fake_program

from hpc_ds.errors import LaunchError
from hpc_ds.launch.memory_file import memory_file
from hpc_ds.launch.plan import HostPlan, LaunchPlan
from hpc_ds.launch.program import agent_command
from hpc_ds.launch.start_mpi import (
    IntelMpiStarter,
    MpichStarter,
    find_launcher,
    hydra_command,
    open_mpi_command,
)

if TYPE_CHECKING:
    from pathlib import Path

HOSTS = (HostPlan("w3", 0, None, 2, 0), HostPlan("w1", 2, None, 1, 1))
VERSIONS = {
    "openmpi": "mpirun (Open MPI) 4.1.4",
    "openmpi 5": "mpirun (Open MPI) 5.0.6",
    "mpich": "HYDRA build details:\n    Version:                                 4.0.2",
    "impi": "Intel(R) MPI Library for Linux* OS, Version 2021.13 Build 20240515",
    "nobody": "I am a script",
}


def plan(*launcher_args: str, **values: object) -> LaunchPlan:
    return LaunchPlan(HOSTS, ("python", "train.py"), "/work", launcher_args=launcher_args, **values)  # type: ignore[arg-type]


def test_open_mpi() -> None:
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    start = ["mpirun", "-np", "3", "--hostfile", "/dev/fd/9", "--map-by", "seq", "--oversubscribe"]
    carried = ["-x", "HPCDS_LAUNCHER", "-x", "HPCDS_TOKEN"]
    assert open_mpi_command(plan(), "mpirun", "/dev/fd/9") == [
        *[*start, "--bind-to", "none", *root, *carried, "-wdir", "/"],
        *agent_command(),
    ]
    asked = plan("--bind-to", "core", ssh_port=2222, env={"LD_LIBRARY_PATH": "/opt/python/lib", "SECRET": "s"})
    assert open_mpi_command(asked, "mpirun", "/dev/fd/9") == [
        *[*start, *root, "--mca", "plm_rsh_args", "-p 2222", *carried, "-x", "LD_LIBRARY_PATH", "-wdir", "/"],
        *["--bind-to", "core"],
        *agent_command(),
    ]


def test_mpich_and_intel_mpi() -> None:
    start = ["mpiexec", "-f", "/dev/fd/9", "-n", "3", "-wdir", "/", "-genvlist", "HPCDS_LAUNCHER,HPCDS_TOKEN"]
    for starter, options, variables in (
        (MpichStarter(), [], {"HYDRA_LAUNCHER_EXTRA_ARGS": "-p 2222"}),
        (
            IntelMpiStarter(),
            ["-genv", "I_MPI_PIN", "0"],
            {"I_MPI_JOB_RESPECT_PROCESS_PLACEMENT": "0", "I_MPI_HYDRA_BOOTSTRAP_EXEC_EXTRA_ARGS": "-p 2222"},
        ),
    ):
        asked = plan("-verbose", ssh_port=2222)
        command = hydra_command(asked, "mpiexec", "/dev/fd/9", starter.options(asked))
        assert command == [*start, *options, "-verbose", *agent_command()]
        assert starter.variables(asked) == variables
    assert IntelMpiStarter().options(plan(env={"I_MPI_PIN": "1"})) == ["-genv", "I_MPI_PIN", "1"]
    assert "HYDRA_LAUNCHER_EXTRA_ARGS" not in MpichStarter().variables(plan())


@pytest.mark.parametrize(
    ("programs", "launcher", "found"),
    [
        ({"mpirun": "openmpi"}, "openmpi", "mpirun"),
        ({"mpirun": "openmpi 5", "mpirun.openmpi": "openmpi"}, "openmpi", "mpirun"),
        ({"mpirun": "mpich", "mpirun.openmpi": "openmpi"}, "openmpi", "mpirun.openmpi"),
        ({"mpirun": "openmpi", "mpiexec": "openmpi", "mpiexec.hydra": "mpich"}, "mpich", "mpiexec.hydra"),
        ({"mpiexec": "impi", "mpiexec.mpich": "mpich"}, "mpich", "mpiexec.mpich"),
        ({"mpiexec.hydra": "mpich", "mpirun": "impi"}, "impi", "mpirun"),
    ],
)
def test_of_several_mpis_the_right_one_is_found(
    programs: dict[str, str], launcher: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, version in programs.items():
        fake_program(tmp_path, name, f"[ $# = 1 ] && [ $1 = --version ] && echo '{VERSIONS[version]}'")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_launcher(launcher) == tmp_path / found


def test_another_mpi_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, version in (("mpirun", "mpich"), ("mpiexec", "nobody")):
        fake_program(tmp_path, name, f"echo '{VERSIONS[version]}'")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError) as error:
        find_launcher("openmpi")
    assert str(error.value) == (
        "launcher 'openmpi': mpirun is MPICH's, mpiexec does not say whose it is, and there is no Open MPI on PATH; put "
        "it there (module load), or choose another launcher"
    )
    monkeypatch.setenv("PATH", "")
    with pytest.raises(LaunchError, match=r"no mpiexec or mpirun or .* on PATH; install MPICH"):
        find_launcher("mpich")


def test_a_memory_file_is_read_by_its_name_and_gone_afterwards() -> None:
    with memory_file("w1\n" * 50_000) as descriptor, open(f"/dev/fd/{descriptor}") as again:  # noqa: PTH123
        assert again.read() == "w1\n" * 50_000
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
