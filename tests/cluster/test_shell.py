"""Other programs: what comes back from them, and every way in which they can fail."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING

import pytest
from fakes import fake_program

from hpc_ds.cluster.connect import detect_site, scheduler_named
from hpc_ds.cluster.local import Local
from hpc_ds.cluster.shell import Completed, outside_jobs, run
from hpc_ds.cluster.slurm import Slurm
from hpc_ds.errors import CommandError
from hpc_ds.run_dir import RunDir

if TYPE_CHECKING:
    from pathlib import Path


def python(text: str, *args: str) -> list[str]:
    return [sys.executable, "-c", text, *args]


def test_words_and_status_come_back() -> None:
    text = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"
    assert run(python(text), check=False) == Completed(3, "out\n", "err\n")
    assert run(python("print('x y')")).stdout == "x y\n"


def test_arguments_reach_the_program_without_a_shell() -> None:
    args = ["a b", "$HOME", "`id`", "*", "", "'", "\u00e9"]
    assert run(python("import sys; print(sys.argv[1:])", *args)).stdout == f"{args}\n"


def test_there_is_nothing_to_read() -> None:
    assert run(python("import sys; print(repr(sys.stdin.read()))")).stdout == "''\n"


def test_words_that_are_no_text_are_read_all_the_same() -> None:
    assert run(python(r"import sys; sys.stdout.buffer.write(b'a\xffb')")).stdout == "a\ufffdb"


def test_a_failure_is_an_error_with_its_words() -> None:
    with pytest.raises(CommandError) as caught:
        run(python("import sys; print('it is\\nbroken', file=sys.stderr); sys.exit(4)"))
    assert str(caught.value) == f"{sys.executable}: exit status 4: it is broken"
    assert (caught.value.returncode, caught.value.stderr, caught.value.exit_code) == (4, "it is\nbroken\n", 3)


def test_words_on_the_other_stream_are_shown_where_there_are_no_others() -> None:
    with pytest.raises(CommandError, match="exit status 4: said it here"):
        run(python("import sys; print('said it here'); sys.exit(4)"))
    with pytest.raises(CommandError, match="exit status 4: it said nothing"):
        run(python("raise SystemExit(4)"))


def test_a_program_that_is_not_there_is_an_error() -> None:
    with pytest.raises(CommandError) as caught:
        run(["no-such-program-anywhere", "x"], check=False)
    assert str(caught.value) == "no-such-program-anywhere: no such program on PATH; is this a machine of the cluster?"
    assert caught.value.returncode is None


def test_a_program_that_cannot_be_run_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("")
    with pytest.raises(CommandError, match=r"data: cannot be run: .*Permission denied"):
        run([str(tmp_path / "data")])
    with pytest.raises(CommandError, match=r"cannot be run: .*"):
        run([sys.executable, "x" * 3_000_000])


def test_a_program_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    start = time.monotonic()
    sleeper = fake_program(tmp_path, "sleeper", "sleep 30; true")
    with pytest.raises(CommandError) as caught:
        run([str(sleeper)], timeout_s=0.3)
    assert str(caught.value) == f"{sleeper}: no answer in 0.3 s; is the scheduler up?"
    assert caught.value.returncode is None
    assert time.monotonic() - start < 10


def test_variables_of_an_enclosing_job_stay_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    inherited = {
        "SLURM_JOB_ID": "1", "SLURM_CPU_BIND": "x", "SBATCH_PARTITION": "x", "SALLOC_X": "x", "SRUN_CPUS_PER_TASK": "1",
        "PMI_RANK": "0", "PMIX_RANK": "0", "OMPI_COMM_WORLD_RANK": "0", "PALS_RANKID": "0",
    }  # fmt: skip
    kept = {
        "SLURM_CONF": "/etc/slurm.conf",
        "PATH": "/bin",
        "HOME": "/h",
        "SLURMISH": "x",
        "MY_SLURM_X": "x",
        "PMIXED": "x",
    }
    assert outside_jobs({**inherited, **kept}) == kept
    for name, value in {**inherited, "SLURM_CONF": "/c"}.items():
        monkeypatch.setenv(name, value)
    seen = run(python("import os; print(*sorted(os.environ))")).stdout.split()
    assert "SLURM_CONF" in seen
    assert not set(inherited) & set(seen)
    assert set(inherited) <= set(os.environ), "only the program's environment is changed"


SINFO = {"echo main": "slurm", "true": "local", "exit 1": "local", 'echo "sinfo: error" >&2; exit 1': "local"}


@pytest.mark.parametrize(("sinfo", "site"), SINFO.items())
def test_the_site_is_slurm_where_one_answers(
    sinfo: str, site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_program(tmp_path, "sbatch", "exit 1")
    fake_program(tmp_path, "sinfo", sinfo)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert detect_site() == site


def test_the_site_is_local_without_slurms_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_program(tmp_path, "sinfo", "echo main")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert detect_site() == "local"


def test_a_site_has_one_of_two_schedulers(tmp_path: Path) -> None:
    assert isinstance(scheduler_named("slurm", RunDir(tmp_path)), Slurm)
    assert isinstance(scheduler_named("local", RunDir(tmp_path)), Local)
