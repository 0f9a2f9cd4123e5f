"""DEEPSPEED_TIMEOUT: how long collectives wait in a script that says ``import deepspeed``."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from typing import TYPE_CHECKING

from deepspeed_peer import FOLDER, REPOSITORY

if TYPE_CHECKING:
    import pytest

GIVEN = ["3", " 45 ", None]
REFUSED = ["0", "-1", "soon", "1.5", "9" * 20]

PROGRAM = """
import json, os, sys
from datetime import timedelta
import torch, torch.distributed as dist
import hpc_ds
def came(join, value, **arguments):
    os.environ.pop("DEEPSPEED_TIMEOUT", None)
    os.environ.update({} if value is None else {"DEEPSPEED_TIMEOUT": value})
    try:
        join(verbose=False, **arguments)
    except hpc_ds.HpcdsError as error:
        return str(error)
    seconds = dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout.total_seconds()
    dist.destroy_process_group()
    return seconds
given, refused = json.loads(sys.argv[1])
found = {"own name": came(hpc_ds.init_distributed, "3")}
import deepspeed
found["given"] = [came(deepspeed.init_distributed, value) for value in given]
found["refused"] = [came(deepspeed.init_distributed, value) for value in refused]
found["named"] = came(deepspeed.init_distributed, "3", timeout=timedelta(seconds=77))
os.environ["DEEPSPEED_TIMEOUT"] = "4"
deepspeed.initialize(model=torch.nn.Linear(2, 2), config={"train_batch_size": 1})
found["initialize"] = dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout.total_seconds()
print(json.dumps(found))
"""


def test_it_is_obeyed_as_deepspeed_obeys_it(monkeypatch: pytest.MonkeyPatch) -> None:
    words = [sys.executable, "-m", "hpc_ds.compat", sys.executable, "-c", PROGRAM, json.dumps([GIVEN, REFUSED])]
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(words, env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["own name"], found["named"], found["initialize"]) == (600, 77, 240)
    for value, line in zip(REFUSED, found["refused"], strict=True):
        assert line == f"DEEPSPEED_TIMEOUT {value!r}: not a whole number of minutes above 0; correct it or unset it"
    constants = FOLDER / "deepspeed" / "constants.py"
    assert constants.exists(), f"{FOLDER}: run python tests/install_deepspeed_peer.py"
    theirs = []
    for value in GIVEN:
        monkeypatch.delenv("DEEPSPEED_TIMEOUT", raising=False)
        if value is not None:
            monkeypatch.setenv("DEEPSPEED_TIMEOUT", value)
        theirs.append(runpy.run_path(str(constants))["default_pg_timeout"].total_seconds())
    assert found["given"] == theirs == [180, 2700, 600]
