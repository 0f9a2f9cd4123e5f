"""Agents as the launcher expects and knows them, and what it tells them to start."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hpc_ds.launch.channel import to_wire

if TYPE_CHECKING:
    from hpc_ds.launch.channel import Channel
    from hpc_ds.launch.plan import HostPlan, LaunchPlan
    from hpc_ds.launch.program import Program


@dataclass(eq=False)
class Post:
    """The place of one agent, which has a host's ranks or one of them.

    Attributes:
        local_ranks: which of the host's.
        program: what is to bring it; None: not started.
        channel: the way to it; None: it has not come, or is gone.
        hello: what it said of itself.
        living: ranks that have not ended.
        started: it was told to start them.
        over: nothing more is expected of it.
    """

    host: HostPlan
    local_ranks: range
    program: Program | None = None
    channel: Channel | None = None
    hello: dict[str, Any] = field(default_factory=dict)
    living: set[int] = field(default_factory=set)
    started: bool = False
    over: bool = False

    @property
    def ranks(self) -> range:
        """Its ranks among all."""
        first = self.host.first_rank
        return range(first + self.local_ranks.start, first + self.local_ranks.stop)

    @property
    def name(self) -> str:
        """What messages call it."""
        if len(self.ranks) == 1 and self.host.ranks > 1:
            return f"rank {self.ranks[0]} on {self.host.name}"
        return f"host {self.host.name!r}"


def posts_of(plan: LaunchPlan, *, per_rank: bool) -> list[Post]:
    """The agents of a plan, by their ranks."""
    hosts = [host for host in plan.hosts if plan.only_node in {None, host.node_rank}]
    if per_rank:
        return [Post(host, range(local, local + 1)) for host in hosts for local in range(host.ranks)]
    return [Post(host, range(host.ranks)) for host in hosts]


def common_part(plan: LaunchPlan, address: str, port: int) -> bytes:
    """What all agents are told alike, once for all of them."""
    env = {**plan.env, "MASTER_ADDR": address, "MASTER_PORT": str(port)}
    told = {
        "env": {to_wire(name): to_wire(value) for name, value in env.items()},
        "cwd": to_wire(plan.cwd),
        "log_dir": None if plan.log_dir is None else to_wire(plan.log_dir),
        "stamp": time.strftime("%Y%m%d%H%M%S"),
        "bind_cores": plan.bind_cores,
        "core_list": plan.core_list,
        "grace_s": plan.grace_s,
    }
    return json.dumps(told).encode("ascii")


def own_part(plan: LaunchPlan, post: Post) -> dict[str, Any]:
    """What one agent is told to start."""
    ranks = [
        {
            "rank": post.host.first_rank + local,
            "local_rank": local,
            "env": {name: to_wire(value) for name, value in plan.rank_environment(post.host, local).items()},
            "argv": [to_wire(word) for word in plan.rank_command(local)],
        }
        for local in post.local_ranks
    ]
    return {"say": "start", "ranks": ranks, "ranks_here": post.host.ranks}
