"""A sweep on site local: real keepers, one after the other or several at a time."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from whole_runs import Run, Runs, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.local

# Says that it runs, and ends when it may, with the code that its argument says.
PROGRAM = """
import os, sys, time
number, code = os.path.basename(os.environ["HPCDS_RUN_DIR"]), int(sys.argv[-1])
open(f"began-{number}", "w").close()
while not os.path.exists(f"go-{number}"):
    time.sleep(0.02)
sys.exit(0 if os.environ["HPCDS_ATTEMPT"] != "1" else code)
"""


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Runs]:
    runs = Runs(tmp_path, os.environ)
    (tmp_path / "rank.py").write_text(PROGRAM)
    (tmp_path / "job.json").write_text(
        json.dumps({"name": "s", "command": [sys.executable, "rank.py"], "site": "local"})
    )
    yield runs
    for number in range(1, 10):
        (tmp_path / f"go-{number}").touch()
    runs.hpcds("cancel", "s", check=False)


def submitted(runs: Runs, *options: str) -> list[Run]:
    told: dict[str, Any] = json.loads(runs.hpcds("submit", "job.json", *options, "--json").stdout)
    assert set(told) == {"sweep_dir", "job_id", "site", "runs"}
    folder = runs.folder / told["sweep_dir"]
    return [
        Run(folder / str(number), f"{told['job_id']}_{number}", runs.hpcds) for number in range(1, told["runs"] + 1)
    ]


def wait_for(path: Path, run: Run) -> None:
    wait_until(path.exists, 120, run, path.name)


def states(runs: Runs, name: str = "s") -> list[str]:
    return [one["state"] for one in json.loads(runs.hpcds("status", name, "--json").stdout)]


def test_one_after_the_other_and_one_can_be_cancelled_or_resumed(runs: Runs) -> None:
    first, second, third = submitted(runs, "--sweep", "args.--code=1,0,0")
    wait_for(runs.folder / "began-1", first)
    assert states(runs) == ["running", "waiting", "waiting"]
    assert [one.status()["job_id"] for one in (first, third)] == [first.job_id, third.job_id]
    assert not (runs.folder / "began-2").exists()
    runs.hpcds("cancel", third.job_id)
    wait_until(lambda: states(runs)[2] != "waiting", 60, third, "the end of the third")
    (runs.folder / "go-1").touch()
    wait_for(runs.folder / "began-2", second)
    (runs.folder / "go-2").touch()
    assert second.wait_until_over()["state"] == "finished"
    assert first.status()["state"] == "held", "it crashed before its first step"
    assert not (runs.folder / "began-3").exists()
    (runs.folder / "go-3").touch()
    told = json.loads(runs.hpcds("resume", "s", "--json").stdout)
    assert sorted(Path(one["run_dir"]).name for one in told) in (["1", "3"], ["3"])
    wait_until(lambda: states(runs)[1:] == ["finished", "finished"], 120, third, "the end of the sweep")


def test_several_at_a_time_and_all_are_cancelled(runs: Runs) -> None:
    found = submitted(runs, "--sweep", "args.--code=0,0,0", "--throttle", "2")
    for number in (1, 2):
        wait_for(runs.folder / f"began-{number}", found[0])
    assert states(runs) == ["running", "running", "waiting"]
    told = json.loads(runs.hpcds("cancel", "s", "--json").stdout)
    assert [one["action"] for one in told] == ["cancelled"] * 3
    wait_until(lambda: not {"running", "ending", "waiting"} & set(states(runs)), 120, found[0], "the end of the sweep")
    assert not (runs.folder / "began-3").exists()


def test_a_sweep_waits_for_another_and_is_run_again_as_a_whole(runs: Runs) -> None:
    first, _ = submitted(runs, "--sweep", "args.--code=0,0", "--name", "first")
    wait_for(runs.folder / "began-1", first)
    ok = submitted(runs, "--sweep", "args.--code=0,0,0,0", "--after", "first", "--name", "then")
    never = submitted(runs, "--sweep", "args.--code=0,0", "--after", "first:notok", "--name", "never")
    assert [one["reason"] for one in json.loads(runs.hpcds("status", "then", "--json").stdout)] == [
        "in the queue (Dependency)"
    ] * 4
    runs.hpcds("cancel", ok[3].job_id)
    for number in range(1, 4):
        (runs.folder / f"go-{number}").touch()
    wait_until(lambda: set(states(runs, "first")) == {"finished"}, 120, first, "the end of the first sweep")
    wait_until(lambda: states(runs, "then")[:3] == ["finished"] * 3, 120, ok[0], "the end of the second")
    wait_until(lambda: "waiting" not in states(runs, "never"), 120, never[0], "the end of the third")
    assert (ok[3].lines("attempts.jsonl"), never[0].lines("attempts.jsonl")) == ([], [])
    refused = runs.hpcds("rerun", "first", "--set", "args=[]", check=False)
    assert refused.stderr == "hpcds: --set args: the sweep varies args.--code; submit another sweep\n"
    told = json.loads(runs.hpcds("rerun", "first", "--set", "steps=7", "--json").stdout)
    again = Path(told["sweep_dir"])
    assert (told["runs"], again.parent) == (2, runs.folder / "runs")
    for number in ("1", "2"):
        config = json.loads((again / number / "config.json").read_text())
        assert (config["args"], config["steps"]) == (["--code", "0"], 7)
    wait_until(
        lambda: states(runs, str(again)) == ["finished"] * 2, 120, first, "the end of the sweep that is run again"
    )
