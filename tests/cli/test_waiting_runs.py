"""Runs that wait for others, on site local: real keepers that wait, start, or give up."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any

import pytest
from whole_runs import Run, Runs, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.local

# Waits for the file "go" in its working folder; ends with the number in it.
PROGRAM = """
import os, sys, time
while not os.path.exists("go"):
    time.sleep(0.02)
sys.exit(int(open("go").read() or 0))
"""


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Runs]:
    runs = Runs(tmp_path, os.environ)
    (tmp_path / "rank.py").write_text(PROGRAM)
    for name in ("a", "b"):
        job = {"name": name, "command": [sys.executable, "rank.py" if name == "a" else "-V"], "site": "local"}
        (tmp_path / f"{name}.json").write_text(json.dumps(job))
    yield runs
    runs.hpcds("cancel", "a", "b", check=False)


def chained(runs: Runs) -> tuple[Run, Run]:
    first, second = json.loads(runs.hpcds("submit", "a.json", "b.json", "--chain", "--json").stdout)
    return tuple(Run(runs.folder / one["run_dir"], one["job_id"], runs.hpcds) for one in (first, second))  # type: ignore[return-value]


def let_go(runs: Runs, code: int = 0) -> None:
    (runs.folder / "new").write_text(str(code))
    (runs.folder / "new").rename(runs.folder / "go")


def opened(run: Run) -> float:
    return float(run.lines("attempts.jsonl")[0]["opened"])


def test_a_chain_runs_one_after_the_other(runs: Runs) -> None:
    first, second = chained(runs)
    status = second.status()
    assert (status["state"], status["queue_state"], status["queue_reason"]) == ("waiting", "PENDING", "Dependency")
    let_go(runs)
    assert second.wait_until_over()["state"] == "finished"
    assert opened(second) > first.lines("attempts.jsonl")[-1]["closed"]
    refused = runs.hpcds("submit", "b.json", "--after", "a:notok", check=False)
    assert refused.returncode == 2
    assert "that run is over (finished), so this one could never start" in refused.stderr
    done: dict[str, Any] = json.loads(runs.hpcds("submit", "b.json", "--after", "a", "--json").stdout)
    third = Run(runs.folder / done["run_dir"], done["job_id"], runs.hpcds)
    assert third.wait_until_over()["state"] == "finished", "there is nothing left to wait for"


def test_what_waits_for_a_run_that_is_cancelled_ends_with_it_or_starts(runs: Runs) -> None:
    first, second = chained(runs)
    done = json.loads(runs.hpcds("submit", "b.json", "--after", "a:any", "--json").stdout)
    any_end = Run(runs.folder / done["run_dir"], done["job_id"], runs.hpcds)
    runs.hpcds("cancel", first.job_id)
    assert any_end.wait_until_over()["state"] == "finished"
    wait_until(lambda: second.status()["state"] != "waiting", 60, second, "the end of the wait")
    assert (second.status()["queue_state"], second.lines("attempts.jsonl")) == ("CANCELLED", [])


def test_a_waiting_run_can_be_cancelled(runs: Runs) -> None:
    _, second = chained(runs)
    runs.hpcds("cancel", second.job_id)
    wait_until(lambda: second.status()["state"] != "waiting", 60, second, "the end of the wait")
    assert second.status()["queue_state"] == "CANCELLED"


WRONG = {
    (
        "b.json",
        "--after",
        "a:soon",
    ): "--after 'a:soon': 'soon' is no way to end; write RUN, RUN:ok, RUN:any or RUN:notok",
    ("b.json", "--after", "none"): "run 'none': neither a run folder",
    ("b.json", "--after", ":ok"): "--after ':ok': ",
    ("b.json", "a.py", "--chain"): "--chain 'a.py': not a job file",
    ("a.json", "b.json", "--chain", "--set", 'inputs=["/none"]'): "inputs '/none': no such file or folder",
}


@pytest.mark.parametrize("words", WRONG, ids=" ".join)
def test_what_cannot_be_waited_for_is_refused(words: tuple[str, ...], runs: Runs) -> None:
    refused = runs.hpcds("submit", *words, check=False)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith(f"hpcds: {WRONG[words]}")
    assert not (runs.folder / "runs").exists()


def test_a_run_of_another_scheduler_cannot_be_waited_for(runs: Runs) -> None:
    chained(runs)
    refused = runs.hpcds("submit", "b.json", "--site", "slurm", "--after", "a", check=False)
    assert refused.returncode == 2
    assert "that run is on local, which slurm knows nothing of" in refused.stderr
