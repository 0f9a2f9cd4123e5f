"""``hpcds rerun``: a run once more, from its beginning, as a new run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from hpc_ds.cli.options import FollowOption, JsonOption, RunArgument, RunsOption, SetOption, UncheckedOption
from hpc_ds.cli.submit import tell_of_sweep, warn

if TYPE_CHECKING:
    from hpc_ds.sweep_dir import SweepDir


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
    differs is said. A sweep is run again as a whole.
    """
    from hpc_ds.run_dir import RunDir
    from hpc_ds.script.rerun import again
    from hpc_ds.script.submit import submit
    from hpc_ds.sweep_dir import find_sweep, runs_named

    sweep = find_sweep(run, runs)
    if sweep is not None and len(runs_named(run, runs)) > 1:
        _rerun_sweep(sweep, overrides or [], runs, check=not unchecked, json_output=json_output)
        return
    found = RunDir.find(run, runs)
    job, site, differences = again(found, overrides or [])
    done = submit(job, site, runs, sources=_sources(found.root, overrides or []), check=not unchecked)
    warn([*differences, *done.warnings])
    if json_output:
        typer.echo(json.dumps({"run_dir": str(done.run.root), "job_id": done.job_id, "site": site.name}))
    else:
        typer.echo(f"job {done.job_id} on site {site.name}\nrun {done.run.root}")
    if follow:
        from hpc_ds.cli.runs import show_until_over

        show_until_over(done.run)


def _rerun_sweep(sweep: SweepDir, overrides: list[str], runs: Path, *, check: bool, json_output: bool) -> None:
    from hpc_ds.script.rerun import again_sweep
    from hpc_ds.script.sweep import submit_sweep

    wanted, site, differences = again_sweep(sweep, overrides)
    done = submit_sweep(wanted, site, runs, sources=_sources(sweep.root, overrides), check=check)
    warn([*differences, *done.warnings])
    tell_of_sweep(done, site.name, len(wanted.jobs), json_output=json_output)


def _sources(root: Path, overrides: list[str]) -> dict[str, str]:
    changed = {text.partition("=")[0] for text in overrides}
    return {"*": f"rerun of {root}", **dict.fromkeys(sorted(changed), "--set")}
