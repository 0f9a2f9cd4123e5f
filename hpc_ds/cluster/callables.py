"""Python functions as jobs, through submitit: the only file that knows it.

For functions that return something, such as a preprocessing step or an evaluation. A training that must survive its
cluster is a script under ``hpcds submit``.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from hpc_ds.cluster.connect import detect_site
from hpc_ds.config.job import Resources, time_limit_s
from hpc_ds.config.model import check
from hpc_ds.errors import SubmitError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def submit(
    function: Callable[..., Any],
    *args: Any,
    site: str = "auto",
    resources: dict[str, Any] | None = None,
    folder: str | Path = "runs/functions",
    **kwargs: Any,
) -> Any:
    """Run ``function(*args, **kwargs)`` as a job.

    Args:
        function: anything that cloudpickle can take along.
        args: its arguments.
        site: ``slurm``, ``local``, or ``auto``: Slurm where one answers.
        resources: keys of a job's ``resources`` section.
        folder: for pickles and logs; all nodes must see it.
        kwargs: its keyword arguments.

    Returns:
        A submitit job: ``result()`` waits and returns what rank 0 returned, ``results()`` what every rank did.

    Raises:
        ConfigError: a key of ``resources`` is not usable.
        SubmitError: the scheduler refused the job.
    """
    import submitit

    asked: Resources = check(Resources, resources or {}, "resources")
    cluster = detect_site() if site == "auto" else site
    if cluster not in {"slurm", "local"}:
        raise SubmitError(f"site {cluster!r}: functions run on 'slurm' or 'local' in this version; choose one of them")
    try:
        executor = submitit.AutoExecutor(folder=os.fspath(folder), cluster=cluster)
        executor.update_parameters(**_parameters(asked, cluster))
        return executor.submit(function, *args, **kwargs)
    except (submitit.core.utils.FailedJobError, RuntimeError, OSError) as error:
        raise SubmitError(f"submitit: refused the job: {' '.join(str(error).split())}; change the resources") from error


def _parameters(asked: Resources, cluster: str) -> dict[str, Any]:
    parameters: dict[str, Any] = {
        "nodes": asked.nodes,
        "tasks_per_node": asked.ranks_per_node,
        "gpus_per_node": asked.gpus_per_node or None,
        "cpus_per_task": asked.cpus_per_task,
        "timeout_min": None if asked.time is None else max(1, -(-time_limit_s(asked.time) // 60)),
    }
    if cluster == "slurm":
        slurm = {"mem": asked.mem, "partition": asked.partition, "account": asked.account, "qos": asked.qos}
        parameters |= {f"slurm_{name}": value for name, value in slurm.items()}
        parameters["slurm_additional_parameters"] = dict(asked.sbatch) or None
    return {name: value for name, value in parameters.items() if value is not None}
