"""Whole training runs on site local: what tests/slurm/test_slurm_runs.py does to them on a real Slurm, on one machine."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from whole_runs import GPT, SMALL, Run, Runs, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = pytest.mark.local

STEPS = 120  # enough that a command of a second finds it running
OWN_LOOP = GPT.parent.parent / "own_loop" / "job.json"
PACED = Path(__file__).resolve().parent / "paced.py"
TWO_RANKS = ("--tasks-per-node", "2")


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path, os.environ)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = train(Runs(tmp_path_factory.mktemp("undisturbed"), os.environ))
    assert run.wait_until_over()["state"] == "finished", run.story()
    return run


def train(runs: Runs, *options: str, steps: int = STEPS) -> Run:
    return runs.submit(GPT, "--site", "local", *TWO_RANKS, *options, args=("--steps", str(steps), *SMALL))


def causes(run: Run) -> list[str]:
    return [attempt["cause"] for attempt in run.status()["attempts"]]


def ranks_of(run: Run) -> list[int]:
    step = json.loads((run.folder / "local" / "step.json").read_text())
    return [pid for pid, _ in step["ranks"]]


# Two runs that mostly wait do so beside the tests of others.


def beyond_the_limit(runs: Runs) -> tuple[Run, float]:
    pace = ("--steps", "100000", "--slow-from", "1", "--slow-s", "0.2", "--slow-attempts", "2")
    run = runs.submit(PACED, "--site", "local", *TWO_RANKS, "--time", "1", "--set", "restart.lead=20", args=pace)
    run.wait_for_step(1)
    limit_at = float((run.folder / "deadline").read_text().split()[1])
    wait_until(lambda: len(run.lines("attempts.jsonl")) > 1, 90, run, "the end of the first attempt")
    wait_until(lambda: run.steps()[-1]["attempt"] == 2, 60, run, "the second attempt")
    runs.hpcds("cancel", str(run.folder))
    run.wait_until_over()
    return run, limit_at


def a_loop_of_ones_own(runs: Runs) -> tuple[Run, dict[str, Any]]:
    run = runs.submit(OWN_LOOP, "--site", "local", args=("--steps", "200", "--pause", "0.1"))
    run.wait_for_step(10)
    runs.hpcds("preempt", str(run.folder))
    return run, run.wait_until_over()


class Beside:
    """What comes of them; what one raises is raised in its own test."""

    def __init__(self, threads: ThreadPoolExecutor, folder: Path) -> None:
        self._told: dict[str, Future[Any]] = {}
        for story in (beyond_the_limit, a_loop_of_ones_own):
            (folder / story.__name__).mkdir()
            self._told[story.__name__] = threads.submit(story, Runs(folder / story.__name__, os.environ))

    def __call__(self, story: Callable[[Runs], Any]) -> Any:
        return self._told[story.__name__].result()


@pytest.fixture(scope="module", autouse=True)
def beside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Beside]:
    with ThreadPoolExecutor() as threads:
        yield Beside(threads, tmp_path_factory.mktemp("beside"))


def test_a_preempted_run_resumes_to_the_bit(runs: Runs, undisturbed: Run) -> None:
    run = train(runs)
    run.wait_for_step(15)
    runs.hpcds("preempt", str(run.folder))
    status = run.wait_until_over()
    assert causes(run) == ["preempted", "finished"], run.story()
    assert run.losses() == undisturbed.losses()
    assert max(Counter(step["step"] for step in run.steps()).values()) == 1, "a step was taken twice"
    assert status["steps_lost"] == 0


def test_one_signalled_rank_is_enough(runs: Runs, undisturbed: Run) -> None:
    run = train(runs)
    run.wait_for_step(15)
    os.kill(ranks_of(run)[1], signal.SIGUSR2)
    run.wait_until_over()
    assert causes(run) == ["stopped", "finished"], run.story()
    assert run.losses() == undisturbed.losses()


def test_a_killed_rank_costs_the_steps_since_the_last_checkpoint(runs: Runs, undisturbed: Run) -> None:
    run = train(runs, "--set", "checkpoint.every_steps=10")
    run.wait_for_step(25)
    os.kill(ranks_of(run)[1], signal.SIGKILL)
    run.wait_until_over()
    assert causes(run) == ["crashed", "finished"], run.story()
    crash = run.status()["attempts"][0]
    assert (crash["failure"]["rank"], crash["exit_code"]) == (1, 137)
    assert run.losses() == undisturbed.losses()
    taken = [step["step"] for step in run.steps()]
    assert run.status()["steps_lost"] == len(taken) - len(set(taken)) <= 10  # 0 where the kill came right after a save


def test_a_killed_supervisor_leaves_a_run_that_can_be_resumed(runs: Runs, undisturbed: Run) -> None:
    run = train(runs, "--set", "checkpoint.every_steps=10")
    run.wait_for_step(15)
    keeper = json.loads((run.folder / "local" / "state.json").read_text())["pid"]
    supervisor = int(Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split()[0])
    ranks = ranks_of(run)
    os.kill(supervisor, signal.SIGKILL)
    assert run.wait_until_over()["state"] == "failed"
    assert not [pid for pid in ranks if Path(f"/proc/{pid}").exists()], "a rank outlived its supervisor"
    runs.hpcds("resume", str(run.folder))
    run.wait_until_over()
    assert causes(run) == ["lost", "finished"], run.story()
    assert run.losses() == undisturbed.losses()


def test_the_time_limit_is_survived(beside: Beside) -> None:
    """A minute, of which ranks are told twenty seconds before the end, is less than these steps take."""
    run, limit_at = beside(beyond_the_limit)
    first = run.status()["attempts"][0]
    assert first["cause"] == "walltime", run.story()
    assert first["closed"] < limit_at
    assert first["saved_step"] == first["last_step"]
    assert run.status()["state"] == "cancelled"
    taken = [step["step"] for step in run.steps()]
    assert run.steps()[-1]["attempt"] == 2
    assert taken == list(range(1, len(taken) + 1))


def test_another_world_size_goes_on_with_the_same_batches(runs: Runs, undisturbed: Run) -> None:
    """Two ranks, then one: the losses are those of the same global batches, but for the order of additions."""
    run = train(runs)
    run.wait_for_step(15)
    runs.hpcds("cancel", str(run.folder))
    assert run.wait_until_over()["state"] == "cancelled", run.story()
    stopped_at = run.steps()[-1]["step"]
    config = run.folder / "config.json"
    job = json.loads(config.read_text())
    job["resources"]["tasks_per_node"] = 1
    config.write_text(json.dumps(job))
    runs.hpcds("resume", str(run.folder))
    run.wait_until_over()
    assert causes(run) == ["cancelled", "finished"], run.story()
    expected, found = undisturbed.losses(), run.losses()
    assert stopped_at < STEPS
    assert [found[step][0] for step in sorted(found)] == pytest.approx(
        [expected[step][0] for step in sorted(expected)], rel=0.02
    )


def test_following_shows_the_story_and_ends_with_the_run(runs: Runs) -> None:
    began = time.monotonic()
    done = runs.hpcds("submit", str(GPT), "--site", "local", "--follow", "--", "--steps", "5", *SMALL)
    assert time.monotonic() - began < 120
    for words in ("attempt 1 begins", "saved step 5", "gpt: finished", "5 steps, 0 lost", "run folder"):
        assert words in done.stdout


def test_a_loop_without_the_engine_saves_itself_when_it_is_preempted(beside: Beside) -> None:
    run, status = beside(a_loop_of_ones_own)
    assert causes(run) == ["preempted", "finished"], run.story()
    assert [attempt["exit_code"] for attempt in status["attempts"]] == [75, 0]
    steps = [step["step"] for step in run.steps()]
    assert steps == list(range(1, 201)), "a step was lost, or taken twice"
    first = status["attempts"][0]
    assert first["saved_step"] == first["last_step"]
    assert (status["step"], status["saved_step"], status["steps_lost"]) == (200, 200, 0)
    beats = [json.loads((run.folder / f"logs/attempt-2/beats/rank-{rank}.json").read_text()) for rank in (0, 1)]
    assert [(beat["step"], beat["phase"]) for beat in beats] == [(200, "finished")] * 2
