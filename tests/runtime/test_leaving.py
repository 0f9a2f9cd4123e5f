"""The quick end of a rank that was told to stop: the last collection is left out, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

SCRIPT = """
import atexit, gc, sys
import hpc_ds

class Cycle:
    def __init__(self, path):
        self.file = open(path, "w")
        self.itself = self
        self.file.write("written")

    def __del__(self):
        print("collected", flush=True)

def at_exit():
    cycle.file.write(" at exit")
    globals().pop("cycle")

gc.disable()
stop = hpc_ds.Preempted
cycle = Cycle(sys.argv[1])
atexit.register(at_exit)
try:
    {end}
finally:
    print("finally", flush=True)
"""
ENDS = {
    "preempted": ("raise stop('checkpointed')", 75, ["finally"]),
    "caught": ("\n    try:\n        raise stop\n    except SystemExit:\n        sys.exit(3)", 3, ["finally"]),
    "finished": ("pass", 0, ["finally", "collected"]),
}


@pytest.mark.parametrize("how", ENDS)
def test_only_the_last_collection_is_left_out(how: str, tmp_path: Path) -> None:
    end, code, said = ENDS[how]
    script, file = tmp_path / "script.py", tmp_path / "file"
    script.write_text(SCRIPT.replace("{end}", end))
    done = subprocess.run([sys.executable, script, file], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert done.stdout.split() == said
    if how != "finished":  # there Python's own collection closes the file before its buffer is written
        assert file.read_text() == "written at exit"
