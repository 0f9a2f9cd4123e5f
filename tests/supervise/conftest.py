"""What the tests of the supervisor share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from hpc_ds.run_dir import RunDir

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run folder as submitting leaves it."""
    run = RunDir(tmp_path / "run")
    for folder in (run.root, run.logs, run.local):
        folder.mkdir()
    return run
