"""How the agents of a launch come together: programs are started, agents say hello, and who does not come is named."""

from __future__ import annotations

import signal
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from hpc_ds.cluster.process import allow_files
from hpc_ds.errors import LaunchError
from hpc_ds.launch.posts import Post, posts_of
from hpc_ds.launch.reception import Guest, Reception

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hpc_ds.launch.loop import Loop
    from hpc_ds.launch.plan import LaunchPlan
    from hpc_ds.launch.program import Program
    from hpc_ds.launch.reception import Starter

_ASKED = 8  # hosts that rank 0's looks for a way to
_AT_ONCE = 64  # programs whose agents have not come
_SOON_S, _LOOK_S = 0.02, 1.0
_LAST_WORDS_S = 1.0  # what a program has left behind may hold the pipe of its words open
_AFTER_END_S = 2.0


class Launch(Protocol):
    """Whom a gathering tells of what happens."""

    def gathered(self) -> None:
        """All agents have come."""

    def hear(self, post: Post) -> None:
        """An agent has something to say."""

    def fail(self, words: str, program: Program | None = None) -> None:
        """The launch has failed."""

    def say(self, words: str) -> None:
        """Tell the person who has started it."""


class Gathering:
    """The programs of a launch and their agents, up to their hello.

    Attributes:
        posts: the agents that are to come.
    """

    def __init__(self, plan: LaunchPlan, starter: Starter, loop: Loop, launch: Launch) -> None:
        self._plan, self._starter, self._loop, self._launch = plan, starter, loop, launch
        self._reception = Reception()
        self.posts = posts_of(plan, per_rank=starter.per_rank)
        self._by_node: dict[int, list[Post]] = {}
        for post in self.posts:
            self._by_node.setdefault(post.host.node_rank, []).append(post)
        self._by_rank = {post.ranks[0]: post for post in self.posts}
        self._machines: dict[int, str] = {}
        self._missing = len(self.posts)
        self._to_come: Iterator[Program] | None = None
        self._programs: list[Program] = []
        self._waiting: set[Program] = set()
        self._abandoned = self._looking = False

    def open(self) -> None:
        """Start the first programs."""
        allow_files(256 + 4 * len(self.posts))
        try:
            self._to_come = iter(self._starter.start(self._plan, self._reception))
        except LaunchError as error:
            self._launch.fail(str(error))
        self._go_on()
        self._loop.later(_LOOK_S, self._look_at_the_clock)

    def _go_on(self) -> None:
        """Start programs while not too many are waited for."""
        while self._to_come is not None and len(self._waiting) < _AT_ONCE and not self._abandoned:
            try:
                program = next(self._to_come, None)
            except LaunchError as error:
                self._launch.fail(str(error))
                return
            if program is None:
                self._to_come = None
                break
            self._add(program)
        if self._reception.listener is not None and self._to_come is None and not self._abandoned:
            self._loop.forget(self._reception.listener.fileno())
            self._loop.watch(self._reception.listener.fileno(), self._accept)
        self._watch_guests()

    def _add(self, program: Program) -> None:
        self._programs.append(program)
        self._waiting.add(program)
        nodes = self._by_node if program.nodes is None else program.nodes
        for node in nodes:
            for post in self._by_node.get(node, ()):
                post.program = program
                program.missing += 1
        self._loop.watch(program.words, partial(self._hear, program))

    def _accept(self) -> None:
        self._reception.accept()
        self._watch_guests()

    def _watch_guests(self) -> None:
        for descriptor in self._reception.new:
            self._loop.watch(descriptor, partial(self._meet, descriptor))
        self._reception.new.clear()

    def _meet(self, descriptor: int) -> None:
        """Read from a guest."""
        guest = self._reception.guests.get(descriptor)
        if guest is None:
            return
        try:
            said = self._reception.hello(guest)
        except LaunchError as error:
            self._launch.fail(str(error))
            said = None
        if said is None and not guest.channel.ended and not self._abandoned:
            return
        self._loop.forget(descriptor)
        self._reception.guests.pop(descriptor, None)
        if said is None or not self._seat(guest, said):
            if guest.node is not None:
                for post in self._by_node[guest.node]:
                    if post.program is not None:
                        post.program.hear(guest.channel.noise)
            guest.channel.close()
            self.look_soon()

    def _seat(self, guest: Guest, said: dict[str, Any]) -> bool:
        """Give an agent its place; whether it has one."""
        post = self._place_of(guest, said)
        if post is None or post.over or self._abandoned:
            return False
        post.channel, post.hello = guest.channel, said
        self._loop.take(guest.channel.reader, partial(self._launch.hear, post))
        self._missing -= 1
        if post.program is not None:
            post.program.missing -= 1
            post.program.waited()
            if post.program.missing == 0:
                self._waiting.discard(post.program)
                self._pass_on(post.program)
        self._go_on()
        if self._missing == 0:
            self._lock()
            self._launch.gathered()
        return True

    def _lock(self) -> None:
        """Let nobody in any more: all are there."""
        if self._reception.listener is not None:
            self._loop.forget(self._reception.listener.fileno())
        for descriptor in self._reception.guests:
            self._loop.forget(descriptor)
        self._reception.close()

    def _place_of(self, guest: Guest, said: dict[str, Any]) -> Post | None:
        if self._starter.per_rank:
            post = self._by_rank.get(said["rank"])
            who = f"rank {said['rank']}"
        else:
            node = said["node"] if guest.node is None else guest.node
            post = next(iter(self._by_node.get(node, ())), None)
            who = f"node {node}"
        if post is None or post.channel is not None:
            problem = "is in no plan" if post is None else "has come already"
            self._launch.fail(
                f"agent on {said['host']!r}: says that it is {who}, which {problem}; see how it is started"
            )
            return None
        machine = self._machines.setdefault(post.host.node_rank, said["network"])
        if machine != said["network"]:
            self._launch.fail(
                f"{post.name}: it is on {said['host']!r}, but other ranks of that host are on another machine; "
                "see how the launcher places ranks"
            )
            return None
        return post

    def peers(self) -> list[str]:
        """Names and addresses of the hosts that rank 0's must be reached from; none where all is on one machine."""
        others = [host.name for host in self._plan.hosts if host.first_rank > 0][:_ASKED]
        if self._plan.only_node is not None:
            return others
        here = self._machines.get(self._plan.hosts[0].node_rank)
        apart = [post for post in self.posts if post.hello.get("network") != here]
        return [*others, *(address for post in apart[:_ASKED] for address in post.hello["addresses"])] if apart else []

    def abandon(self) -> None:
        """Wait for no more agents."""
        self._abandoned = True
        self._to_come = None
        self._lock()

    # Programs.

    def _hear(self, program: Program) -> None:
        if program.silent:
            return
        if not program.read():
            self._loop.forget(program.words)
            program.hush()
            self.look_soon()
        elif program.missing == 0:
            self._pass_on(program)
        elif program.alarmed() and not self._abandoned:
            self._launch.fail("agents: not all can come", program)

    def _pass_on(self, program: Program) -> None:
        for line in program.new_lines():
            self._launch.say(f"{program.what}: {line}")

    def look_soon(self) -> None:
        """Some child has ended: see which programs have."""
        if not self._looking:
            self._looking = True
            self._loop.later(_SOON_S, self._look)

    def _look(self) -> None:
        self._looking = False
        for program in self._programs:
            if not program.seen and program.poll():
                if program.silent or time.monotonic() - (program.ended_at or 0.0) > _LAST_WORDS_S:
                    self._has_ended(program)
                else:
                    self.look_soon()

    def _has_ended(self, program: Program) -> None:
        program.seen = True
        if not program.silent:
            self._loop.forget(program.words)
            program.hush()
        if self._abandoned:
            return
        if program.missing:
            self._launch.fail(f"{self._absent(program)}: no agent has come", program)
        else:
            self._loop.later(_AFTER_END_S, partial(self._was_early, program))

    def _was_early(self, program: Program) -> None:
        left = [post for post in self.posts if post.program is program and not post.over]
        if left and not self._abandoned:
            self._launch.fail(f"{left[0].name}: its launcher has ended before its ranks", program)

    def _absent(self, program: Program) -> str:
        """Who has not come, in few words."""
        absent = [post for post in self.posts if post.program is program and not post.hello]
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        return ", ".join(post.name for post in absent[:3]) + more

    def _look_at_the_clock(self) -> None:
        if self._abandoned:
            return
        now = time.monotonic()
        for program in self._waiting:
            if now > program.expected_by:
                self._launch.fail(f"{self._absent(program)}: no agent has come in time", program)
                return
        for guest in self._reception.expired():
            self._loop.forget(guest.channel.reader)
            self._reception.guests.pop(guest.channel.reader, None)
            guest.channel.close()
        if self._missing:
            self._loop.later(_LOOK_S, self._look_at_the_clock)

    def all_ended(self) -> bool:
        """Whether all programs have ended and said their last words."""
        return all(program.seen for program in self._programs)

    def stop(self, number: signal.Signals, *, incomplete: bool = False) -> None:
        """Send all programs a signal, or those that have not brought all of their agents."""
        for program in self._programs:
            if program.missing or not incomplete:
                program.stop(number)

    def close(self, *, kill: bool) -> None:
        """Leave nothing of the gathering behind."""
        self.abandon()
        if kill:
            self.stop(signal.SIGKILL)
        for program in self._programs:
            if not program.silent:
                self._loop.forget(program.words)
                program.hush()
            program.seen = True
