"""What ``hpcds run --dry-run`` prints: the plan, host by host, without secrets."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from hpc_ds.launch.environment import masked

if TYPE_CHECKING:
    from hpc_ds.launch.plan import HostPlan, LaunchPlan


def as_text(plan: LaunchPlan) -> str:
    """For a person; a shell would understand its commands and values."""
    ranks, hosts = _count(plan.world_size, "rank"), _count(len(plan.hosts), "host")
    lines = [f"launcher {plan.launcher}, {ranks} on {hosts}, in {plan.cwd}"]
    if plan.launcher_args:
        lines.append(f"launcher_args {shlex.join(plan.launcher_args)}")
    port = plan.master_port or "a free port"
    lines.append(f"ranks meet at {plan.master_addr or 'an address of ' + plan.hosts[0].name}, {port}")
    lines.append("every rank has")
    lines += [f"  {name}={shlex.quote(value)}" for name, value in sorted(masked(plan.env).items())]
    for host in plan.hosts:
        if plan.only_node in {None, host.node_rank}:
            lines += _host_as_text(plan, host)
    return "\n".join(lines) + "\n"


def _host_as_text(plan: LaunchPlan, host: HostPlan) -> list[str]:
    last = host.first_rank + host.ranks - 1
    ranks = f"ranks {host.first_rank}-{last}" if host.ranks > 1 else f"rank {last}"
    devices = "as they are" if host.devices is None else ",".join(host.devices) or "none"
    lines = [f"host {host.name}: {ranks}, devices {devices}"]
    for local_rank in range(host.ranks):
        told = " ".join(f"{name}={value}" for name, value in plan.rank_environment(host, local_rank).items())
        lines.append(f"  {told}")
        lines.append(f"    {shlex.join(plan.rank_command(local_rank))}")
    return lines


def as_json(plan: LaunchPlan, notes: list[str]) -> str:
    """For a program."""
    import json

    hosts = [
        {
            "name": host.name,
            "node_rank": host.node_rank,
            "devices": None if host.devices is None else list(host.devices),
            "ranks": [
                {
                    "rank": host.first_rank + local_rank,
                    "environment": plan.rank_environment(host, local_rank),
                    "command": list(plan.rank_command(local_rank)),
                }
                for local_rank in range(host.ranks)
            ],
        }
        for host in plan.hosts
        if plan.only_node in {None, host.node_rank}
    ]
    value = {
        "launcher": plan.launcher,
        "launcher_args": list(plan.launcher_args),
        "world_size": plan.world_size,
        "cwd": plan.cwd,
        "master_addr": plan.master_addr,
        "master_port": plan.master_port,
        "environment": masked(plan.env),
        "hosts": hosts,
        "notes": notes,
    }
    return json.dumps(value) + "\n"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
