"""The options that sbatch and srun are given for a job, as its site wants to be asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpc_ds.config.job import lead_s
from hpc_ds.config.site_rules import fitted, gpus_per_rank

if TYPE_CHECKING:
    from hpc_ds.config.job import JobConfig, Resources
    from hpc_ds.config.site import SiteConfig
    from hpc_ds.run_dir import RunDir


def sbatch_options(job: JobConfig, site: SiteConfig, run: RunDir) -> dict[str, object]:
    """Every sbatch option of the job; None stands for an option without a value. The job's own word comes last.

    Raises:
        ConfigError: GPUs cannot be asked for in this site's way.
    """
    resources = fitted(job, site)
    options = {**_of_every_job(job, site, run), **site.sbatch}
    if resources.gpus_per_node:
        options |= gpu_options(resources, site)
    for key in ("cpus_per_task", "mem", "time", "partition", "account", "qos", "constraint"):
        if key == "cpus_per_task" and site.sbatch_ntasks == "forbidden":
            continue  # srun is told
        if getattr(resources, key) is not None:
            options[key.replace("_", "-")] = getattr(resources, key)
    if resources.exclude:
        options["exclude"] = ",".join(resources.exclude)
    for name, value in resources.sbatch.items():
        if value is False:
            options.pop(name, None)
        else:
            options[name] = None if value is True else value
    return options


def _of_every_job(job: JobConfig, site: SiteConfig, run: RunDir) -> dict[str, object]:
    options: dict[str, object] = {"job-name": job.name, "nodes": job.resources.nodes}
    if site.sbatch_ntasks == "allowed":
        options["ntasks-per-node"] = job.resources.ranks_per_node
    # "%" begins a pattern in file names. Slurm truncates the file at a restart unless told to append.
    options |= {"output": str(run.scheduler_log).replace("%", "%%"), "open-mode": "append"}
    if site.requeue == "allowed":
        options["requeue"] = None
    options["signal"] = f"{job.restart.signal}@{lead_s(job)}"
    if site.export is not None:
        options["export"] = site.export
    return options


def gpu_options(resources: Resources, site: SiteConfig) -> dict[str, object]:
    """How the site wants to be asked for GPUs.

    Raises:
        ConfigError: by rank, and they cannot be shared out evenly.
    """
    if site.gpu_request == "gres":
        return {"gres": f"gpu:{resources.gpus_per_node}"}
    if site.gpu_request == "gpus":
        return {"gpus": resources.gpus_per_node * resources.nodes}
    if site.gpu_request == "gpus_per_task":
        return {"gpus-per-task": gpus_per_rank(resources)}
    return {"gpus-per-node": resources.gpus_per_node}
