"""Where Slurm keeps accounts, they and the ledger of a run tell the same story."""

from __future__ import annotations

import json
import os
import signal
import time
from typing import TYPE_CHECKING

import pytest
from lives import Life
from run_facts import attempts, causes, ranks_of
from whole_runs import Run, Runs

if TYPE_CHECKING:
    from pathlib import Path

    from slurm_cluster import SlurmCluster

pytestmark = pytest.mark.slurm

CLOCKS_S = 3.0
"""Slurm counts whole seconds, and starts a job before the ledger is opened in it."""


def accounts(cluster: SlurmCluster, run: Run) -> list[dict[str, str]]:
    """One record for each start of the job."""
    fields = "State,Start,End,NodeList,Elapsed"
    done = cluster.run("sacct", "-D", "-X", "-n", "-P", "-j", run.job_id, "-o", fields)
    return [dict(zip(fields.split(","), line.split("|"), strict=True)) for line in done.stdout.splitlines()]


def seconds(text: str) -> float:
    return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))


def test_sacct_and_the_ledger_agree(accounting_cluster: SlurmCluster, tmp_path: Path) -> None:
    accounting_cluster.reset()
    life = Life(accounting_cluster, Runs(tmp_path, accounting_cluster.env), ("n1", "n2"))
    run = life.submit("--set", "checkpoint.every_steps=4", "--account", "lab")
    life.wait_for_step(run)
    os.kill(ranks_of(run)[1], signal.SIGKILL)
    life.wait_until_over(run)
    assert causes(run) == ["crashed", "finished"], run.story()
    life.wait_for(
        lambda: [one["State"] for one in accounts(accounting_cluster, run)][-1:] == ["COMPLETED"], run, "sacct"
    )
    records = accounts(accounting_cluster, run)
    assert [one["State"] for one in records] == ["REQUEUED", "COMPLETED"]
    for record, attempt in zip(records, attempts(run), strict=True):
        assert attempt.closed is not None
        assert record["NodeList"] == attempt.nodes
        assert seconds(record["Start"]) <= attempt.opened
        assert attempt.closed <= seconds(record["End"]) + CLOCKS_S
    report = json.loads(run.hpcds("report", str(run.folder), "--json").stdout)
    by_hand = sum(seconds(one["End"]) - seconds(one["Start"]) for one in records)
    assert report["sacct_allocated_s"] == pytest.approx(by_hand, abs=1.0)
    assert 0 < report["seconds"]["training"] < by_hand
