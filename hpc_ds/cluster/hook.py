"""Tell the world of an event, in a process of its own: a command that reads it as JSON, a web address, or both.

``Hook`` starts that process and never waits longer than it is told to; the process itself gives each of the two ten
seconds. It ignores SIGTERM, which the end of a job sends to all of its processes.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from typing import TYPE_CHECKING, Any

from hpc_ds.cluster import process
from hpc_ds.version import __version__

if TYPE_CHECKING:
    from pathlib import Path

_EACH_S = 10


class Hook:
    """One event on its way."""

    def __init__(
        self, event: dict[str, Any], command: list[str] | None, url: str | None, *, home: Path, workdir: str | None
    ) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "hpc_ds.cluster.hook"],
            stdin=subprocess.PIPE,
            stdout=sys.stderr,
            cwd=home,  # Python looks for modules in the current folder first: not in the job's own
            preexec_fn=process.child_setup(die_with_parent=signal.SIGKILL),  # noqa: PLW1509 - see there
        )
        message = json.dumps({"event": event, "command": command, "url": url, "workdir": workdir}).encode()
        if self._process.stdin is not None:
            self._process.stdin.write(message)  # less than a pipe holds: see notify.py
            self._process.stdin.close()

    def finish(self, patience_s: float) -> None:
        """Wait for its end, but not for ever; then it is killed."""
        try:
            self._process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def run_command(command: list[str], event: dict[str, Any], workdir: str | None = None) -> str | None:
    """Run the command with the event on its input; returns what went wrong."""
    try:
        done = subprocess.run(command, input=json.dumps(event).encode(), timeout=_EACH_S, check=False, cwd=workdir)
    except subprocess.TimeoutExpired:
        return f"not ended in {_EACH_S} s, and killed"
    except (OSError, ValueError) as error:
        return str(error)
    return None if done.returncode == 0 else f"exit status {done.returncode}"


def post(url: str, event: dict[str, Any]) -> str | None:
    """Send the event to a web address; returns what went wrong."""
    headers = {"Content-Type": "application/json", "User-Agent": f"hpc_ds/{__version__}"}
    request = urllib.request.Request(url, json.dumps(event).encode(), headers)  # noqa: S310 - http or https, by the job's check
    try:
        with urllib.request.urlopen(request, timeout=_EACH_S):  # noqa: S310
            return None
    except (OSError, ValueError) as error:  # URLError and HTTPError are OSErrors
        return str(error)


def main() -> None:
    """Tell what is on the input."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    message = json.loads(sys.stdin.buffer.read())
    event, command, url = message["event"], message["command"], message["url"]
    problems = []
    if command:
        problems.append(("command", run_command(command, event, message["workdir"])))
    if url:
        signal.alarm(_EACH_S + 1)  # a server that sends a byte now and then outlives every time-out but this
        problems.append(("url", post(url, event)))
    for what, problem in problems:
        if problem is not None:
            sys.stderr.write(f"hpcds: notify.{what}: {problem}\n")


if __name__ == "__main__":
    main()
