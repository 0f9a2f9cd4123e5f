"""Run all tests as two pytests at the same time: `make test` does.

    python tests/side_by_side.py            # everything
    python tests/side_by_side.py ARGS...    # as pytest ARGS, one alone

Tests of whole runs, on Slurm, hosts, MPI and site local, mostly wait; the others compute. Those that compute give way to those
that wait (nice), so that these find a machine that is as good as theirs. What the computing ones say is shown when the
others have ended.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile

WAITING = "slurm or hosts or mpi or ssh or local"
_NO_TESTS = 5  # pytest's exit code where none was selected


def main() -> int:
    pytest = [sys.executable, "-m", "pytest"]
    if sys.argv[1:]:
        return subprocess.run([*pytest, *sys.argv[1:]], check=False).returncode
    with tempfile.TemporaryFile() as said:
        computing = subprocess.Popen(
            ["nice", "-n", "10", *pytest, "-p", "no:cacheprovider", "-m", f"not ({WAITING})"],
            stdout=said,
            stderr=subprocess.STDOUT,
        )
        try:
            codes = [subprocess.run([*pytest, "-m", WAITING], check=False).returncode, computing.wait()]
        finally:
            computing.terminate()
            computing.wait()
        said.seek(0)
        sys.stdout.flush()
        sys.stdout.buffer.write(said.read())
    return max((code for code in codes if code != _NO_TESTS), default=_NO_TESTS)


if __name__ == "__main__":
    sys.exit(main())
