"""What the doctor makes of the facts of all ranks: findings, each about a node or about all. Pure, and without torch.

A node is compared with what was asked for, with fixed thresholds (docs/doctor.md has the table), and with the others. What
every node fails alike is the fault of none: it is found once, without a node.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from hpc_ds.errors import NodeListError
from hpc_ds.launch.node_list import fold, ranges
from hpc_ds.runtime.compare import SLOW, rates, slower
from hpc_ds.runtime.rank import MPI_SOURCES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

Record = dict[str, Any]

MARK = "HPCDS-DOCTOR "
"""What a line of output with a record begins with."""

PHASES = ("looking", "meeting", "measuring", "mpi", "done")
"""What a rank does one after another; its record says where it is."""

_LITTLE_DISK_MIB, _LITTLE_SHM_MIB = 1024, 256
_LITTLE_MEMORY_MIB, _NO_MEMORY_MIB = 1024, 256  # for each rank
_SLOW_WRITE_S = 5.0
_SKEW_WARN_S, _SKEW_FAIL_S = 1.0, 5.0
_USED_GPU_WARN, _USED_GPU_FAIL = 0.9, 0.5  # of its memory is free
_LITTLE_LOCKED_MIB = 64
_FILES_FOR_OTHERS = 512
_MUCH_SLOWER = 0.5
_BELOW_EXPECTED = 0.8
_MUST_AGREE = ("hpc_ds", "torch", "cuda", "hip", "nccl")
_SHOULD_AGREE = ("python", "driver", "kernel", "mpi4py")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that the doctor has found.

    Attributes:
        node: that it is about; empty: about all, or it is not clear about which.
        check: what was looked at.
        level: ``warn`` or ``fail``.
        value: what was found, and ``expected``: what should have been; None where words say it better.
        words: a sentence for a person.
    """

    node: str
    check: str
    level: str
    words: str
    value: Any = None
    expected: Any = None

    def as_data(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Asked:
    """What the launch, the job and the site lead to expect; None or empty: nothing is known.

    Attributes:
        world_size: ranks in all.
        nodes: node -> its ranks; without counts where only the names are known.
        gpus_per_node: GPUs that the ranks of a node must see.
        cpus_per_task: cores of each rank.
        allreduce_gb_s: what the site says of the network, for an all-reduce over several nodes.
        slow: the level at which a node that is much slower than the others is found.
    """

    world_size: int
    nodes: Mapping[str, int | None]
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None
    allreduce_gb_s: float | None = None
    slow: str = "fail"


def findings_of(records: Sequence[Record], asked: Asked) -> list[Finding]:
    """All that is wrong, failures first, in the order of the nodes.

    Args:
        records: the last one of each rank.
        asked: what to compare with.
    """
    by_node = nodes_of(records)
    found = [*_absent(by_node, records, asked), *_stuck(records), *_errors(by_node)]
    for node, ranks in by_node.items():
        found += [replace(one, node=node) for one in _of_node(ranks, asked)]
    found += [*_versions(by_node), *_unlike(by_node), *_slow(records, asked), *_network(records, asked)]
    found = list(_shared(found, list(by_node)))
    order = {node: place for place, node in enumerate(["", *asked.nodes, *by_node])}
    return sorted(found, key=lambda one: (one.level != "fail", order.get(one.node, 0)))


def unfit_nodes(findings: Iterable[Finding]) -> list[str]:
    """The nodes that failed, each once."""
    return list(dict.fromkeys(one.node for one in findings if one.level == "fail" and one.node))


def failed(findings: Iterable[Finding]) -> bool:
    """Whether anything failed."""
    return any(one.level == "fail" for one in findings)


def in_a_sentence(findings: Sequence[Finding], most: int = 3) -> str:
    """The failures as a person reads them."""
    bad = [one for one in findings if one.level == "fail"]
    words = [f"{one.node}: {one.words}" if one.node else one.words for one in bad[:most]]
    return "; ".join([*words, *([f"and {len(bad) - most} more"] if len(bad) > most else [])])


def nodes_of(records: Iterable[Record]) -> dict[str, list[Record]]:
    """The records of each node, by rank, nodes in the order of their first rank."""
    found: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda record: int(record["rank"])):
        found.setdefault(str(record["node"]), []).append(record)
    return found


# Who did not come, and who did not come further


def _absent(by_node: Mapping[str, list[Record]], records: Sequence[Record], asked: Asked) -> Iterator[Finding]:
    missing = sorted(set(range(asked.world_size)) - {int(record["rank"]) for record in records})
    if not records:
        yield Finding("", "start", "fail", "no rank reported; did the doctor start? the logs of the ranks say more")
        return
    named = False
    for node, expected in asked.nodes.items():
        came = len(by_node.get(node, ()))
        if came < (expected or 1):
            named = True
            words = "none of its ranks reported" if came == 0 else f"only {came} of its {expected} ranks reported"
            yield Finding(node, "start", "fail", f"{words}; is Python and hpc_ds there?", came, expected)
    if missing and not named:
        yield Finding("", "start", "fail", f"{_ranks(missing)} did not report", len(records), asked.world_size)


def _stuck(records: Sequence[Record]) -> Iterator[Finding]:
    """Who stands while others are further, or was stopped by its own clock; who only waits for those is not blamed."""
    phases = [PHASES.index(record["phase"]) for record in records]
    alone = {place for place, phase in enumerate(phases) if phase == 0}
    for place, record in enumerate(records):
        stood = record.get("stuck") or phases[place] < max(phases)
        doing = record.get("doing") or record["phase"]
        if place in alone and stood:
            yield Finding(
                str(record["node"]), "time", "fail", f"rank {record['rank']} did not come to the end of: {doing}"
            )
    if not alone and any(record.get("stuck") for record in records):
        doing = next(record.get("doing") or record["phase"] for record in records if record.get("stuck"))
        yield Finding("", "time", "fail", f"the ranks did not come to the end of: {doing}")


def _errors(by_node: Mapping[str, list[Record]]) -> Iterator[Finding]:
    """What could not be looked at on a node; and, where nobody is to blame for it, what went wrong among all."""
    for node, ranks in by_node.items():
        for record in ranks:
            for check, words in record.get("errors", {}).items():
                if check not in {"meeting", "measuring"}:
                    yield Finding(node, check, "fail", f"rank {record['rank']}: {words}")
    everybody = [record for ranks in by_node.values() for record in ranks]
    for check in ("meeting", "measuring"):
        words = next((record["errors"][check] for record in everybody if check in record.get("errors", {})), None)
        if words is not None:
            yield Finding("", check, "fail", f"the ranks did not come together ({check}): {words}")


# Each node by itself


def _of_node(ranks: Sequence[Record], asked: Asked) -> Iterator[Finding]:
    """Findings about one node, whose name is added by the caller."""
    yield from _memory(ranks)
    for record in ranks:
        for folder in record.get("folders", ()):
            yield from _folder(folder)
    yield from _gpus(ranks, asked)
    yield from _cores(ranks, asked)
    yield from _limits(ranks[0])
    yield from _clock(ranks)
    yield from _mpi(ranks)


def _memory(ranks: Sequence[Record]) -> Iterator[Finding]:
    told = next((record["memory"] for record in ranks if "memory" in record), None)
    if told is None:
        return
    left = min(size for size in (told["available_mib"], told["allowed_mib"]) if size is not None) / len(ranks)
    if left < _LITTLE_MEMORY_MIB:
        level, bound = ("fail", _NO_MEMORY_MIB) if left < _NO_MEMORY_MIB else ("warn", _LITTLE_MEMORY_MIB)
        yield Finding("", "memory", level, f"{left:.0f} MiB of memory are free for each rank", round(left), bound)


def _folder(told: Mapping[str, Any]) -> Iterator[Finding]:
    path = told["path"]
    if "error" in told:
        yield Finding("", "disk", "fail", f"{path} cannot be used: {told['error']}", told["error"])
        return
    enough = _LITTLE_SHM_MIB if path == "/dev/shm" else _LITTLE_DISK_MIB  # noqa: S108 - the place itself is meant
    if told["free_mib"] < enough:
        yield Finding("", "disk", "warn", f"{path} has {told['free_mib']} MiB free", told["free_mib"], enough)
    if told.get("write_s", 0.0) > _SLOW_WRITE_S:
        words = f"{path} took {told['write_s']:.1f} s to write 1 MiB"
        yield Finding("", "disk", "warn", words, told["write_s"], _SLOW_WRITE_S)


def _gpus(ranks: Sequence[Record], asked: Asked) -> Iterator[Finding]:
    looked = [record for record in ranks if "gpus" in record]
    seen: dict[str, Any] = {}
    for gpu in (gpu for record in looked for gpu in record["gpus"]):
        seen.setdefault(gpu["id"], {}).update({name: value for name, value in gpu.items() if value not in (0, [])})
    if looked and asked.gpus_per_node and len(seen) < asked.gpus_per_node:
        words = f"its ranks see {len(seen)} GPUs, {asked.gpus_per_node} were asked for"
        yield Finding("", "gpu", "fail", words, len(seen), asked.gpus_per_node)
    for gpu in seen.values():
        index = gpu.get("index", 0)
        if gpu.get("uncorrected_errors"):
            words = f"GPU {index} ({gpu['id']}) has {gpu['uncorrected_errors']} uncorrected memory errors"
            yield Finding("", "gpu", "fail", words, gpu["uncorrected_errors"], 0)
        if gpu.get("held_down"):
            words = f"the clock of GPU {index} ({gpu['id']}) is held down: {', '.join(gpu['held_down'])}"
            yield Finding("", "gpu", "warn", words, gpu["held_down"], [])
    for record in looked:
        yield from _own_gpu(record)


def _own_gpu(record: Record) -> Iterator[Finding]:
    told = record.get("own_gpu")
    if not told:
        return
    who = f"GPU {told['index']} of rank {record['rank']}"
    if "error" in told:
        yield Finding("", "gpu", "fail", f"{who} cannot be used: {told['error']}")
        return
    if not told["right"]:
        yield Finding("", "gpu", "fail", f"{who} computes a wrong product of matrices")
    share = told["free_mib"] / max(told["total_mib"], 1)
    if share < _USED_GPU_WARN:
        level = "fail" if share < _USED_GPU_FAIL else "warn"
        words = f"{who} has {told['free_mib']} of {told['total_mib']} MiB free; does another process use it?"
        yield Finding("", "gpu", level, words, round(share, 3), _USED_GPU_WARN)


def _cores(ranks: Sequence[Record], asked: Asked) -> Iterator[Finding]:
    """Cores for each rank of the node. Ranks that all may use all cores share them fairly; others that share do not."""
    sets = [frozenset(record["cores"]) for record in ranks if "cores" in record]
    if not sets:
        return
    every = frozenset().union(*sets)
    each = len(every) / len(sets)
    if each < 1:
        words = f"{len(sets)} ranks have {len(every)} cores between them ({ranges(every)})"
        yield Finding("", "cores", "warn", words, len(every), len(sets))
    elif asked.cpus_per_task is not None and each < asked.cpus_per_task:
        words = f"{each:g} cores for each rank, {asked.cpus_per_task} were asked for"
        yield Finding("", "cores", "warn", words, each, asked.cpus_per_task)
    elif sum(map(len, sets)) > len(every) and len(set(sets)) > 1:
        words = f"ranks share cores, and not evenly: {', '.join(ranges(one) for one in sets[:4])}"
        yield Finding("", "cores", "warn", words)


def _limits(record: Record) -> Iterator[Finding]:
    told = record.get("limits", {})
    files, needed = told.get("open_files"), _FILES_FOR_OTHERS + 2 * int(record["world_size"])
    if files is not None and files < needed:
        words = f"{files} open files are allowed (ulimit -n), {needed} may be needed"
        yield Finding("", "limits", "warn", words, files, needed)
    locked = told.get("locked_mib")
    if record.get("infiniband") and locked is not None and locked < _LITTLE_LOCKED_MIB:
        words = f"{locked:g} MiB may be locked (ulimit -l), and InfiniBand needs locked memory"
        yield Finding("", "limits", "warn", words, locked, _LITTLE_LOCKED_MIB)


def _clock(ranks: Sequence[Record]) -> Iterator[Finding]:
    told = next((record["clock"] for record in ranks if record.get("clock")), None)
    if told is not None and abs(told["skew_s"]) > _SKEW_WARN_S:
        level, bound = ("fail", _SKEW_FAIL_S) if abs(told["skew_s"]) > _SKEW_FAIL_S else ("warn", _SKEW_WARN_S)
        ahead = "ahead of" if told["skew_s"] > 0 else "behind"
        words = f"its clock is {abs(told['skew_s']):.1f} s {ahead} that of rank 0's node"
        yield Finding("", "clock", level, words, told["skew_s"], bound)


def _mpi(ranks: Sequence[Record]) -> Iterator[Finding]:
    """MPI must know the same world as the launcher; where MPI did not introduce the ranks, training can do without."""
    for record in ranks:
        told, by_mpi = record.get("mpi"), record["source"] in MPI_SOURCES
        level = "fail" if by_mpi else "warn"
        if told and "error" in told:
            yield Finding("", "mpi", level, f"mpi4py cannot be used: {told['error']}")
            return
        if told and (told["rank"], told["world_size"]) != (record["rank"], record["world_size"]):
            words = (
                f"rank {record['rank']} of {record['world_size']} is rank {told['rank']} of {told['world_size']} for MPI "
                f"({told['library']}); is it the MPI of the launcher, or does srun need another --mpi?"
            )
            yield Finding("", "mpi", level, words, told["world_size"], record["world_size"])
            return
        if record["phase"] == "mpi":
            yield Finding("", "mpi", level, f"rank {record['rank']} ended while MPI was initialised")
            return


# Nodes beside each other


def _versions(by_node: Mapping[str, list[Record]]) -> Iterator[Finding]:
    for name in (*_MUST_AGREE, *_SHOULD_AGREE):
        have = {
            node: " and ".join(sorted({str(record["versions"].get(name, "none")) for record in ranks}))
            for node, ranks in by_node.items()
            if all("versions" in record for record in ranks)
        }
        if len(set(have.values())) > 1:
            common = Counter(have.values()).most_common(1)[0][0]
            others = [f"{version} on {_fold(node for node in have if have[node] == version)}" for version in
                      dict.fromkeys(have.values()) if version != common]  # fmt: skip
            level = "fail" if name in _MUST_AGREE else "warn"
            yield Finding("", "versions", level, f"{name} differs: {common}, but {', '.join(others)}", others, common)


def _unlike(by_node: Mapping[str, list[Record]]) -> Iterator[Finding]:
    kinds = {
        node: {gpu["name"] for record in ranks for gpu in record.get("gpus", ())} for node, ranks in by_node.items()
    }
    names = sorted({name for kind in kinds.values() for name in kind})
    if len(names) > 1:
        yield Finding("", "gpu", "warn", f"GPUs are of {len(names)} kinds: {', '.join(names)}", names)


def _slow(records: Sequence[Record], asked: Asked) -> Iterator[Finding]:
    # Cores of a node that is shared with other jobs have its memory's bandwidth together.
    on_gpus = any(record.get("device") == "cuda" for record in records)
    for what, of_nodes in rates(records).items():
        for node, share in slower(of_nodes).items():
            sure = len(of_nodes) > 2 and (on_gpus or what != "memory bandwidth")
            level = asked.slow if share < _MUCH_SLOWER and sure else "warn"
            than = "the median of all nodes" if len(of_nodes) > 2 else "the other node"
            yield Finding(node, what, level, f"{what}: {share:.0%} of {than}", share, SLOW)


def _network(records: Sequence[Record], asked: Asked) -> Iterator[Finding]:
    """The largest all-reduce against what the site says of its network."""
    told = next((record["all_reduce"] for record in records if record.get("all_reduce")), None)
    if asked.allreduce_gb_s is None or not told or len(nodes_of(records)) < 2:
        return
    reached = max(float(one["gb_s"]) for one in told)
    share = reached / asked.allreduce_gb_s
    if share < _BELOW_EXPECTED:
        level = asked.slow if share < _MUCH_SLOWER else "warn"
        words = f"an all-reduce reaches {reached:.3g} GB/s, the site says {asked.allreduce_gb_s:g}"
        yield Finding("", "all-reduce", level, words, reached, asked.allreduce_gb_s)


# Words


def _shared(found: Sequence[Finding], nodes: Sequence[str]) -> Iterator[Finding]:
    """What all nodes (of two or more) have in common is told once, and blames none; the same words of one node too."""
    having: dict[tuple[str, str], set[str]] = {}
    for one in found:
        having.setdefault((one.check, one.level), set()).add(one.node)
    told: set[Any] = set()
    for one in found:
        common = len(nodes) > 1 and having[one.check, one.level] >= set(nodes)
        key = (one.check, one.level) if common and one.node else (one.node, one.check, one.words)
        if key not in told:
            told.add(key)
            yield replace(one, node="", words=f"on every node: {one.words}") if common and one.node else one


def _ranks(numbers: Sequence[int]) -> str:
    few = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
    return f"rank{'s' if len(numbers) > 1 else ''} {few}"


def _fold(nodes: Iterable[str]) -> str:
    names = list(nodes)
    try:
        return fold(names)
    except NodeListError:
        return ", ".join(names)
