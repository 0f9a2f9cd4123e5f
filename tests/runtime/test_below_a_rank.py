"""What a rank starts is no rank of its run: it hangs nowhere, and leaves the files of the rank alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hpc_ds.cluster.process import ancestors
from hpc_ds.run_dir import RunDir
from hpc_ds.runtime import descent

pytestmark = pytest.mark.ranks

PROGRAM = Path(__file__).with_name("below_a_rank.py")
STARTUP = PROGRAM.parent.parent.parent / "hpc_ds" / "compat" / "startup"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], RunDir]:
    """What two ranks of a run have noted, that met through a file, and the run."""
    folder = tmp_path_factory.mktemp("run")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("HPCDS_", "MASTER_"))}
    environ |= {"PYTHONPATH": f"{STARTUP}{os.pathsep}{STARTUP.parent.parent.parent}", "HPCDS_RUN_DIR": str(folder)}
    environ |= {"HPCDS_ATTEMPT": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "WORLD_SIZE": "2"}
    started = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), str(folder)], env={**environ, "RANK": number, "LOCAL_RANK": number}
        )
        for number in "01"
    ]
    assert [process.wait(200) for process in started] == [0, 0]
    return [json.loads((folder / f"{number}.json").read_text()) for number in range(2)], RunDir(folder)


def test_what_a_rank_starts_is_alone(ranks: tuple[list[dict[str, Any]], RunDir]) -> None:
    alone = {"accelerate": 1, "world": [0, 1, "child"], "in_the_run": False, "hears": False}
    for rank in ranks[0]:
        assert rank["own"]
        assert rank["evaluation"] == [alone]
        assert rank["forked"] == 0


def test_ranks_that_a_rank_has_launched_are_a_world_of_their_own(ranks: tuple[list[dict[str, Any]], RunDir]) -> None:
    first = ranks[0][0]
    assert [each["world"][:2] for each in first["torchrun"]] == [[0, 1]]
    assert first["torchrun"][0]["world"][2] != "child"
    assert [each["world"][:2] for each in first["hpcds run"]] == [[0, 2], [1, 2]]
    for each in first["torchrun"] + first["hpcds run"]:
        assert (each["in_the_run"], each["hears"]) == (False, False)


def test_the_beats_stay_those_of_the_ranks(ranks: tuple[list[dict[str, Any]], RunDir]) -> None:
    told, run = ranks
    beats = {path.name: json.loads(path.read_text().partition("\n")[0]) for path in run.beats(1).iterdir()}
    assert {name: beat["pid"] for name, beat in beats.items()} == {
        f"rank-{number}.json": rank["pid"] for number, rank in enumerate(told)
    }


def claimed(pid: int, started: int | None) -> dict[str, str]:
    told = {"RANK": "1", "MASTER_PORT": "7"}
    said = {"pid": pid, "started": started, "told": told}
    return {"RANK": "1", "MASTER_PORT": "7", descent.RANK_PROCESS: json.dumps(said)}


def test_only_an_ancestor_that_lives_counts() -> None:
    parent = os.getppid()
    assert ancestors()[0] == parent
    started = descent.start_time(parent)
    assert descent.is_below_a_rank(claimed(parent, started))
    assert not descent.is_below_a_rank(claimed(os.getpid(), descent.start_time(os.getpid())))  # it is the rank itself
    assert not descent.is_below_a_rank(claimed(parent, 1))  # another process had that number
    for nonsense in ("", "{}", "[1]", "null", '{"pid": 1, "started": 2, "told": 3}'):
        assert not descent.is_below_a_rank({descent.RANK_PROCESS: nonsense})


def test_who_was_told_more_is_not_alone() -> None:
    environ = claimed(os.getppid(), descent.start_time(os.getppid()))
    assert descent.is_alone_below_a_rank(environ)
    assert descent.is_alone_below_a_rank({name: environ[name] for name in environ if name != "RANK"})
    for name in ("RANK", "MASTER_PORT", "OMPI_COMM_WORLD_RANK", "TORCHELASTIC_RUN_ID"):
        assert not descent.is_alone_below_a_rank({**environ, name: "0"})
