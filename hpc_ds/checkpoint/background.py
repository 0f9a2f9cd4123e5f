"""Saving behind the training: state is copied to host memory, then threads write, and the commit needs no collective.

1. ``start`` copies the shards while rank 0 makes the hidden folder, and returns: training goes on
2. every rank's thread writes its data file, then its index: whoever sees the index knows that the rank is done; a rank
   that cannot write leaves ``rank-R.failed`` with the reason in place of it
3. the thread of rank 0 waits for all of them, writes the manifest, renames the folder, replaces ``latest``
4. ``wait`` brings the outcome to all ranks

The threads are not daemons: an interpreter that ends waits for them, so a save that was begun is finished also when the
program is told to leave. When ranks have died, rank 0 gives up once nothing has been written for a while.
"""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hpc_ds.checkpoint import commit, writer
from hpc_ds.checkpoint.agree import on_rank_0, own_rank, reason, together
from hpc_ds.checkpoint.index import described, parse_index
from hpc_ds.checkpoint.layout import data_file, failed_file, index_file
from hpc_ds.checkpoint.shards import Arena
from hpc_ds.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hpc_ds.checkpoint.blocks import DataFile
    from hpc_ds.checkpoint.shards import Shard

PATIENCE_S = 600.0  # without a write of any rank, before rank 0 takes the save for lost
PATIENCE_AT_EXIT_S = 60.0  # the same once the program has ended
_SLEEP_S = (0.02, 0.5)  # between two looks at the folder: at first, at last


@dataclass(frozen=True, slots=True)
class Progress:
    """How far this rank's part of a save is."""

    written_bytes: int
    total_bytes: int
    seconds: float

    @property
    def remaining_s(self) -> float | None:
        """Seconds until the rest is written at the rate so far; None while there is no rate."""
        if self.written_bytes == 0:
            return None if self.total_bytes else 0.0
        return (self.total_bytes - self.written_bytes) * self.seconds / self.written_bytes


class Background:
    """The asynchronous saves of this process, one at a time. The copy's memory is kept from one save to the next."""

    def __init__(self, patience_s: float = PATIENCE_S, patience_at_exit_s: float = PATIENCE_AT_EXIT_S) -> None:
        self._arena = Arena()
        self._patience_s = patience_s, patience_at_exit_s
        self._save: _Save | None = None

    def reserve(self, shards: list[Shard]) -> None:
        """Get memory for a copy of these in a thread, so that the first ``start`` is as short as the later ones."""
        if self._save is not None:
            return  # its memory is in use
        size = sum(shard.data.numel() * shard.data.element_size() for shard in shards)
        self._arena.reserve(size, pinned=any(shard.data.device.type != "cpu" for shard in shards))

    def start(
        self,
        folder: Path,
        tag: str,
        content: writer.Content,
        *,
        save_latest: bool = True,
        committed: Callable[[], None] = lambda: None,
    ) -> None:
        """Begin to save; on return the content may change. Collective. Waits for the save before, if there is one.

        Args:
            folder: as of ``writer.save``.
            tag: as there.
            content: as there.
            save_latest: as there.
            committed: called by the thread of rank 0 once the checkpoint is visible.

        Raises:
            CheckpointError: the same on every rank: the save before failed, or this one cannot be begun.
        """
        self.wait()
        prepared, hidden = writer.begin(folder, tag, content, lambda found: self._arena.snapshot(found.placed))
        self._save = _Save(
            hidden,
            folder / tag,
            prepared.without_data(),
            writer.open_data(hidden, prepared, self._arena),
            save_latest=save_latest,
            patience_s=self._patience_s,
            committed=committed,
        )

    def wait(self) -> Path | None:
        """Wait until the save under way is durable, and return its folder; None where there is none. Collective.

        Raises:
            CheckpointError: the same on every rank: it failed. Nothing of it is visible, all before it is untouched.
        """
        save, self._save = self._save, None
        if save is None:
            return None
        what = f"checkpoint {str(save.final)!r}: not saved"
        try:
            together(what, save.own_part)
        except CheckpointError:
            save.stop()
            raise
        on_rank_0(what, save.whole)
        return save.final

    def give_up(self) -> None:
        """Stop the save under way, because a newer one is more urgent. Call it on every rank; no rank waits for another.

        Where all ranks have written their parts already, it is committed nevertheless.
        """
        save, self._save = self._save, None
        if save is not None:
            save.cancel()

    def poll(self) -> str:
        """What this rank knows without asking: ``idle``, ``running``, ``done`` or ``failed``; only ``wait`` is sure.

        On rank 0 ``done`` means committed, on the others that their part is written.
        """
        return "idle" if self._save is None else self._save.status()

    @property
    def held_bytes(self) -> int:
        """Host memory that is kept for the copy."""
        return self._arena.size_bytes

    @property
    def tag(self) -> str | None:
        """The tag that is being saved, until ``wait``."""
        return None if self._save is None else self._save.final.name

    def progress(self) -> Progress | None:
        """How far this rank is; None while nothing is being saved."""
        return None if self._save is None else self._save.progress()


class _Save:
    """One save under way: this rank's part of it, and on rank 0 the commit."""

    def __init__(
        self,
        hidden: Path,
        final: Path,
        prepared: writer.Prepared,
        data: DataFile,
        *,
        save_latest: bool,
        patience_s: tuple[float, float],
        committed: Callable[[], None],
    ) -> None:
        self.final = final
        self._committed = committed
        self._hidden = hidden
        self._prepared = prepared
        self._data = data
        self._save_latest = save_latest
        self._patience_s = patience_s
        self._rank = own_rank()
        self._began = time.monotonic()
        self._took: float | None = None
        self._stopped = threading.Event()
        self._written = threading.Event()
        self._failure: str | None = None  # of this rank's part
        self._uncommitted: str | None = None  # of the commit
        data.start()
        self._thread = threading.Thread(target=self._run, name="hpc_ds checkpoint", daemon=False)
        self._thread.start()

    def own_part(self) -> None:
        """Wait for this rank's part.

        Raises:
            CheckpointError: it could not be written.
        """
        self._written.wait()
        if self._failure is not None:
            raise CheckpointError(self._failure)

    def whole(self) -> None:
        """Wait for the commit. For rank 0.

        Raises:
            CheckpointError: there is none.
        """
        self._thread.join()
        if self._uncommitted is not None:
            raise CheckpointError(self._uncommitted)

    def stop(self) -> None:
        """Let the commit wait for nobody any more: it is known that a rank has failed."""
        self._stopped.set()
        self._thread.join()

    def cancel(self) -> None:
        """Stop writing, and let the commit wait for nobody."""
        self._data.cancel()
        self.stop()

    def status(self) -> str:
        """See ``Background.poll``."""
        if self._failure is not None or self._uncommitted is not None:
            return "failed"
        return "running" if self._thread.is_alive() else "done"

    def progress(self) -> Progress:
        """See ``Background.progress``."""
        seconds = self._took if self._took is not None else time.monotonic() - self._began
        return Progress(self._data.written_bytes, self._data.size_bytes, seconds)

    def _run(self) -> None:
        try:
            writer.finish(self._hidden, self._data, self._prepared)
        except Exception as error:  # noqa: BLE001 - told to every rank by wait
            self._failure = reason(error)
            _leave_word(self._hidden, self._rank, self._failure)
        self._took = time.monotonic() - self._began
        self._written.set()
        if self._rank == 0:
            try:
                self._commit()
            except Exception as error:  # noqa: BLE001 - told to every rank by wait
                self._uncommitted = reason(error)
                commit.give_up(self._hidden)

    def _commit(self) -> None:
        world_size = self._prepared.manifest["world_size"]
        _Arrivals(self._hidden, world_size, self._stopped, self._patience_s).wait()
        files = [
            _describe(self._hidden, rank) for rank in range(world_size)
        ]  # no threads: the interpreter may be ending
        manifest = writer.complete(self._prepared.manifest, self._hidden, files)
        commit.publish(self._hidden, self.final, manifest, save_latest=self._save_latest)
        self._committed()


class _Arrivals:
    """Waits until every rank has left its index, or word that it has failed."""

    def __init__(
        self, hidden: Path, world_size: int, stopped: threading.Event, patience_s: tuple[float, float]
    ) -> None:
        self._hidden = hidden
        self._world_size = world_size
        self._stopped = stopped
        self._patience_s = patience_s

    def wait(self) -> None:
        """Return when every rank is done.

        Raises:
            CheckpointError: a rank has failed, or nothing has been written for too long.
        """
        seen, sleep_s, changed = -1, _SLEEP_S[0], time.monotonic()
        while not self._all_settled():
            size = self._size()
            if size != seen:
                seen, changed = size, time.monotonic()
            at_exit = not threading.main_thread().is_alive()
            if self._stopped.is_set() or time.monotonic() - changed > self._patience_s[at_exit]:
                break
            self._stopped.wait(sleep_s)
            sleep_s = min(2 * sleep_s, _SLEEP_S[1])
        for rank in range(self._world_size):
            word = self._hidden / failed_file(rank)
            if word.exists():
                raise CheckpointError(f"rank {rank}: {word.read_text(encoding='utf-8', errors='replace')}")
        missing = self._missing()
        if missing:
            raise CheckpointError(f"rank {min(missing)} did not write its part; has it ended?")

    def _all_settled(self) -> bool:
        return not any(not (self._hidden / failed_file(rank)).exists() for rank in self._missing())

    def _missing(self) -> set[int]:
        """The ranks without an index. Listing the folder asks the server where a look at one name may not."""
        names = {path.name for path in self._hidden.iterdir()}
        return {rank for rank in range(self._world_size) if index_file(rank) not in names}

    def _size(self) -> int:
        """Bytes written so far by all ranks."""
        size = 0
        for path in self._hidden.iterdir():
            with contextlib.suppress(OSError):
                size += path.stat().st_size
        return size


def _leave_word(hidden: Path, rank: int, failure: str) -> None:
    """Tell rank 0; on a full disk there is room for it once the data file is gone."""
    with contextlib.suppress(OSError):
        (hidden / data_file(rank)).unlink(missing_ok=True)
        (hidden / failed_file(rank)).write_text(failure, encoding="utf-8")


def _describe(hidden: Path, rank: int) -> dict[str, Any]:
    """What the manifest says of a rank's files."""
    text = (hidden / index_file(rank)).read_bytes()
    return described(rank, text, parse_index(text).file_bytes)
