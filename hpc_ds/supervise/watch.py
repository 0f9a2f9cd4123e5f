"""What a supervisor does while its ranks run: hears the scheduler, keeps the deadline true, notices a hang."""

from __future__ import annotations

import signal
import time
from typing import TYPE_CHECKING

from hpc_ds.launch.failure import only_victims
from hpc_ds.supervise.deadline import Deadline, longest
from hpc_ds.supervise.hang import Hang, HangWatch, read_beat
from hpc_ds.supervise.say import say

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hpc_ds.cluster.scheduler import JobState
    from hpc_ds.config.job import JobConfig
    from hpc_ds.launch.runner import Runner
    from hpc_ds.run_dir import RunDir
    from hpc_ds.supervise.ledger import Attempt
    from hpc_ds.supervise.progress import Progress
    from hpc_ds.supervise.talk import Talk

WAKE = {signal.SIGTERM, signal.SIGCHLD, signal.SIGINT}
DEAF_TO = {signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}
"""Meant for the ranks: `scancel --full --signal`, or an --signal=B:... that a site adds, send them to the job script too."""
_LOOK_EVERY_S = 1.0
_ASK_EVERY_S = 60.0
_LEARN_EVERY_S = 10.0
_HANG_EVERY_S = 3.0
_NODES_EVERY_S = 4.0
_LOST_NODE_S = 120.0
_DUMP_S = 6.0
_DUMP_SHARE = 0.15  # of KillWait, where that runs
_OURS_TO_REQUEUE = {"TIMEOUT", "PREEMPTED", "NODE_FAIL"}
_FOR_REASON = {"TimeLimit", "NodeDown"}
_ASK_AGAIN_S = 2.0
_TO_REQUEUE_S, _TO_REQUEUE_SHARE = 3.0, 0.3  # of KillWait


class Watch:
    """One attempt while its ranks run.

    Attributes:
        told: what the scheduler said when it began to end the job, or a preemption; None before.
        terminated: the scheduler ends the whole job, or says nothing though the supervisor was told to end.
        hang: the ranks stood still, and were ended for it.
        overdue: the ranks had not stopped when the job was about to be killed.
        late: the ranks had not ended at the time limit that they were given here, and were ended.
    """

    def __init__(self, run: RunDir, job: JobConfig, number: int, talk: Talk, progress: Progress) -> None:
        self._run = run
        self._talk = talk
        self._progress = progress
        self._number = number
        self._beat = run.beats(number) / "rank-0.json"
        self._deadline = Deadline(run, job)
        bound = job.restart.hang_minutes
        self._hangs = HangWatch(run.beats(number), job.resources.world_size, None if bound is None else bound * 60)
        self._due: dict[str, float] = {}
        self._rank_told = False
        self._kill_wait_s = 0.0
        self._terminated_at = 0.0
        self._failed_at = 0.0
        self._last_call = False
        self._restarts = 0
        self._nodes: list[str] = []
        self._earlier: Sequence[Attempt] = ()
        self._close_early: Callable[[], object] = lambda: None
        self.told: JobState | None = None
        self.terminated = False
        self.hang: Hang | None = None
        self.overdue = False
        self.late = False

    @property
    def near_limit(self) -> bool:
        """Whether ranks that end now end for the time limit."""
        begin = self._deadline.earliest_begin
        # Slurm sends the signal of --signal up to a minute early, and looks at its clock every half minute.
        return begin is not None and time.time() > begin - 90

    def begin(self, end_time: float | None, restarts: int, nodes: Sequence[str], earlier: Sequence[Attempt]) -> None:
        """Write the deadline before the ranks start.

        Args:
            end_time: of the job; None where nobody knows.
            restarts: of the job so far.
            nodes: of the job.
            earlier: the attempts before, which have measured what a step and a save take.
        """
        self._nodes = list(nodes)
        self._restarts = restarts
        self._earlier = earlier[-3:]
        self._learn()
        self._deadline.ends_at(end_time)
        self._kill_wait_s = self._talk.kill_wait_s()

    def until_ended(self, runner: Runner, close_early: Callable[[], object], limit_s: float | None = None) -> int:
        """Wait for all ranks; returns their exit code.

        Args:
            runner: of the ranks.
            close_early: writes the ledger as if they had ended now: they may outlive this process.
            limit_s: after so many seconds they are ended; None: never.
        """
        self._close_early = close_early
        now = time.monotonic()
        ends_at = None if limit_s is None else now + limit_s
        self._due = {
            "ask": now + _ASK_EVERY_S,
            "learn": now + _LEARN_EVERY_S,
            "hang": now + _HANG_EVERY_S,
            "nodes": now,
        }
        while (exit_code := runner.poll()) is None:
            woken = signal.sigtimedwait(WAKE, _LOOK_EVERY_S)
            if woken is not None and woken.si_signo in {signal.SIGTERM, signal.SIGINT}:
                self._hear_the_end()
                if self.told is not None and not self.told.active:
                    runner.terminate()  # nobody else will: the scheduler has no such job any more
            self._look(runner)
            if ends_at is not None and time.monotonic() > ends_at and not self.late:
                self.late = True
                runner.terminate()
        self._progress.update()
        return exit_code

    def _look(self, runner: Runner) -> None:
        self._progress.update()
        self._listen_to_rank_0()
        if self._is_due("ask", _ASK_EVERY_S if not self.terminated else _ASK_AGAIN_S):
            self._ask()
        if self._is_due("learn", _LEARN_EVERY_S):
            self._learn()
        standing = self.hang is None and not self.terminated and not runner.ends and not runner.lost_node
        if standing and self._is_due("hang", _HANG_EVERY_S):
            self._look_for_hang(runner)
        if runner.ends and not self.terminated and self._is_due("nodes", _NODES_EVERY_S):
            self._look_for_lost_node(runner)
        if self.terminated and not self._last_call and time.monotonic() > self._terminated_at + self._patience_s():
            self._last_call = True
            self._before_the_kill(runner)

    def _before_the_kill(self, runner: Runner) -> None:
        """The ranks have not stopped, and everything is about to be killed, this process too.

        Where it is for us to queue the run again the ranks are ended while there is time for that. Else they are left their
        last seconds, and only the ledger is written.
        """
        if self._ours_to_requeue():
            self.overdue = True
            say("the ranks have not stopped and the job is about to be killed: they are ended")
            self._dump(runner)
        else:
            self._close_early()

    def _ours_to_requeue(self) -> bool:
        """Whether the run ends for good unless we queue it again: not after a cancel, nor where the scheduler does it."""
        told = self.told
        if told is None or told.restarts != self._restarts:
            return False
        return told.preempting or told.reason in _FOR_REASON or told.state in _OURS_TO_REQUEUE

    def _is_due(self, what: str, every_s: float) -> bool:
        now = time.monotonic()
        if now < self._due[what]:
            return False
        self._due[what] = now + every_s
        return True

    def _patience_s(self) -> float:
        """How long ranks may take to save after SIGTERM, so that there is time left to be queued again."""
        return max(self._kill_wait_s - max(_TO_REQUEUE_S, _TO_REQUEUE_SHARE * self._kill_wait_s), 0.0)

    def _hear_the_end(self) -> None:
        """The scheduler told the whole job to end: ask why while it still knows."""
        heard_at, heard = time.monotonic(), time.time()  # before asking: that may take as long as there is time
        if self.told is None or self.told.state == "RUNNING":
            self.told = self._talk.show()
        if not self.terminated and (self.told is None or self.told.state != "RUNNING"):
            self.terminated, self._terminated_at = True, heard_at
            left_s = self._patience_s() if self._ours_to_requeue() else self._kill_wait_s
            self._deadline.ends_at(heard + left_s, final=True)

    def _listen_to_rank_0(self) -> None:
        """A preemption with grace tells only the ranks: ask the scheduler at once until when they have time."""
        if self._rank_told:
            return
        beat = read_beat(self._beat)
        if beat is not None and beat.told is not None:
            self._rank_told = True
            self._ask()

    def _ask(self) -> None:
        """The limit can be changed meanwhile; a scheduler that does not answer has not changed it."""
        if self.terminated:
            self.told = self.told or self._talk.show()  # slurmctld is busy when it ends many jobs
            return
        self._due["ask"] = time.monotonic() + _ASK_EVERY_S
        job = self._talk.show()
        if job is None:
            return
        if job.preempting:
            self.told = job
        self._deadline.ends_at(job.end_time, final=job.preempting)

    def _learn(self) -> None:
        progress = self._progress
        self._deadline.learn(
            step_s=longest([progress.step_s, *(attempt.step_s for attempt in self._earlier)]),
            save_s=longest([progress.save_s, *(attempt.save_s for attempt in self._earlier)]),
        )

    def _look_for_hang(self, runner: Runner) -> None:
        self.hang = self._hangs.look(self._progress.step_s)
        if self.hang is None:
            return
        if self.hang.host and self._talk.down([self.hang.host]):
            self._lose(runner, self.hang.host)
            self.hang = None
            return
        say(f"hang: {self.hang.detail}; the ranks are ended")
        self._dump(runner)

    def _look_for_lost_node(self, runner: Runner) -> None:
        """When a node is lost its neighbours fail first, by their broken connections; the scheduler knows minutes later.

        A node of which no rank was seen to end is the suspect; until it is cleared, nobody is blamed.
        """
        now = time.monotonic()
        self._failed_at = self._failed_at or now
        suspects = [node for node in self._nodes if node not in runner.reported]
        raised = self._run.failures(self._number)
        if not suspects or now - self._failed_at > _LOST_NODE_S or not only_victims(runner.ends, raised):
            return
        runner.be_patient()
        for lost in self._talk.down(suspects)[:1]:
            self._lose(runner, lost)

    @staticmethod
    def _lose(runner: Runner, node: str) -> None:
        say(f"node {node} is lost, and with it the ranks of the others: they are ended")
        runner.lost_node = node
        runner.terminate()

    def _dump(self, runner: Runner) -> None:
        """Ask all ranks where they are, give them a moment to say, and end them."""
        request = self._run.dump_request(self._number)
        try:
            request.touch()
        except OSError as error:
            say(f"ranks cannot be asked for their stacks: {error}")
        else:
            patience = min(_DUMP_S, _DUMP_SHARE * self._kill_wait_s) if self.terminated else _DUMP_S
            begin = time.monotonic()
            while runner.poll() is None and time.monotonic() - begin < patience:
                signal.sigtimedwait({signal.SIGCHLD}, 0.2)
        runner.terminate()
