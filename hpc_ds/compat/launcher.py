"""``deepspeed.launcher.runner``: its functions on hostfiles and filters, by ours (docs/launching.md).

What DeepSpeed refuses is refused, in one sentence of ours; refused too is what it takes and does not mean: a host with no
slots, or ``worker-[0-3]`` as one host's name (a folded list is its hosts here).
"""

from __future__ import annotations

import base64
import json
import logging
import os
import runpy
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc_ds.errors import HostfileError
from hpc_ds.launch import filters, hostfile

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

log = logging.getLogger("hpc_ds")

DLTS_HOSTFILE = "/job/hostfile"
EXPORT_ENVS = ["MLFLOW", "PYTHON", "MV2", "UCX"]
DEEPSPEED_ENVIRONMENT_NAME = os.getenv("DS_ENV_FILE", ".deepspeed_env")
DEEPSPEED_ENVIRONMENT_PATHS = [str(Path.home()), "."]
PDSH_MAX_FAN_OUT = 1024


def fetch_hostfile(hostfile_path: str) -> dict[str, int] | None:
    """Host -> slots, in the order of a hostfile; None, with a warning, where there is no such file.

    Raises:
        HostfileError: it is not usable.
    """
    path = Path(hostfile_path)
    if not path.is_file():
        log.warning("hostfile %r: no such file; only this host is known", hostfile_path)
        return None
    return dict(hostfile.parse(path.read_text(encoding="utf-8"), f"hostfile {hostfile_path!r}"))


def parse_resource_filter(
    host_info: Mapping[str, Sequence[int]], include_str: str = "", exclude_str: str = ""
) -> dict[str, list[int]]:
    """What a filter leaves of host -> slots, in the order of the hosts.

    Raises:
        HostfileError: it is malformed, names what is not there, or both filters are given.
    """
    if include_str and exclude_str:
        raise HostfileError("--include, --exclude: both are given; give one of them")
    there = {name: list(slots) for name, slots in host_info.items()}
    if not include_str and not exclude_str:
        return there
    hosts = [hostfile.Host(name, max(slots, default=-1) + 1) for name, slots in there.items()]
    take = filters.take_included if include_str else filters.take_not_excluded
    taken = {one.name: set(one.slots) for one in take(hosts, include_str or exclude_str)}
    for name, slots in hosts:
        named = taken.get(name, set()) if include_str else set(range(slots)) - taken.get(name, set())
        gaps = sorted(named - set(there[name]))
        if gaps and len(named) < slots:
            raise HostfileError(
                f"filter {include_str or exclude_str!r}: host {name!r} has no slot {gaps[0]}; name one it has"
            )
    left = {name: [slot for slot in there[name] if slot in taken[name]] for name in taken}
    return {name: slots for name, slots in left.items() if slots}


def parse_inclusion_exclusion(resource_pool: Mapping[str, int], inclusion: str, exclusion: str) -> dict[str, list[int]]:
    """What a filter leaves of host -> number of slots; see ``parse_resource_filter``."""
    return parse_resource_filter({name: range(slots) for name, slots in resource_pool.items()}, inclusion, exclusion)


def apply_num_nodes_and_gpus(
    active_resources: Mapping[str, Sequence[int]], num_nodes: int, num_gpus: int
) -> dict[str, list[int]]:
    """The first hosts, and of each the first slots; numbers below 1 ask for all."""
    names = list(active_resources)[: num_nodes if num_nodes > 0 else None]
    return {name: list(range(num_gpus) if num_gpus > 0 else active_resources[name]) for name in names}


def encode_world_info(world_info: Any) -> str:
    """Hosts and slots as URL-safe base64 of JSON, as DeepSpeed's launcher hands them on."""
    return base64.urlsafe_b64encode(json.dumps(world_info).encode()).decode()


def main(args: Sequence[str] | None = None) -> None:
    """The command ``deepspeed``; ends the process, as a command does."""
    sys.argv = ["deepspeed", *(sys.argv[1:] if args is None else args)]
    runpy.run_path(str(Path(__file__).with_name("bin") / "launch.py"))
