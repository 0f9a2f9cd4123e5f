"""Every name of the real DeepSpeed for scripts is in the tables, and what the tables say of it is so."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import names_of_both
import pytest
from deepspeed_peer import FOLDER, REPOSITORY, VERSION, run_deepspeed

from hpc_ds import compat
from hpc_ds.compat import lacking, names

if TYPE_CHECKING:
    from collections.abc import Iterator

SCRIPT = Path(names_of_both.__file__)
FOUND_HERE = {"deepspeed.utils.get_accelerator", "deepspeed.utils.dist", "deepspeed.utils.zero_to_fp32.main"}
"""Names that DeepSpeed has not defined where they are found, or not for an import."""


def file_of(module: str) -> tuple[Path, bool]:
    """The file of a module of the real package, and whether it is a package itself."""
    path = FOLDER.joinpath(*module.split("."))
    return (path / "__init__.py", True) if (path / "__init__.py").exists() else (path.with_suffix(".py"), False)


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Those that run when the module is imported."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With):
            yield from statements([*node.body, *getattr(node, "orelse", [])])
            for handler in getattr(node, "handlers", []):
                yield from statements(handler.body)


def public_names(module: str) -> set[str]:
    """What a module of the real package defines; a package, and what is imported with a star, also of other modules of it."""
    path, is_package = file_of(module)
    found: set[str] = set()
    for node in statements(ast.parse(path.read_bytes()).body):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {one.id for target in targets for one in ast.walk(target) if isinstance(one, ast.Name)}
        elif isinstance(node, ast.ImportFrom):
            source = absolute(module, node, is_package=is_package)
            for alias in node.names if source.startswith("deepspeed") else ():
                if alias.name == "*":
                    found |= public_names(source)
                elif is_package:
                    found.add(alias.asname or alias.name)
    return {name for name in found if not name.startswith("_")}


def absolute(module: str, node: ast.ImportFrom, *, is_package: bool) -> str:
    if node.level == 0:
        return node.module or ""
    above = module.split(".")[: None if is_package else -1]
    base = above[: len(above) - node.level + 1]
    return ".".join([*base, *([node.module] if node.module else [])])


def all_modules() -> list[str]:
    files = [path.relative_to(FOLDER) for path in (FOLDER / "deepspeed").rglob("*.py")]
    found = {".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in files}
    return sorted(name for name in found if not any(part in {"csrc", "__main__"} for part in name.split(".")))


def test_every_module_of_deepspeeds_is_there_or_lacking_with_a_reason() -> None:
    modules = all_modules()
    assert len(modules) > 300
    forgotten = [module for module in modules if module not in names.NAMES and lacking.told_of(module) is None]
    assert forgotten == []
    assert set(names.NAMES) <= {*modules}


@pytest.mark.parametrize("module", names.NAMES)
def test_every_public_name_of_a_module_is_there_or_lacking_with_a_reason(module: str) -> None:
    public = public_names(module)
    here = names.NAMES[module]
    forgotten = [
        name
        for name in public
        if name not in here and f"{module}.{name}" not in names.NAMES and lacking.told_of(f"{module}.{name}") is None
    ]
    assert forgotten == []
    invented = {name for name in here if not name.startswith("_") and name not in public}
    assert {f"{module}.{name}" for name in invented} <= FOUND_HERE | {
        "deepspeed.runtime.zero.partition_parameters.get_accelerator"
    }


def test_what_is_lacking_is_deepspeeds_and_not_here() -> None:
    modules = {*all_modules(), "deepspeed.elasticity"}
    for name in lacking._SPEAKS:
        module, _, last = name.rpartition(".")
        assert name in modules or last in {*public_names(module), "HAS_TRITON"}, name
        assert last not in names.NAMES.get(module, {}), name
    for name in lacking._EXACT:
        module, _, last = name.rpartition(".")
        assert last not in names.NAMES[module], name


def test_each_name_has_its_home() -> None:
    for module, table in names.NAMES.items():
        for name, home in table.items():
            where, _, what = home.partition(":")
            if what and not where.startswith("deepspeed"):
                assert getattr(importlib.import_module(where), what, missing) is not missing, (module, name, home)


missing = object()


HOSTFILES = [
    None,
    "worker-0 slots=4\nworker-1 slots=2\n",
    "# all of them\n\n  worker-1   slots=4   max_slots=8 # big\nworker-0 slots=1",
    "a slots=1\nb slots=2\r\n",
    "me@10.0.0.1 slots=2\n",
    "worker-0\n",
    "worker-0:4\n",
    "worker-0 slots = 4\n",
    "worker-0 SLOTS=4\n",
    "worker-0 slots=a\n",
    "worker-0 slots=-1\n",
    "worker-0 slots=4\nworker-0 slots=4\n",
    "",
    "# nothing\n\n",
]
POOL = {"worker-0": 4, "worker-1": 4, "worker-2": 2}
FILTERS = [
    ("", ""),
    ("worker-0", ""),
    ("worker-1@worker-0", ""),
    ("worker-0@worker-1:0,2", ""),
    ("worker-1:3@worker-1:0@worker-1:3", ""),
    ("", "worker-1:0"),
    ("", "worker-0"),
    ("", "worker-0:0,1,2,3@worker-2"),
    ("worker-0", "worker-1"),
    ("worker-9", ""),
    ("worker-0:9", ""),
    ("worker-0:", ""),
    ("worker-0:0-2", ""),
    ("worker-0:a", ""),
    ("", "worker-9"),
    ("", "worker-2:2"),
]
READ = [
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "world_size", "global_rank",
    "zero_enabled", "zero_optimization_stage", "zero_config.stage", "zero_config.reduce_bucket_size",
    "float16_config.enabled", "gradient_clipping", "float16_config.initial_scale_power", "float16_config.loss_scale",
    "bfloat16_config.enabled", "optimizer_name", "optimizer_params", "scheduler_name", "scheduler_params",
    "steps_per_print", "prescale_gradients", "gradient_predivide_factor", "gradient_allreduce_op",
    "wall_clock_breakdown", "dump_state", "dataloader_drop_last", "zero_allow_untested_optimizer",
    "communication_data_type", "checkpoint_tag_validation_enabled", "checkpoint_tag_validation_fail",
    "torch_autocast_enabled", "torch_autocast_dtype", "monitor_config.csv_monitor.enabled", "load_universal_checkpoint",
    "use_node_local_storage", "memory_breakdown", "log_level",
]  # fmt: skip
ADAM = {"type": "Adam", "params": {"lr": 1e-3, "betas": [0.9, 0.95]}}
WARMUP = {"type": "WarmupLR", "params": {"warmup_num_steps": 10}}
CONFIGS: list[dict[str, Any]] = [
    {"train_batch_size": 8, "optimizer": ADAM, "scheduler": WARMUP, "gradient_clipping": 0.5},
    {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3, "bf16": {"enabled": True}},
    {
        "train_batch_size": 12,
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 3},
        "dump_state": True,
    },
    {"train_batch_size": 4, "fp16": {"enabled": True, "initial_scale_power": 8}, "zero_optimization": {"stage": 2}},
    {
        "train_batch_size": 4,
        "optimizer": {"type": "SGD", "params": {"lr": 1}},
        "checkpoint": {"tag_validation": "Fail"},
    },
    {"train_batch_size": 4, "torch_autocast": {"enabled": True, "dtype": "bfloat16"}, "csv_monitor": {"enabled": True}},
    {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 3},
    {"gradient_accumulation_steps": 3},
    {"train_batch_size": 0},
    {"train_batch_size": 4, "fp16": {"enabled": True}, "bf16": {"enabled": True}},
    {"train_batch_size": 4, "zero_optimization": {"stage": 4}},
    {"train_batch_size": 4, "elasticity": {"enabled": True}},
]
TUNING = [
    [],
    ["--lr_schedule", "WarmupLR", "--warmup_max_lr", "0.5"],
    ["--lr_schedule", "WarmupCosineLR", "--cos_min_ratio", "0.5"],
    ["--lr_schedule", "OneCycle", "--cycle_max_lr", "3", "--cycle_momentum"],
    ["--lr_schedule", "LRRangeTest", "--lr_range_test_staircase"],
    ["--lr_schedule", "Cosine"],
]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """The answers of the real package, and ours."""
    folder = tmp_path_factory.mktemp("both")
    dotted = [f"{module}.{name}" for module, table in names.NAMES.items() for name in table]
    payload = {
        "values": [name for name in dotted if name not in FOUND_HERE],
        "parameters": [name for name in dotted if name not in FOUND_HERE],
        "hostfiles": {"folder": str(folder), "texts": HOSTFILES},
        "filters": [[POOL, *case] for case in FILTERS],
        "configs": [[config, READ] for config in CONFIGS],
        "tuning": TUNING,
        "texts": [0, 0.0001, 0.25, 1, 999, 12345, 12345678, 2.5e9, 7e12],
    }
    (theirs,) = run_deepspeed(SCRIPT, 1, payload)
    ask = "import json, runpy, sys; print(json.dumps(runpy.run_path(sys.argv[1])['answer'](json.load(sys.stdin))))"
    environ = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(compat.PATH), str(REPOSITORY)]),
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [sys.executable, "-c", ask, str(SCRIPT)],
        input=json.dumps(payload),
        env={key: value for key, value in environ.items() if key not in {"RANK", "WORLD_SIZE", "LOCAL_RANK"}},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return theirs, json.loads(done.stdout.splitlines()[-1])


DIFFERENT = {"DeepSpeedEngine", "disable"}
"""An engine is made by ``initialize`` alone; and a function of torch's, whose one parameter has another name."""
VALUES_OF_OURS = {
    "deepspeed.version", "deepspeed.git_hash", "deepspeed.git_branch", "deepspeed.git_version_info.version",
    "deepspeed.git_version_info.git_hash", "deepspeed.git_version_info.git_branch", "deepspeed.ops.__compatible_ops__",
}  # fmt: skip


def test_constants_have_the_same_values(both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    theirs, ours = (answer["values"] for answer in both)
    assert len(ours) > 90
    same = [name for name in theirs if name not in VALUES_OF_OURS]
    assert {name: ours.get(name) for name in same} == {name: theirs[name] for name in same}
    assert theirs["deepspeed.version"] == VERSION


def test_functions_take_what_deepspeeds_take(both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    theirs, ours = (answer["parameters"] for answer in both)
    lacking_parameters = {}
    for name, wanted in theirs.items():
        taken = ours[name]
        if wanted is None or taken is None:
            continue
        left = [one for one in wanted if one not in taken]
        if left and name.rpartition(".")[0] not in {"deepspeed.comm", "deepspeed.comm.comm"}:  # see test_comm.py
            lacking_parameters[name] = left
    assert {name: left for name, left in lacking_parameters.items() if name.rpartition(".")[2] not in DIFFERENT} == {}


def test_hostfiles_are_read_alike(both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    theirs, ours = (answer["hostfiles"] for answer in both)
    assert dict(zip(map(str, HOSTFILES), ours, strict=True)) == dict(zip(map(str, HOSTFILES), theirs, strict=True))


def test_filters_leave_the_same(both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    theirs, ours = (answer["filters"] for answer in both)
    cases = [*map(str, FILTERS), "first", "encoded"]
    assert dict(zip(cases, ours, strict=True)) == dict(zip(cases, theirs, strict=True))


@pytest.mark.parametrize("number", range(len(CONFIGS)))
def test_a_config_is_read_alike(number: int, both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    theirs, ours = (answer["configs"][number] for answer in both)
    assert ours == theirs


def test_options_of_schedules_are_the_same(both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    theirs, ours = (answer["tuning"] for answer in both)
    assert ours == theirs


def test_numbers_are_written_alike(both: tuple[dict[str, Any], dict[str, Any]]) -> None:
    theirs, ours = (answer["texts"] for answer in both)
    assert ours == theirs
