"""Whole runs through the command line, as a user has them: submit, watch, disturb, compare."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcds_server import hpcds_server

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Mapping

GPT = Path(__file__).resolve().parent.parent / "examples" / "gpt" / "job.json"
SMALL = ("--width", "32", "--bytes", "400000")
OVER = {"finished", "held", "cancelled", "failed"}


@dataclass(frozen=True)
class Run:
    """One submitted run."""

    folder: Path
    job_id: str
    hpcds: Callable[..., subprocess.CompletedProcess[str]]

    def lines(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def steps(self) -> list[dict[str, Any]]:
        return [event for event in self.lines("events.jsonl") if event["event"] == "step"]

    def losses(self) -> dict[int, tuple[float, float | None, float]]:
        """Step -> loss, gradient norm and learning rate, to the bit; of a step taken again, the last time."""
        return {step["step"]: (step["loss"], step["grad_norm"], step["lr"]) for step in self.steps()}

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = json.loads(self.hpcds("status", str(self.folder), "--json").stdout)
        return status

    def wait_for_step(self, step: int, timeout_s: float = 120) -> None:
        wait_until(lambda: len(self.steps()) >= step, timeout_s, self, f"step {step}")

    def wait_until_over(self, timeout_s: float = 240) -> dict[str, Any]:
        wait_until(lambda: self.status()["state"] in OVER, timeout_s, self, "the end of the run")
        return self.status()

    def story(self) -> str:
        """All that a failed test wants to know."""
        logs = sorted((self.folder / "logs").rglob("*.log"))
        parts = [f"--- {path.relative_to(self.folder)}\n{path.read_text(errors='replace')[-3000:]}" for path in logs]
        ledger = self.folder / "attempts.jsonl"
        return "\n".join([ledger.read_text() if ledger.exists() else "no ledger", *parts])


def wait_until(condition: Callable[[], bool], timeout_s: float, run: Run, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not in {timeout_s} s\n{run.story()}")
        time.sleep(0.3)


class Runs:
    """Where a test's runs are, and the environment they are started from."""

    def __init__(self, folder: Path, env: Mapping[str, str]) -> None:
        self.folder = folder
        # The list of all runs of a user must not gather those of tests.
        self.env = {**env, "XDG_STATE_HOME": str(folder / "state"), "OMP_NUM_THREADS": "1"}

    def hpcds(self, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = hpcds_server().run(args, self.env, self.folder, timeout_s=300)
        if check and done.returncode != 0:
            raise AssertionError(f"hpcds {' '.join(args)}: {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def submit(self, target: Path, *options: str, args: tuple[str, ...] = ()) -> Run:
        answer = self.hpcds("submit", str(target), "--json", *options, *(("--", *args) if args else ()))
        data = json.loads(answer.stdout)
        assert set(data) == {"run_dir", "job_id", "site"}
        return Run(Path(data["run_dir"]), data["job_id"], self.hpcds)
