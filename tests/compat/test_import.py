"""The name ``deepspeed`` in fresh interpreters: found only where asked for, loaded late, and clear about what is lacking."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
from deepspeed_peer import FOLDER, REPOSITORY, VERSION

from hpc_ds import compat

if TYPE_CHECKING:
    from pathlib import Path

OURS, REAL, HOUSE = str(compat.PATH), str(FOLDER), str(REPOSITORY)


def told(code: str, *path: str, **environ: str) -> Any:
    """What a program of a few lines prints as JSON, with these folders on its path."""
    kept = {
        key: value for key, value in os.environ.items() if key not in {"PYTHONPATH", "RANK", "WORLD_SIZE", "LOCAL_RANK"}
    }
    done = subprocess.run(
        [sys.executable, "-c", f"import json, sys\n{code}"],
        env={**kept, "DS_ACCELERATOR": "cpu", "PYTHONPATH": os.pathsep.join(path), **environ},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_nothing_is_loaded_until_a_name_is_used() -> None:
    loaded, after, parts, starred = told(
        """
import deepspeed, deepspeed.ops.adam, deepspeed.runtime.zero, deepspeed.utils.zero_to_fp32
import importlib.util
heavy = lambda: [name for name in ("torch", "numpy", "pydantic", "accelerate") if name in sys.modules]
before = heavy()
deepspeed.PipelineModule if hasattr(deepspeed, "PipelineModule") else deepspeed.__version__
before += heavy()
deepspeed.ops.adam.FusedAdam
parts = [deepspeed.__version_major__, deepspeed.__version_minor__, deepspeed.__version_patch__]
starred = {}
exec("from deepspeed import *", starred)
print(json.dumps([before, "torch" in heavy(), parts, "initialize" in starred]))
""",
        OURS,
        HOUSE,
    )
    assert (loaded, after) == ([], True)
    assert (parts, starred) == ([0, 19, 8], True)


LACKING = [
    "deepspeed.PipelineModule",
    "deepspeed.init_inference",
    "deepspeed.moe.layer.MoE",
    "deepspeed.moe",
    "deepspeed.runtime.pipe.engine.PipelineEngine",
    "deepspeed.runtime.utils.get_grad_zeros",
    "deepspeed.runtime.config.ROUTE_TRAIN",
    "deepspeed.ops.op_builder.CPUAdamBuilder",
    "deepspeed.nonsense",
    "deepspeed.comm.nonsense",
]
ASK = """
import importlib, importlib.util
def error(statement):
    try:
        exec(statement)
    except Exception as error:
        return [type(error).__name__, str(error)]
import deepspeed
found = {}
for name in json.loads(NAMES):
    module, _, last = name.rpartition(".")
    found[name] = [error(name), error(f"from {module} import {last}"), error(f"import {name}")]
    top = ".".join(name.split(".")[:2])
    found[name].append([hasattr(deepspeed, top.partition(".")[2]), importlib.util.find_spec(top) is not None])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def lacking() -> dict[str, Any]:
    return told(f"NAMES = {json.dumps(LACKING)!r}{ASK}", OURS, HOUSE)


@pytest.mark.parametrize("name", LACKING)
def test_a_name_that_is_lacking_says_so_however_it_is_asked_for(name: str, lacking: dict[str, Any]) -> None:
    attribute, from_import, plain_import, found = lacking[name]
    assert [attribute[0], from_import[0], plain_import[0]] == ["AttributeError", "ImportError", "ImportError"]
    # What stands before the name may be lacking as a whole: then that is what is said.
    assert all(said[1].partition(": ")[0] in name for said in (attribute, from_import, plain_import))
    assert all("docs/migrating-from-deepspeed.md" in said[1] for said in (attribute, from_import, plain_import))
    there = name.split(".")[1] in {"runtime", "comm", "ops"}
    assert found == [there, there]


def test_what_is_said_of_a_name_is_what_it_is_and_what_to_use(lacking: dict[str, Any]) -> None:
    (_, said) = lacking["deepspeed.PipelineModule"][1]
    assert said == (
        "deepspeed.PipelineModule: DeepSpeed's pipeline parallelism, which hpc_ds lacks; use ZeRO stage 3, which shards "
        "parameters too, over the plain module (docs/migrating-from-deepspeed.md)"
    )
    (_, said) = lacking["deepspeed.nonsense"][2]
    assert said.startswith("deepspeed.nonsense: neither hpc_ds nor DeepSpeed 0.19.8 has this name")


LOOK = """
import importlib.metadata, importlib.util
from accelerate.utils.imports import is_deepspeed_available as accelerate_says
from transformers.integrations.deepspeed import is_deepspeed_available as transformers_says
told = [bool(accelerate_says()), bool(transformers_says()), importlib.util.find_spec("deepspeed") is not None]
if told[2]:
    told += [importlib.metadata.version("deepspeed"), importlib.metadata.metadata("deepspeed")["Name"]]
    told.append(importlib.metadata.packages_distributions()["deepspeed"])
print(json.dumps(told))
"""


def test_transformers_and_accelerate_find_it_only_where_it_is_asked_for() -> None:
    assert told(LOOK, HOUSE) == [False, False, False]
    asked = told(f"import hpc_ds.compat; hpc_ds.compat.activate(){LOOK}", HOUSE)
    assert asked == [True, True, True, "0.19.8+hpcds", "deepspeed", ["deepspeed"]]


WHICH = """
import importlib, importlib.metadata
import deepspeed
def found(name):
    try:
        return importlib.import_module(name).__name__
    except ImportError as error:
        return str(error).partition(":")[0]
here = [module.__file__ for name, module in sys.modules.items() if name.startswith("deepspeed.") and hasattr(module, "__file__")]
print(json.dumps([
    deepspeed.__version__, importlib.metadata.version("deepspeed"), found("deepspeed.moe"), found("deepspeed.comm"), here,
]))
"""


def test_of_both_installed_only_the_one_that_is_first_is_seen() -> None:
    version, in_metadata, lacking, there, files = told(WHICH, OURS, REAL, HOUSE)
    assert version == in_metadata == "0.19.8+hpcds"
    assert (lacking, there) == ("deepspeed.moe", "deepspeed.comm")
    assert files == []  # none of the real package's files
    assert told(f"import hpc_ds.compat; hpc_ds.compat.activate(){WHICH}", REAL, HOUSE)[0] == "0.19.8+hpcds"


REFUSED = """
import hpc_ds.compat, os
from hpc_ds.errors import ConfigError
try:
    hpc_ds.compat.activate()
except ConfigError as error:
    print(json.dumps([deepspeed.__version__, importlib.metadata.version("deepspeed"), here, str(error), os.environ["PYTHONPATH"]]))
"""


def test_the_real_one_is_left_alone_and_activating_after_it_is_refused() -> None:
    version, in_metadata, files, said, path = told(f"{WHICH}{REFUSED}", REAL, OURS, HOUSE)
    assert version == in_metadata == VERSION
    assert all(file.startswith(REAL) for file in files)
    assert said.startswith(f"deepspeed: the package at '{FOLDER}/deepspeed/__init__.py' is imported already; call")
    assert path == os.pathsep.join([REAL, OURS, HOUSE])


def test_activate_holds_for_processes_that_are_started_and_can_be_called_again() -> None:
    first, child = told(
        """
import hpc_ds.compat, subprocess
hpc_ds.compat.activate()
before = list(sys.path)
hpc_ds.compat.activate()
import deepspeed
hpc_ds.compat.activate()
ask = [sys.executable, "-c", "import deepspeed; print(deepspeed.__version__)"]
print(json.dumps([before == sys.path and sys.path[0], subprocess.run(ask, capture_output=True, text=True).stdout]))
""",
        HOUSE,
    )
    assert (first, child) == (OURS, "0.19.8+hpcds\n")


def test_a_module_with_a_command_line_runs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "deepspeed.launcher.runner", "--help"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([OURS, HOUSE])},
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "--hostfile" in done.stdout
