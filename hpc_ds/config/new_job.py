"""A job file to begin with, with a comment on each key: JSON has none, so a key that begins with ``//`` is one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

# Key -> what stands above it.
_COMMENTS = {
    "name": "of the run and of the Slurm job",
    "script": 'what every rank runs, or "command": ["any", "program"] instead; relative to this file',
    "args": "its arguments; those after -- on the command line are added",
    "compat": "scripts that import deepspeed find hpc_ds",
    "site": "a name of `hpcds site list`, a site file, or auto: the cluster that submit is called on",
    "training": "the DeepSpeed JSON; hpc_ds.initialize() finds it by itself",
    "resources.nodes": "machines",
    "resources.gpus_per_node": "one rank runs on each GPU; without GPUs one on each node (tasks_per_node)",
    "resources.time": "limit of one start, HH:MM:SS or D-HH:MM:SS; the run goes on beyond it with the next start",
    "resources.account": "who pays",
    "resources.partition": "the queue",
    "checkpoint.every_minutes": 'the engine saves by itself so often; "auto": as often as loses the least time',
    "checkpoint.keep": "so many checkpoints stay",
    "restart.max_crashes": "crashes after progress before the run is held; preemptions and time limits do not count",
    "env_from": "variables taken from the submitting shell, such as WANDB_API_KEY; never printed",
}


def new_job(given: Mapping[str, Any]) -> dict[str, Any]:
    """The text of a job file as data: what is given, the defaults that are worth a look, and comments.

    Args:
        given: dotted key -> value; None is left out.
    """
    values: dict[str, Any] = {
        "checkpoint.every_minutes": 30,
        "checkpoint.keep": 3,
        "restart.max_crashes": 3,
        "env_from": [],
        **{key: value for key, value in given.items() if value is not None},
    }
    data: dict[str, Any] = {"//": "all keys: docs/job.md, or `hpcds schema job` for an editor"}
    order = [*_COMMENTS, *(key for key in values if key not in _COMMENTS)]
    for key in order:
        if key not in values:
            continue
        section, _, name = key.rpartition(".")
        holder = data.setdefault(section, {}) if section else data
        if key in _COMMENTS:
            holder[f"// {name}"] = _COMMENTS[key]
        holder[name] = values[key]
    return data
