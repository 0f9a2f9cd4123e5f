"""What the doctor makes of facts: each fault in turn, planted in the records of three healthy nodes."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest

from hpc_ds.runtime.compare import rates, slower
from hpc_ds.runtime.verdict import Asked, failed, findings_of, in_a_sentence, unfit_nodes

if TYPE_CHECKING:
    from collections.abc import Callable

NODES = ("n1", "n2", "n3")
RANKS = 2
ASKED = Asked(6, dict.fromkeys(NODES, RANKS), gpus_per_node=2, cpus_per_task=4)


def record(rank: int) -> dict[str, Any]:
    node, local = divmod(rank, RANKS)
    gpus = [{"index": index, "id": f"{node}-{index}", "name": "H100", "total_mib": 80000} for index in range(RANKS)]
    return {
        "rank": rank,
        "local_rank": local,
        "world_size": 6,
        "source": "slurm",
        "node": NODES[node],
        "phase": "done",
        "doing": "done",
        "errors": {},
        "versions": {"hpc_ds": "1.0", "torch": "2.13.0", "python": "3.11.7", "cuda": "12.8"},
        "memory": {"total_mib": 500_000, "available_mib": 400_000, "allowed_mib": None},
        "folders": [{"path": "/scratch", "free_mib": 9000, "total_mib": 90000, "write_s": 0.01}] if local == 0 else [],
        "cores": [4 * local + core for core in range(4)],
        "limits": {"open_files": 65536, "locked_mib": None},
        "infiniband": ["mlx5_0"],
        "gpus": gpus,
        "own_gpu": {"index": local, "free_mib": 79000, "total_mib": 80000, "right": True},
        "clock": {"skew_s": 0.001, "round_trip_s": 1e-4} if local == 0 and node else None,
        "device": "cuda",
        "speed": {"matmul_s": 0.01, "memory_gb_s": 10.0},
        "links": [{"from": (rank - RANKS * step) % 6, "gb_s": 12.0} for step in (1, 2)],
        "all_reduce": [{"bytes": 8, "seconds": 1e-5, "gb_s": 0.001}, {"bytes": 1 << 26, "seconds": 0.01, "gb_s": 11.0}],
    }


def healthy() -> list[dict[str, Any]]:
    return [record(rank) for rank in range(6)]


def with_fault(*ranks: int, **fields: Any) -> list[dict[str, Any]]:
    """Records of which some say something else; a dict joins what is there."""
    records = copy.deepcopy(healthy())
    for rank in ranks:
        for name, value in fields.items():
            known = records[rank].get(name)
            records[rank][name] = {**known, **value} if isinstance(known, dict) and isinstance(value, dict) else value
    return records


def briefly(records: list[dict[str, Any]], asked: Asked = ASKED) -> list[tuple[str, str, str]]:
    return [(one.node, one.check, one.level) for one in findings_of(records, asked)]


def test_nothing_is_found_where_all_is_well() -> None:
    assert findings_of(healthy(), ASKED) == []
    assert not failed([])


FAULTS: dict[str, tuple[list[dict[str, Any]], list[tuple[str, str, str]], str]] = {
    "a full disk": (
        with_fault(2, folders=[{"path": "/disk", "error": "No space left on device"}]),
        [("n2", "disk", "fail")],
        "/disk cannot be used: No space left on device",
    ),
    "little room": (
        with_fault(2, folders=[{"path": "/disk", "free_mib": 100, "total_mib": 9000}]),
        [("n2", "disk", "warn")],
        "/disk has 100 MiB free",
    ),
    "a slow file server": (
        with_fault(2, folders=[{"path": "/home", "free_mib": 9000, "total_mib": 9000, "write_s": 7.0}]),
        [("n2", "disk", "warn")],
        "/home took 7.0 s to write 1 MiB",
    ),
    "no memory": (
        with_fault(4, 5, memory={"available_mib": 400}),
        [("n3", "memory", "fail")],
        "200 MiB of memory are free for each rank",
    ),
    "a narrow cgroup": (
        with_fault(4, 5, memory={"allowed_mib": 1000}),
        [("n3", "memory", "warn")],
        "500 MiB of memory are free for each rank",
    ),
    "a clock that is off": (
        with_fault(4, clock={"skew_s": -6.5}),
        [("n3", "clock", "fail")],
        "its clock is 6.5 s behind",
    ),
    "a clock that is a little off": (with_fault(4, clock={"skew_s": 1.5}), [("n3", "clock", "warn")], "1.5 s ahead of"),
    "a lost GPU": (
        with_fault(2, 3, gpus=[{"index": 0, "id": "one", "name": "H100"}]),
        [("n2", "gpu", "fail")],
        "its ranks see 1 GPUs, 2 were asked for",
    ),
    "a GPU that miscounts": (
        with_fault(3, own_gpu={"right": False}),
        [("n2", "gpu", "fail")],
        "GPU 1 of rank 3 computes a wrong",
    ),
    "a GPU that others use": (
        with_fault(3, own_gpu={"free_mib": 20000}),
        [("n2", "gpu", "fail")],
        "20000 of 80000 MiB free; does another process use it?",
    ),
    "a GPU that does not answer": (
        with_fault(3, own_gpu={"error": "CUDA error: unknown error"}),
        [("n2", "gpu", "fail")],
        "GPU 1 of rank 3 cannot be used: CUDA error: unknown error",
    ),
    "memory errors": (
        with_fault(0, gpus=[{**gpu, "uncorrected_errors": 3} for gpu in record(0)["gpus"]]),
        [("n1", "gpu", "fail"), ("n1", "gpu", "fail")],
        "GPU 0 (0-0) has 3 uncorrected memory errors",
    ),
    "a hot GPU": (
        with_fault(
            1, gpus=[{**record(1)["gpus"][1], "held_down": ["hardware thermal slowdown"]}, record(1)["gpus"][0]]
        ),
        [("n1", "gpu", "warn")],
        "the clock of GPU 1 (0-1) is held down: hardware thermal slowdown",
    ),
    "another kind of GPU": (
        with_fault(5, gpus=[{**gpu, "name": "A100"} for gpu in record(5)["gpus"]]),
        [("", "gpu", "warn")],
        "GPUs are of 2 kinds: A100, H100",
    ),
    "another torch": (
        with_fault(2, 3, versions={"torch": "2.12.0"}),
        [("", "versions", "fail")],
        "torch differs: 2.13.0, but 2.12.0 on n2",
    ),
    "another Python": (
        with_fault(2, 3, 4, 5, versions={"python": "3.12.1"}),
        [("", "versions", "warn")],
        "python differs: 3.12.1, but 3.11.7 on n1",
    ),
    "few cores": (with_fault(2, 3, cores=[0]), [("n2", "cores", "warn")], "2 ranks have 1 cores between them (0)"),
    "fewer cores than asked for": (
        with_fault(2, 3, cores=[0, 1, 2, 3]),
        [("n2", "cores", "warn")],
        "2 cores for each rank, 4 were asked for",
    ),
    "cores that overlap": (
        with_fault(3, cores=[0, 1, *range(8, 14)]),
        [("n2", "cores", "warn")],
        "ranks share cores, and not evenly: 0-3, 0-1,8-13",
    ),
    "few open files": (
        with_fault(2, limits={"open_files": 256}),
        [("n2", "limits", "warn")],
        "256 open files are allowed (ulimit -n), 524 may be needed",
    ),
    "little locked memory": (
        with_fault(2, limits={"locked_mib": 0.0625}),
        [("n2", "limits", "warn")],
        "0.0625 MiB may be locked",
    ),
    "another MPI": (
        with_fault(2, source="pmi", mpi={"library": "Open MPI v4", "rank": 0, "world_size": 1}),
        [("n2", "mpi", "fail")],
        "rank 2 of 6 is rank 0 of 1 for MPI (Open MPI v4)",
    ),
    "an MPI that nobody needs": (
        with_fault(2, mpi={"error": "mpi4py: cannot be used: no library"}),
        [("n2", "mpi", "warn")],
        "mpi4py cannot be used",
    ),
    "an end in MPI": (
        with_fault(2, source="pmi", phase="mpi"),
        [("n2", "mpi", "fail")],
        "rank 2 ended while MPI was initialised",
    ),
    "a broken torch": (
        with_fault(2, errors={"torch": "ImportError: libtorch.so"}),
        [("n2", "torch", "fail")],
        "rank 2: ImportError: libtorch.so",
    ),
    "ranks that did not meet": (
        with_fault(*range(6), errors={"meeting": "rank 9 did not come"}),
        [("", "meeting", "fail")],
        "the ranks did not come together (meeting): rank 9 did not come",
    ),
    "a rank that never came": (
        [one for one in healthy() if one["rank"] != 3],
        [("n2", "start", "fail")],
        "only 1 of its 2 ranks reported",
    ),
    "a node that never came": (healthy()[:4], [("n3", "start", "fail")], "none of its ranks reported"),
    "nobody": ([], [("", "start", "fail")], "no rank reported"),
    "a rank that stands while the others wait for it": (
        [
            {**one, "phase": "looking", "doing": "writing to /home"}
            if one["rank"] == 3
            else {**one, "phase": "meeting"}
            for one in healthy()
        ],
        [("n2", "time", "fail")],
        "rank 3 did not come to the end of: writing to /home",
    ),
    "all that stand": (
        [{**one, "phase": "measuring", "doing": "measuring", "stuck": True} for one in healthy()],
        [("", "time", "fail")],
        "the ranks did not come to the end of: measuring",
    ),
    "a slow node": (
        with_fault(4, speed={"matmul_s": 0.03}),
        [("n3", "compute", "fail")],
        "compute: 33% of the median of all nodes",
    ),
    "a node that is a little slow": (
        with_fault(4, speed={"matmul_s": 0.016}),
        [("n3", "compute", "warn")],
        "compute: 62%",
    ),
    "slow memory": (
        with_fault(4, speed={"memory_gb_s": 4.0}),
        [("n3", "memory bandwidth", "fail")],
        "memory bandwidth: 40%",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found_where_it_is(fault: str) -> None:
    records, expected, words = FAULTS[fault]
    found = findings_of(records, ASKED)
    assert [(one.node, one.check, one.level) for one in found] == expected
    assert words in found[0].words
    bad = [node for node, _, level in expected if level == "fail" and node]
    assert unfit_nodes(found) == list(dict.fromkeys(bad))
    assert failed(found) == any(level == "fail" for _, _, level in expected)


def slow_links(slow: Callable[[int, int], bool]) -> list[dict[str, Any]]:
    """Records whose links are slow where ``slow(from, to)``."""
    records = healthy()
    for one in records:
        for link in one["links"]:
            link["gb_s"] = 1.0 if slow(link["from"] // RANKS, one["rank"] // RANKS) else link["gb_s"]
    return records


def test_a_slow_node_is_told_from_a_slow_link() -> None:
    assert briefly(slow_links(lambda source, to: 1 in {source, to})) == [("n2", "link", "fail")]
    assert briefly(slow_links(lambda source, to: (source, to) == (0, 1))) == [], "each has a quick link besides"


def test_what_all_nodes_have_in_common_is_the_fault_of_none() -> None:
    full = with_fault(0, 2, 4, folders=[{"path": "/home", "error": "Disk quota exceeded"}])
    (found,) = findings_of(full, ASKED)
    assert (found.node, found.level, found.words) == (
        "",
        "fail",
        "on every node: /home cannot be used: Disk quota exceeded",
    )
    assert unfit_nodes([found]) == []


def test_a_node_alone_is_to_blame_for_what_it_has() -> None:
    alone = [
        one
        for one in with_fault(0, folders=[{"path": "/disk", "error": "Read-only file system"}])
        if one["node"] == "n1"
    ]
    assert briefly(alone, Asked(2, {"n1": 2})) == [("n1", "disk", "fail")]


def test_of_two_nodes_none_is_called_slow_lightly() -> None:
    two = [one for one in with_fault(2, 3, speed={"matmul_s": 0.019, "memory_gb_s": 3.0}) if one["node"] != "n3"]
    assert briefly(two, Asked(4, {"n1": 2, "n2": 2})) == [("n2", "memory bandwidth", "warn")]


def test_other_jobs_may_take_memory_bandwidth_of_a_node_without_gpus() -> None:
    records = [{**one, "device": "cpu"} for one in with_fault(4, speed={"memory_gb_s": 4.0})]
    assert briefly(records) == [("n3", "memory bandwidth", "warn")]


def test_slow_nodes_only_warn_where_that_is_asked_for() -> None:
    asked = Asked(6, ASKED.nodes, slow="warn")
    assert briefly(with_fault(4, speed={"matmul_s": 0.1}), asked) == [("n3", "compute", "warn")]


@pytest.mark.parametrize(("said", "level"), [(12.0, None), (15.0, "warn"), (30.0, "fail"), (None, None)])
def test_the_network_is_held_against_what_the_site_says(said: float | None, level: str | None) -> None:
    found = findings_of(healthy(), Asked(6, ASKED.nodes, allreduce_gb_s=said))
    assert [one.level for one in found] == ([level] if level else [])
    assert all(one.node == "" and "an all-reduce reaches 11 GB/s, the site says" in one.words for one in found)


def test_failures_come_first_and_are_told_in_a_sentence() -> None:
    records = with_fault(0, limits={"open_files": 256})
    records[4]["folders"] = [{"path": f"/{name}", "error": "Input/output error"} for name in "abcd"]
    found = findings_of(records, ASKED)
    assert [one.level for one in found] == ["fail"] * 4 + ["warn"]
    assert in_a_sentence(found) == (
        "n3: /a cannot be used: Input/output error; n3: /b cannot be used: Input/output error; n3: /c cannot be used: "
        "Input/output error; and 1 more"
    )


def test_rates_are_those_of_the_slowest_rank_of_a_node() -> None:
    assert rates(with_fault(1, speed={"matmul_s": 0.02}))["compute"]["n1"] == pytest.approx(50.0)
    assert slower({}) == {}
    assert slower({"n1": 1.0}) == {}
    assert slower(dict.fromkeys(map(str, range(10_000)), 1.0) | {"7": 0.5}) == {"7": 0.5}
