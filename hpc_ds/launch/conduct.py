"""The launcher: brings the agents of a plan together, has them start the ranks, and stays until nothing is left.

| stage     | until                                                 |
|-----------|-------------------------------------------------------|
| gathering | every agent has said hello                            |
| meeting   | rank 0's agent has reserved the port                  |
| running   | every rank has ended, or its host was lost            |
| finishing | every agent has ended what its ranks have left behind |
| closing   | the programs that brought the agents have ended       |

The first failure ends the ranks everywhere. Agents kill what does not end in time by themselves; that an agent does not
answer is noticed here once a launch is ending, so that it ends.
"""

from __future__ import annotations

import errno
import os
import selectors
import signal
import time
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from hpc_ds.errors import LaunchError
from hpc_ds.launch.address import NAMING
from hpc_ds.launch.console import Console
from hpc_ds.launch.cores import parse_core_list
from hpc_ds.launch.failure import in_words
from hpc_ds.launch.gathering import Gathering
from hpc_ds.launch.loop import Loop
from hpc_ds.launch.posts import Post, common_part, own_part
from hpc_ds.launch.ranks import FORWARDED, TO_GROUP
from hpc_ds.launch.runner import CHECKPOINTED

if TYPE_CHECKING:
    from collections.abc import Callable

    from hpc_ds.launch.plan import LaunchPlan
    from hpc_ds.launch.program import Program
    from hpc_ds.launch.reception import Starter

_COLLECT_S = 0.2
_TWICE_S = 0.5  # programs such as timeout signal a process and then its group: that is one interrupt
_MEET_S = 60.0
_SILENCE_S = 2.0  # of an agent whose rank is in the middle of a long line
_AFTER_GRACE_S = 30.0
_READ_S = 5.0
_FINISH_S = 60.0
_AGAIN_S = 5.0
_CLOSE_S, _TERM_S, _KILL_S = 10.0, 5.0, 5.0
_BROKEN_PIPE = 128 + signal.SIGPIPE


class _Bad(NamedTuple):
    """Something that went wrong.

    Attributes:
        exit_code: of a rank; None where it was no rank.
        words: what messages say.
        program: what may have more to say of it.
    """

    exit_code: int | None
    words: str
    program: Program | None = None


def conduct(plan: LaunchPlan, starter: Starter, out: int = 1, err: int = 2) -> int:
    """Carry out a plan; returns the exit code of all ranks together: of the first that failed, 75, or 0.

    Args:
        plan: what to start where.
        starter: how agents get to their hosts.
        out: the descriptor that ranks' standard output goes to.
        err: that of their standard error, and of the last words.

    Raises:
        LaunchError: ranks could not be started, or a host was lost; nothing of the launch is left.
    """
    _open_standard_streams()
    if plan.core_list is not None:
        parse_core_list(plan.core_list)
    return _Launch(plan, starter, out, err).run()


def _open_standard_streams() -> None:
    """Give the first three descriptors to nothing where they are closed, as below some daemons, before others take them."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:  # a new one is always the lowest
        pass
    os.close(descriptor)


class _Launch:
    """One launch, from its first program to its last."""

    def __init__(self, plan: LaunchPlan, starter: Starter, out: int, err: int) -> None:
        self._plan = plan
        self._loop = Loop()
        self._console = Console(out, err, prefix=plan.prefix, wake=self._loop.wake)
        self._gathering = Gathering(plan, starter, self._loop, self)
        self._posts = self._gathering.posts
        self._bad: list[_Bad] = []
        self._bad_before_end: int | None = None
        self._codes: set[int] = set()
        self._started = self._finishing = self._ending = self._deaf = False
        self._living, self._expected = 0, len(self._posts)
        self._held: list[signal.Signals] = []
        self._interrupted_at: float | None = None
        self._heard_at = 0.0
        self._stuck_at: int | None = None
        self._stopped: int | None = None
        self._closing_since: int | None = None
        self._on: dict[str, Callable[[Post, dict[str, Any], bytes], None]] = {
            "output": self._output,
            "reserved": self._reserved,
            "refused": self._refused,
            "ended": self._ended,
            "done": lambda post, _head, _body: self._over(post),
        }

    def run(self) -> int:
        """Carry the plan out; see ``conduct``."""
        try:
            with self._loop.catching(FORWARDED):
                self._gathering.open()
                while not self._is_over():
                    for number in self._loop.turn():
                        self._signalled(number)
                    self._look()
        finally:
            self._gathering.close(kill=True)
            self._loop.close()
        code, words = self._verdict()
        if code is None:
            raise LaunchError(words)
        return code

    # What agents say.

    def hear(self, post: Post) -> None:
        """Read from an agent once."""
        channel = post.channel
        if channel is None:
            return
        for head, body in channel.receive():
            self._on[head["say"]](post, head, body)
        if channel.ended and not post.over:
            if post.living or not self._finishing:
                self._bad.append(_Bad(None, f"{post.name}: lost with its ranks", post.program))
            self._over(post)
            self._end()

    def _output(self, post: Post, head: dict[str, Any], body: bytes) -> None:
        self._console.write(head["rank"], head["stream"], body)
        self._loop.paused = not self._console.has_room
        before, self._loop.only = self._loop.only, None
        if head["goes_on"] and post.channel is not None:
            self._loop.only = post.channel.reader
            self._heard_at = time.monotonic()
            if before is None:
                self._loop.later(_SILENCE_S, self._look_at_long_line)

    def _look_at_long_line(self) -> None:
        """Hear the others again when the agent is silent whose rank is in the middle of a long line."""
        if self._loop.paused or time.monotonic() - self._heard_at < _SILENCE_S:
            self._loop.later(_SILENCE_S, self._look_at_long_line)
        else:
            self._loop.only = None

    def _ended(self, post: Post, head: dict[str, Any], _body: bytes) -> None:
        rank, code = head["rank"], head["exit_code"]
        self._living -= rank in post.living
        post.living.discard(rank)
        self._codes.add(code)
        if code not in {0, CHECKPOINTED}:
            self._bad.append(_Bad(code, f"rank {rank} on {post.host.name}: {in_words(code)}"))
            self._loop.later(_COLLECT_S, self._end)

    def _refused(self, post: Post, head: dict[str, Any], _body: bytes) -> None:
        self._living -= len(post.living & {*head.get("ranks", ())})
        post.living.difference_update(head.get("ranks", ()))
        self.fail(head["why"])

    def say(self, words: str) -> None:
        """Tell the person who has started the launch."""
        self._console.say(words)

    # From stage to stage.

    def gathered(self) -> None:
        """All agents have come: find where the ranks meet."""
        first = next((post for post in self._posts if 0 in post.ranks), None)
        if first is None:  # rank 0 is another launcher's
            self._start(self._plan.master_addr or self._plan.hosts[0].name, self._plan.master_port)
            return
        env = {name: self._plan.env[name] for name in NAMING if name in self._plan.env}
        peers = self._gathering.peers()
        self._tell(first, {"say": "reserve", "port": self._plan.master_port, "peers": peers, "env": env})
        self._loop.later(_MEET_S, self._has_met)

    def _has_met(self) -> None:
        if not self._started and not self._ending:
            self.fail(f"{self._posts[0].name}: its agent does not answer; look at that host")

    def _reserved(self, post: Post, head: dict[str, Any], _body: bytes) -> None:
        address = self._plan.master_addr
        if address is None:
            address = head["address"] if self._gathering.peers() else "127.0.0.1"
        if address is None:
            named = f" at interface {head['interfaces']!r}" if head["interfaces"] else ""
            self.fail(f"{post.name}: no address{named} that the other hosts reach; give one as --master_addr")
            return
        self._start(address, head["port"])

    def _start(self, address: str, port: int) -> None:
        if self._ending:
            return
        common = common_part(self._plan, address, port)
        self._started = True
        self._living = sum(len(post.ranks) for post in self._posts)
        for post in self._posts:
            post.started = True
            post.living = set(post.ranks)
            self._tell(post, own_part(self._plan, post), common)
        for number in self._held:
            self._tell_all({"say": "signal", "number": int(number)})

    def _look(self) -> None:
        """See whether something is to be done that nobody has called for."""
        self._loop.paused = not self._console.has_room
        if self._console.broken is not None and not self._deaf:
            self._deaf = True
            self._console.drop()
            if not self._ending and self._console.broken.errno == errno.EPIPE:
                self._stopped = _BROKEN_PIPE
            elif not self._ending:
                self._bad.append(_Bad(None, f"output: cannot be written: {self._console.broken.strerror}"))
            self._end()
        if self._started and not self._finishing and self._living == 0:
            self._finishing = True
            self._tell_all({"say": "finish"})
            self._loop.later(_FINISH_S, self._give_up)

    def fail(self, words: str, program: Program | None = None) -> None:
        """Something other than a rank has failed: end everything."""
        self._bad.append(_Bad(None, words, program))
        self._end()

    def _end(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Tell all ranks to end, once; agents that have none are let go."""
        if self._ending:
            return
        self._ending = True
        self._bad_before_end = len(self._bad)
        if self._bad and self._bad[0].exit_code is not None and self._living:
            self._console.say(f"hpcds run: {self._first().words}; the others are told to end")
        self._gathering.abandon()
        for post in self._posts:
            if post.started:
                self._tell(post, {"say": "signal", "number": int(number)})
            else:
                self._over(post)
        self._drop_what_nobody_reads(time.monotonic() + self._plan.grace_s)
        self._loop.later(self._plan.grace_s + _AFTER_GRACE_S, self._give_up)

    def _drop_what_nobody_reads(self, after: float) -> None:
        stuck_at = self._console.written if self._console.queued else None
        if stuck_at is not None and stuck_at == self._stuck_at and time.monotonic() > after:
            self._console.drop()
        self._stuck_at = stuck_at
        self._loop.later(_READ_S, partial(self._drop_what_nobody_reads, after))

    def _give_up(self) -> None:
        """Wait no longer for agents that should have answered; but that nobody reads the output is not their fault."""
        if self._loop.paused:
            self._loop.later(_AGAIN_S, self._give_up)
            return
        for post in self._posts:
            if not post.over:
                self._bad.append(_Bad(None, f"{post.name}: its agent does not answer", post.program))
                self._over(post)

    def _over(self, post: Post) -> None:
        self._expected -= not post.over
        self._living -= 0 if post.over else len(post.living)
        post.over = True
        if post.channel is not None:
            self._loop.leave(post.channel.reader)
            self._loop.forget(post.channel.writer)
            post.channel.close()
            post.channel = None

    # Signals.

    def _signalled(self, number: signal.Signals) -> None:
        if number == signal.SIGCHLD:
            self._gathering.look_soon()
        elif number not in TO_GROUP:
            self._held.append(number)
            if self._started:
                self._tell_all({"say": "signal", "number": int(number)})
        else:
            self._told_to_end(number)

    def _told_to_end(self, number: signal.Signals) -> None:
        if number == signal.SIGINT and self._interrupted_at is None:
            self._interrupted_at = time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - (self._interrupted_at or 0.0) > _TWICE_S:
            self._tell_all({"say": "kill"})
            self._console.drop()
        if not self._started:
            self._stopped = 128 + number
        elif self._ending:
            self._tell_all({"say": "signal", "number": int(number)})
        self._end(number)

    def _tell_all(self, head: dict[str, Any]) -> None:
        for post in self._posts:
            self._tell(post, head)

    def _tell(self, post: Post, head: dict[str, Any], body: bytes = b"") -> None:
        channel = post.channel
        if channel is None:
            return
        waiting = channel.queued > 0
        channel.send(head, body)
        if channel.queued and not waiting:
            self._loop.watch(channel.writer, partial(self._flush, post), selectors.EVENT_WRITE)

    def _flush(self, post: Post) -> None:
        if post.channel is not None:
            post.channel.flush()
            if not post.channel.queued:
                self._loop.forget(post.channel.writer)

    # The end.

    def _is_over(self) -> bool:
        if self._expected:
            return False
        if self._closing_since is None:
            self._closing_since = 0
            self._gathering.stop(signal.SIGTERM, incomplete=True)
            self._loop.later(_CLOSE_S, partial(self._stop_programs, 0))
        if not self._gathering.all_ended():
            return False
        if self._closing_since == 0:
            self._closing_since = 1
            code, words = self._verdict()
            if code is not None and words:
                self._console.say(f"hpcds run: {words}")
        return self._console.queued == 0

    def _stop_programs(self, times: int) -> None:
        numbers = (signal.SIGTERM, signal.SIGKILL)
        if times < len(numbers):
            self._gathering.stop(numbers[times])
            self._loop.later((_TERM_S, _KILL_S)[times], partial(self._stop_programs, times + 1))
        else:
            self._gathering.close(kill=True)

    def _first(self) -> _Bad:
        """What went wrong first: of what came together, a rank that was killed is the cause, and the others its victims."""
        if not self._bad_before_end or self._bad[0].exit_code is None:
            return self._bad[0]
        together = self._bad[: self._bad_before_end]
        killed = (one for one in together if (one.exit_code or 0) > 128 and one.exit_code != 128 + signal.SIGABRT)
        return next(killed, self._bad[0])

    def _verdict(self) -> tuple[int | None, str]:
        """The exit code, and the words that explain it; no code: the launch itself has failed."""
        if self._stopped is not None and not self._bad_before_end:
            return self._stopped, ""
        if self._bad:
            first = self._first()
            said = "" if first.program is None else f" ({first.program.how()}); {first.program.cure}"
            return first.exit_code, first.words + said
        return (CHECKPOINTED if CHECKPOINTED in self._codes else 0), ""
