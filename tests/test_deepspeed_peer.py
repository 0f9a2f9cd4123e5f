"""The harness of the peer: the real DeepSpeed runs, only where it shall, and shows what went wrong."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

import pytest
from deepspeed_peer import VERSION, run_deepspeed

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.ranks

TELLS = """
import os, sys
import deepspeed, torch
import deepspeed.comm as dist

def answer(payload):
    total = torch.tensor([payload["start"] + dist.get_rank()])
    dist.all_reduce(total)
    return [deepspeed.__version__, int(total), payload["words"], os.environ.get("SLURM_JOB_ID")]
"""

FAILS = """
import deepspeed.comm as dist

def answer(payload):
    if dist.get_rank() == payload:
        raise LookupError("a message of mine")
    dist.barrier()
"""

HANGS = """
import time

def answer(payload):
    print("I am here", flush=True)
    time.sleep(1000)
"""


def written(folder: Path, text: str) -> Path:
    script = folder / "script.py"
    script.write_text(text, encoding="utf-8")
    return script


def test_every_rank_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    answers = run_deepspeed(written(tmp_path, TELLS), 2, {"start": 10, "words": ["a"]})
    assert answers == [[VERSION, 21, ["a"], None]] * 2


def test_a_rank_that_fails_is_shown(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"rank 1, exit code 1:\n(.|\n)*LookupError: a message of mine"):
        run_deepspeed(written(tmp_path, FAILS), 2, 1)


def test_a_rank_that_hangs_is_stopped_and_shown(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"rank 0, exit code -9:"):
        run_deepspeed(written(tmp_path, HANGS), 1, None, timeout_s=2.0)


def test_it_is_not_in_the_environment() -> None:
    assert importlib.util.find_spec("deepspeed") is None
