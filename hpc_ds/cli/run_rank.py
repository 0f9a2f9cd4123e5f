"""``hpcds run`` where this process is a rank already: it becomes the script, as that rank.

A job whose command is ``deepspeed train.py``, ``srun -n 4 deepspeed train.py`` and ``mpirun`` before it have started the ranks
themselves: each of them would start all ranks again. What the command line says of hosts and slots is then the job's to say.
A world of one is no rank in this sense, and launches: a job of one task, the script of a batch job.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from typing import TYPE_CHECKING, Any

from hpc_ds.cli.run_options import OPTIONS
from hpc_ds.compat.environment import variables_of_the_rank
from hpc_ds.errors import LaunchError
from hpc_ds.launch.environment import masked
from hpc_ds.runtime.descent import is_below_a_rank
from hpc_ds.runtime.rank import Rank, rank_from_environment

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hpc_ds.launch.plan import LaunchPlan

_KEPT = {"venv_script"}
_OF_LAUNCHERS = {option.name for option in OPTIONS if option.group in {0, 1}} - _KEPT
_PASSED_OVER = _OF_LAUNCHERS | {"prefix", "enable_each_rank_log", "save_pid"}
_OF_ENV = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


def own_rank(values: Mapping[str, Any], environ: Mapping[str, str]) -> Rank | None:
    """The rank that this process is, of several; None where it is to launch some.

    ``--no_ssh`` launches: one launcher a host is how it is meant. So does what a rank has started: an evaluation on ranks of
    its own, say.

    Raises:
        RankError: two launchers contradict each other, or one says half of it.
    """
    if values.get("no_ssh") or is_below_a_rank(environ):
        return None
    if not all(environ.get(name) for name in _OF_ENV):  # some clouds say RANK and WORLD_SIZE of hosts
        environ = {name: value for name, value in environ.items() if name not in _OF_ENV}
    me = rank_from_environment(environ)
    return me if me is not None and me.world_size > 1 else None


def notes_of(values: Mapping[str, Any], script: str, me: Rank, environ: Mapping[str, str]) -> list[str]:
    """What a person should know, from the first rank only."""
    if me.rank != 0:
        return []
    text = f"this is rank 0 of {me.world_size} already: it becomes {script!r}, and starts no others"
    given = [f"--{option.name}" for option in OPTIONS if option.name in values and option.name in _PASSED_OVER]
    found = [f"{text}; passed over, for the job has chosen: {', '.join(given)}" if given else text]
    asked, there = values.get("num_gpus", -1), {**environ, **variables_of_the_rank(environ)}.get("LOCAL_WORLD_SIZE")
    if there and asked > 0 and str(asked) != there:
        found.append(f"--num_gpus {asked}: the job has started {there} on this host; ask it for as many tasks a node")
    return found


def become(plan: LaunchPlan, me: Rank) -> None:
    """Become the script; returns never.

    Raises:
        LaunchError: there is no such program, or it cannot be run.
    """
    command = plan.rank_command(me.local_rank)
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execvpe(command[0], command, {**os.environ, **plan.env})  # noqa: S606 - a command is a list already
    except (OSError, ValueError) as error:  # ValueError: an empty name
        problem = getattr(error, "strerror", None) or str(error)
        raise LaunchError(
            f"rank {me.rank}: {command[0]!r}: {problem}; see whether it is there and can be run"
        ) from None


def shown(plan: LaunchPlan, me: Rank, notes: list[str], *, as_json: bool) -> str:
    """What ``--dry-run`` prints of it."""
    command = plan.rank_command(me.local_rank)
    if as_json:
        told = {"rank": me.rank, "world_size": me.world_size, "environment": masked(plan.env), "command": list(command)}
        return json.dumps({**told, "cwd": plan.cwd, "notes": notes}) + "\n"
    lines = [f"rank {me.rank} of {me.world_size}, in {plan.cwd}, with"]
    lines += [f"  {name}={shlex.quote(value)}" for name, value in sorted(masked(plan.env).items())]
    return "\n".join([*lines, shlex.join(command)]) + "\n"
