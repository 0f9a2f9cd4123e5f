"""``hpcds rerun``: a run once more, from its beginning, as a new run."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from hpc_ds.cli.options import FollowOption, JsonOption, RunArgument, RunsOption, SetOption, UncheckedOption
from hpc_ds.cli.submit import warn


def rerun(
    run: RunArgument,
    overrides: SetOption = None,
    runs: RunsOption = Path("runs"),
    unchecked: UncheckedOption = False,
    follow: FollowOption = False,
    json_output: JsonOption = False,
) -> None:
    """Submit a run again, as a new run that begins at its beginning; `resume` continues one instead.

    Job and site are what they were. The code is the run's snapshot where it has one, else what is there now; in what it
    differs is said.
    """
    from hpc_ds.run_dir import RunDir
    from hpc_ds.script.rerun import again
    from hpc_ds.script.submit import submit

    found = RunDir.find(run, runs)
    job, site, differences = again(found, overrides or [])
    changed = {text.partition("=")[0] for text in overrides or []}
    sources = {"*": f"rerun of {found.root}", **dict.fromkeys(sorted(changed), "--set")}
    done = submit(job, site, runs, sources=sources, check=not unchecked)
    warn([*differences, *done.warnings])
    if json_output:
        typer.echo(json.dumps({"run_dir": str(done.run.root), "job_id": done.job_id, "site": site.name}))
    else:
        typer.echo(f"job {done.job_id} on site {site.name}\nrun {done.run.root}")
    if follow:
        from hpc_ds.cli.runs import show_until_over

        show_until_over(done.run)
