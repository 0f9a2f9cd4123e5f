"""Run a run again, from its beginning, as a new one: its config and its site as they were, its code as far as it is kept."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hpc_ds.config.load import build_job, load_site, read_json
from hpc_ds.errors import ConfigError
from hpc_ds.run_dir import read_object
from hpc_ds.script.provenance import LONGEST_DIFF, code_in, earlier_snapshot
from hpc_ds.script.sweep import Sweep

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hpc_ds.config.job import JobConfig
    from hpc_ds.config.site import SiteConfig
    from hpc_ds.run_dir import RunDir
    from hpc_ds.sweep_dir import SweepDir


def again(run: RunDir, overrides: Sequence[str] = ()) -> tuple[JobConfig, SiteConfig, list[str]]:
    """The job and the site of a run, and in what the code may differ from then.

    Raises:
        ConfigError: the overrides make no job that could run, or the new run would go on from checkpoints of the old.
    """
    before = read_object(run.config).get("checkpoint", {}).get("dir")
    job = build_job(read_json(run.config, "run config"), overrides, file=str(run.config), base=run.root)
    if job.checkpoint.dir is not None and job.checkpoint.dir == before:
        raise ConfigError(
            f"checkpoint.dir {before!r}: holds the checkpoints of the first run, from which this one would go on; give "
            "another by --set checkpoint.dir=DIR",
            key="checkpoint.dir",
            value=before,
        )
    return job, load_site(str(run.site)), _differences(run, job)


def again_sweep(sweep: SweepDir, overrides: Sequence[str] = ()) -> tuple[Sweep, SiteConfig, list[str]]:
    """A sweep as it was, each of its runs with the same overrides; the rest as ``again``.

    Raises:
        ConfigError: see ``again``; or an override changes what the sweep varies.
    """
    data = sweep.data()
    points = [task["values"] for task in data["tasks"]]
    for key in {text.partition("=")[0] for text in overrides}:
        varied = next(
            (one for one in points[0] if f"{one}.".startswith(f"{key}.") or f"{key}.".startswith(f"{one}.")), None
        )
        if varied is not None:
            raise ConfigError(f"--set {key}: the sweep varies {varied}; submit another sweep", key=key)
    runs = [again(run, overrides) for run in sweep.runs()]
    jobs = [job for job, _, _ in runs]
    return Sweep(jobs[0], points, jobs, data.get("throttle")), runs[0][1], runs[0][2]


def _differences(run: RunDir, job: JobConfig) -> list[str]:
    if job.snapshot and job.workdir is not None and earlier_snapshot(Path(job.workdir)) is not None:
        return []
    then, now = read_object(run.provenance), code_in(job.workdir or ".")
    if then.get("git_commit") is None:
        return ["the code is not known to git: it runs as it is now"]
    if then["git_commit"] != now.commit:
        return [f"the code was at commit {then['git_commit']}, and is at {now.commit} now"]
    homes = (run.root, run.root.parent)
    diff = next((path.read_text(encoding="utf-8") for home in homes if (path := home / "code.diff").is_file()), "")
    if diff[:LONGEST_DIFF] != now.diff:
        return [f"the code has other changes than then; those of then are in {run.root / 'code.diff'}"]
    return []
