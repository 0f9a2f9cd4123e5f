"""What a live Slurm says of itself, as the data of a site file. What it cannot know is left out: see docs/sites.md."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Any

from hpc_ds.cluster.parse import parse_config, parse_fields, parse_gpus
from hpc_ds.cluster.shell import Shell, run
from hpc_ds.errors import ParseError, SchedulerError

if TYPE_CHECKING:
    from collections.abc import Iterable

_NO_LIMIT = {"UNLIMITED", "INFINITE", "NONE", "N/A", ""}
_MODES = {"OFF": "off", "REQUEUE": "requeue", "CANCEL": "cancel", "SUSPEND": "suspend"}
_PLAIN = re.compile(r"[^A-Za-z0-9._-]+")


def probe(name: str | None = None, shell: Shell = run) -> dict[str, Any]:
    """The data of a site file for the Slurm that answers here; every field has its source and today's date.

    Raises:
        CommandError: no Slurm answers.
        ParseError: it answers in a form that we do not know.
    """
    config = parse_config(shell(["scontrol", "show", "config"], timeout_s=30.0).stdout)
    listed = shell(["scontrol", "show", "partition", "-o"], timeout_s=30.0).stdout
    sizes = _sizes(shell(["sinfo", "--noheader", "--format=%R|%c|%G"], timeout_s=60.0).stdout)
    partitions = [parse_fields(line) for line in listed.splitlines() if line.strip()]
    cluster, version = config.get("ClusterName", ""), config.get("SLURM_VERSION", "")
    if not cluster or not partitions or not all("PartitionName" in one for one in partitions):
        raise ParseError(f"scontrol answer {listed[:200]!r}: no cluster or no partition in it; is this Slurm?", listed)
    by_priority = config.get("PreemptType") == "preempt/partition_prio"
    data: dict[str, Any] = {
        "name": name or _PLAIN.sub("-", cluster),
        "description": f"cluster {cluster}, Slurm {version}",
        "scheduler": "slurm",
        "detect": {"cluster_names": [cluster]},
        "gpu_request": "gpus_per_node" if config.get("SelectType") == "select/cons_tres" else "gres",
        "requeued_on_node_failure": config.get("JobRequeue") == "1",
    }
    default = [one["PartitionName"] for one in partitions if one.get("Default") == "YES"]
    data |= {"default_partition": default[0]} if default else {}
    data["partitions"] = {
        one["PartitionName"]: _place(one, sizes.get(one["PartitionName"], (None, None)), by_priority)
        for one in partitions
        if one.get("State") == "UP"
    }
    qos = _qos(shell)
    data |= {"qos": qos} if qos else {}
    said_by = {
        "detect": "scontrol show config",
        "gpu_request": "scontrol show config",
        "requeued_on_node_failure": "scontrol show config",
        "default_partition": "scontrol show partition",
        "partitions": "scontrol show partition, sinfo",
        "qos": "sacctmgr show qos",
    }
    today = time.strftime("%Y-%m-%d")
    data["sources"] = {
        field: {"source": f"{command} of Slurm {version}", "date": today, "verified": True}
        for field, command in said_by.items()
        if field in data
    }
    return data


def _sizes(text: str) -> dict[str, tuple[int | None, int | None]]:
    """Partition -> the most cores and GPUs of one of its nodes."""
    found: dict[str, tuple[int | None, int | None]] = {}
    for line in text.splitlines():
        partition, _, rest = line.strip().partition("|")
        cores, _, gres = rest.partition("|")
        before = found.get(partition, (None, None))
        found[partition] = (
            _most([before[0], int(cores.rstrip("+")) if cores.rstrip("+").isdigit() else None]),
            _most([before[1], parse_gpus(gres) or None]),
        )
    return found


def _most(counts: Iterable[int | None]) -> int | None:
    return max((count for count in counts if count is not None), default=None)


def _place(fields: dict[str, str], size: tuple[int | None, int | None], by_priority: bool) -> dict[str, Any]:
    """What one partition offers."""
    place: dict[str, Any] = {}
    for key, name in (("MaxTime", "walltime"), ("DefaultTime", "default_time")):
        if fields.get(key, "") not in _NO_LIMIT:
            place[name] = fields[key]
    # More nodes than there are is taken by sbatch, and never starts.
    counts = [int(fields[key]) for key in ("MaxNodes", "TotalNodes") if fields.get(key, "").isdigit()]
    most = min(counts, default=0)
    place |= {"max_nodes": most} if most else {}
    if fields.get("MinNodes", "").isdigit() and int(fields["MinNodes"]) > 1:
        place["min_nodes"] = int(fields["MinNodes"])
    place |= {"cpus_per_node": size[0]} if size[0] else {}
    place |= {"gpus_per_node": size[1]} if size[1] else {}
    if fields.get("OverSubscribe") == "EXCLUSIVE":
        place["whole_nodes"] = "always"
    mode = _MODES.get(fields.get("PreemptMode", "").split(",")[-1])
    if by_priority and mode is not None:
        place["preemption"] = mode
        if mode != "off" and fields.get("GraceTime", "").isdigit():
            place["preemption_grace_s"] = float(fields["GraceTime"])
    return place


def _qos(shell: Shell) -> dict[str, Any]:
    """QOS -> what it offers; nothing where there is no accounting."""
    try:
        said = shell(["sacctmgr", "-n", "-P", "show", "qos", "format=Name,MaxWall"], timeout_s=30.0).stdout
    except SchedulerError:
        return {}
    lines = (line.strip().split("|") for line in said.splitlines())
    return {
        fields[0]: {"walltime": fields[1]} if fields[1] not in _NO_LIMIT else {}
        for fields in lines
        if len(fields) == 2 and fields[0]
    }
