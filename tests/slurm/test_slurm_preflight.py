"""The preflight of a job on a real Slurm: a node without its scratch folder is named, left out, and the run goes elsewhere."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from run_facts import attempts
from whole_runs import Runs

from hpc_ds.config.load import load_site
from hpc_ds.launch.node_list import expand

if TYPE_CHECKING:
    from pathlib import Path

    from slurm_cluster import SlurmCluster

pytestmark = pytest.mark.slurm

# The node that first is the second of a step has lost what its scratch is a link to: clusters name it in such a prolog.
PROLOG = """\
#!/bin/sh
if [ "$SLURM_NODEID" = 1 ] && mkdir "{folder}/chosen" 2>/dev/null; then echo "$SLURMD_NODENAME" >"{folder}/bad"; fi
if [ "$(cat "{folder}/bad" 2>/dev/null)" = "$SLURMD_NODENAME" ]; then echo "export SLURM_TMPDIR={folder}/scratch"; fi
"""


def test_a_node_that_fails_the_preflight_is_left_out_and_the_run_goes_on_elsewhere(
    slurm_cluster: SlurmCluster, tmp_path: Path
) -> None:
    prolog = tmp_path / "prolog.sh"
    prolog.write_text(PROLOG.format(folder=tmp_path))
    prolog.chmod(0o755)
    (tmp_path / "scratch").symlink_to(tmp_path / "not-mounted")
    site = load_site("slurm").model_dump(mode="json", exclude_unset=True)
    site |= {"name": "here", "srun": [*site.get("srun", []), f"--task-prolog={prolog}"]}
    (tmp_path / "here.json").write_text(json.dumps(site))
    job = {"name": "looked-at", "command": ["/bin/sh", "-c", "echo trained on $SLURMD_NODENAME"], "preflight": True}
    (tmp_path / "job.json").write_text(json.dumps({**job, "resources": {"nodes": 2, "time": "10"}}))

    runs = Runs(tmp_path, slurm_cluster.env)
    run = runs.submit(tmp_path / "job.json", "--site", str(tmp_path / "here.json"))
    assert run.wait_until_over()["state"] == "finished", run.story()

    first, second = attempts(run)
    bad = (tmp_path / "bad").read_text().strip()
    assert (first.cause, first.action, first.node, first.exit_code) == ("preflight", "requeue", bad, 1), run.story()
    assert f"{bad}: {tmp_path}/scratch cannot be used: No such file or directory" in first.detail
    assert first.preflight_s is not None
    assert not list((run.folder / "logs" / "attempt-1").glob("rank-*.log")), "the ranks were not started"
    assert (second.cause, second.node) == ("finished", "")
    assert second.preflight_s is not None
    assert bad not in expand(second.nodes)
    assert run.status()["excluded_nodes"] == [bad]
    words = [(run.folder / "logs" / "attempt-2" / f"rank-{rank}.log").read_text() for rank in range(2)]
    assert words == [f"trained on {node}\n" for node in expand(second.nodes)]

    report = json.loads((run.folder / "logs" / "attempt-2" / "preflight" / "report.json").read_text())
    assert not [one for one in report["findings"] if one["level"] == "fail"]
    assert [record["node"] for record in report["records"]] == expand(second.nodes)
    for record in report["records"]:
        assert record["phase"] == "done"
        assert record["speed"]["matmul_s"] > 0
        assert record["links"][0]["gb_s"] > 0
        assert record["all_reduce"][-1]["gb_s"] > 0
    assert abs(report["records"][1]["clock"]["skew_s"]) < 1.0, "the clock of one machine"
