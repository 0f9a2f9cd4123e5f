"""What is made of ``sbatch --test-only`` and ``sinfo`` before a job is queued; their words are those of Slurm 22.05."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from fakes import FakeShell, refusal

from hpc_ds.cluster.parse import parse_offers, parse_time
from hpc_ds.cluster.precheck import Answer, ask
from hpc_ds.cluster.shell import Completed
from hpc_ds.errors import CommandError, NoAnswerError, NoProgramError, ParseError, SubmitError

if TYPE_CHECKING:
    from fakes import Answer as Said

SCRIPT = Path("/runs/a b/script.sbatch")
START = "sbatch: Job 10 to start at 2026-11-26T16:05:46 using 2 processors on nodes n[1-2] in partition main\n"
CONFIGURATION = refusal("allocation failure: Requested node configuration is not available\n")
SIX = "main*|6|4|1000|gpu:2|idle\nurgent|6|4|1000|gpu:2|idle\n"
BROKEN = "main*|4|4|1000|gpu:2|mixed\nmain*|2|4|1000|gpu:2|down*\n"
MIXED = "main*|4|4+|1000+|(null)|idle\n"


def asked(answer: Said, sinfo: Said = SIX, nodes: int = 2, partition: str | None = None) -> Answer:
    shell = FakeShell({"sbatch --test-only": answer, "sinfo": sinfo})
    found = ask(SCRIPT, nodes, partition, shell)
    assert shell.commands[0] == ["sbatch", "--test-only", str(SCRIPT)]
    return found


def test_a_job_that_can_start_is_told_when() -> None:
    found = asked(Completed(0, "", f"a word of the site\n{START}"))
    assert found == Answer(parse_time("2026-11-26T16:05:46"), "main")


@pytest.mark.parametrize(
    "silence",
    [
        NoProgramError(["sbatch"], None, ""),
        NoAnswerError(["sbatch"], None, ""),
        CommandError(["sbatch"], None, "cannot be run"),
        refusal("sbatch: error: Unable to contact slurm controller (connect failure)"),
        Completed(0, "", "welcome to the cluster\n"),
        Completed(0, "", START.replace("2026-11-26T16:05:46", "Unknown")),
    ],
)
def test_no_answer_is_not_a_refusal(silence: Said) -> None:
    found = asked(silence)
    assert (found.start, found.warning) == (None, "")


# What Slurm says, the nodes it has, how many are asked for -> words of the refusal.
REFUSED: dict[str, tuple[Completed, Said, int, str]] = {
    "too many nodes": (
        CONFIGURATION,
        SIX,
        20,
        (
            "resources.nodes 20: partition main has 6 nodes, so the job could never start (Requested node configuration is "
            "not available); ask for fewer"
        ),
    ),
    "too many, and some are broken": (CONFIGURATION, BROKEN, 7, "resources.nodes 7: partition main has 6 nodes"),
    "another partition": (CONFIGURATION, SIX, 7, "resources.nodes 7: partition main has 6 nodes"),
    "too many GPUs": (
        CONFIGURATION,
        SIX,
        2,
        (
            "sbatch: the job could never start: Requested node configuration is not available (partition main: 6 nodes of 4 "
            "cores, 1000 MB, gpu:2); change the job"
        ),
    ),
    "nodes of several kinds": (CONFIGURATION, MIXED, 2, "(partition main: 4 nodes of 4 cores, 1000 MB); change"),
    "sinfo is away": (CONFIGURATION, CommandError(["sinfo"], 1, "down"), 2, "(what it has is not known); change"),
    "sinfo prints junk": (CONFIGURATION, "welcome\n", 2, "(what it has is not known); change"),
    "a partition": (
        refusal(
            "sbatch: error: invalid partition specified: x\nallocation failure: Invalid partition name specified\n"
        ),
        SIX,
        2,
        "sbatch: refused the job: invalid partition specified: x allocation failure: Invalid partition name specified;",
    ),
    "an option": (
        refusal("sbatch: unrecognized option '--bogus'\nTry \"sbatch --help\" for more information\n", 255),
        SIX,
        2,
        "sbatch: refused the job: unrecognized option '--bogus'; change the job or ask with --set",
    ),
    "nothing": (refusal(""), SIX, 2, "sbatch: refused the job: it said nothing; change the job"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_never_start_is_refused_with_slurms_words(name: str) -> None:
    said, sinfo, nodes, words = REFUSED[name]
    with pytest.raises(SubmitError) as caught:
        asked(said, sinfo, nodes)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_list_of_partitions_is_judged_by_the_largest() -> None:
    nodes = SIX.replace("urgent|6", "urgent|30")
    with pytest.raises(SubmitError, match=r"partition main has 6 nodes, partition urgent has 30 nodes"):
        asked(CONFIGURATION, nodes, 31, "main,urgent")


def test_nodes_that_are_down_just_now_are_a_warning() -> None:
    """Slurm refuses with the same words what cannot start today and what never can."""
    found = asked(CONFIGURATION, BROKEN, 5)
    assert found.warning == (
        "Requested node configuration is not available: 2 of 6 nodes do not work just now; the job waits for them"
    )


@pytest.mark.parametrize("line", ["main|6|4|1000|gpu", "main|six|4|1000|gpu:2|idle", "|||||"])
def test_other_lines_of_sinfo_are_an_error(line: str) -> None:
    with pytest.raises(ParseError, match="not a line as asked for"):
        parse_offers(line)
