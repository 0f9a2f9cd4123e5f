"""Ask Slurm, before anything is queued, whether a job could ever start: ``sbatch --test-only``, then ``sinfo``.

Slurm takes many a job that can never start (``-N20`` on six nodes waits for ever with PartitionNodeLimit), while
``--test-only`` refuses it. But it refuses with the same words what cannot start only because a node is down just now
(measured on 22.05): then the partition's nodes are counted, the broken ones too, and the job is taken with a warning
where they would be enough. No sbatch, or one that does not answer, is no answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpc_ds.cluster.parse import OFFER_FORMAT, parse_offers, parse_time
from hpc_ds.cluster.shell import Shell, run
from hpc_ds.cluster.slurm import is_for_now
from hpc_ds.errors import CommandError, SchedulerError, SubmitError

if TYPE_CHECKING:
    from pathlib import Path

    from hpc_ds.cluster.parse import Offer

_TIMEOUT_S = 15.0
_START = re.compile(r"to start at (\S+) using (\d+) processors on nodes (\S+) in partition (\S+)")
# What a node that is down, drained or reserved at the moment makes Slurm say as well.
_MAY_BE_FOR_NOW = re.compile(r"configuration is not available|node not available|nodes are busy", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Answer:
    """What Slurm says of a job that is not queued yet.

    Attributes:
        start: seconds since the epoch at which the job would start; None where it does not say.
        partition: in which it would.
        warning: why it cannot start just now; empty where it can.
    """

    start: float | None = None
    partition: str = ""
    warning: str = ""


def ask(script: Path, nodes: int, partition: str | None, shell: Shell = run) -> Answer:
    """Ask Slurm about a job script; nothing is queued.

    Args:
        script: the job's.
        nodes: how many it asks for.
        partition: in which, a list of them, or None for the cluster's default.
        shell: what runs Slurm's programs.

    Raises:
        SubmitError: the job could never start, or would be refused; Slurm's words are in the message.
    """
    try:
        said = shell(["sbatch", "--test-only", str(script)], timeout_s=_TIMEOUT_S, check=False)
    except CommandError:
        return Answer()
    if said.returncode == 0:
        found = _START.search(said.stderr) or _START.search(said.stdout)
        return Answer(parse_time(found[1]), found[4]) if found else Answer()
    if is_for_now(said.stderr):
        return Answer()
    words = _in_words(said.stderr)
    if not _MAY_BE_FOR_NOW.search(said.stderr):
        raise SubmitError(f"sbatch: refused the job: {words}; change the job or ask with --set")
    return _look_at_the_nodes(words, nodes, partition, shell)


def _look_at_the_nodes(words: str, nodes: int, partition: str | None, shell: Shell) -> Answer:
    """Whether what Slurm refuses could start if every node worked."""
    try:
        offers = parse_offers(shell(["sinfo", "--noheader", f"--format={OFFER_FORMAT}"], timeout_s=_TIMEOUT_S).stdout)
    except SchedulerError:
        offers = []
    wanted = partition.split(",") if partition else []
    offers = [offer for offer in offers if (offer.partition in wanted if wanted else offer.default)]
    counts: dict[str, int] = {}
    for offer in offers:
        counts[offer.partition] = counts.get(offer.partition, 0) + offer.nodes
    if counts and nodes > max(counts.values()):
        there = ", ".join(f"partition {name} has {count} nodes" for name, count in counts.items())
        raise SubmitError(f"resources.nodes {nodes}: {there}, so the job could never start ({words}); ask for fewer")
    broken = sum(offer.nodes for offer in offers if not offer.works)
    if broken:
        total = sum(counts.values())
        return Answer(warning=f"{words}: {broken} of {total} nodes do not work just now; the job waits for them")
    offered = ", ".join(sorted({_described(offer) for offer in offers})) or "what it has is not known"
    raise SubmitError(f"sbatch: the job could never start: {words} ({offered}); change the job or ask with --set")


def _described(offer: Offer) -> str:
    gpus = f", {offer.gres}" if offer.gres else ""
    return f"partition {offer.partition}: {offer.nodes} nodes of {offer.cores} cores, {offer.memory_mb} MB{gpus}"


def _in_words(stderr: str) -> str:
    lines = [line.removeprefix("sbatch: ").removeprefix("error: ").strip() for line in stderr.splitlines()]
    said = " ".join(line for line in lines if line and not line.startswith("Try "))
    return said.removeprefix("allocation failure: ") or "it said nothing"
