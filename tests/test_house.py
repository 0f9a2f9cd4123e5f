"""House rules over ``hpc_ds/`` that no linter knows: sizes, doors, errors, imports.

A bound is raised by a decision that says why (docs/decisions/), never by golfing.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import hpc_ds
from hpc_ds import errors

if TYPE_CHECKING:
    from collections.abc import Iterator

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "hpc_ds"

LONGEST_FILE = 450
LONGEST_FUNCTION = 60  # signature and docstring counted
MOST_PARAMETERS = 7  # self and cls not counted

OURS = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}

# Builtin errors, and where each may be raised: (file or folder, function).
BUILTIN_ERRORS = {
    # Python's own protocol.
    "AttributeError": {("", "__getattr__")},
    "NotImplementedError": {("engine/own_optimizer.py", "_update"), ("engine/schedule.py", "rate")},
    "KeyError": {("config/load.py", "_no_duplicates")},
    "UnpicklingError": {("checkpoint/torch_file.py", "")},
    # Raised again in the thread that waits for another.
    "failure": {("checkpoint/blocks.py", "")},
    # Validators: pydantic, or the caller in the same room, makes an error of ours of it.
    "ValueError": {
        ("config/", ""),
        ("engine/schedule.py", ""),
        ("engine/cycles.py", ""),
        ("engine/warmups.py", ""),
        ("checkpoint/index.py", "parse_index"),
        ("checkpoint/plain.py", "_scalar"),
    },
    # A program that breaks the contract of a function: a fault of its author, who needs the traceback.
    "TypeError": {("", "")},
    # What an import is answered with: Python's own words would hide ours.
    "ImportError": {("compat/modules.py", "find_spec")},
    # The rank was told to stop: a SystemExit of our own.
    "Preempted": {("engine/", ""), ("integrations/trainer_callback.py", "on_save")},
    # Leaving the command line.
    "SystemExit": {("cli/", "")},
    "Exit": {("cli/", "")},
}

ENVIRONMENT_READERS = {
    "runtime/",  # a rank learns who it is
    "integrations/accelerate.py",  # says it to accelerate, which asks the environment
    "cluster/shell.py",  # hands it on, without the variables of an enclosing job
    "cluster/callables.py",  # a function's job learns how often it was started
    "cluster/local.py",
    "cluster/connect.py",  # which cluster this is
    "cluster/process.py",  # what Slurm calls this node
    "cluster/local_keeper.py",
    "launch/agent.py",  # what its host gives to ranks
    "launch/starters.py",  # what a user gives to pdsh's ssh
    "launch/start_mpi.py",  # hands it on to mpirun
    "launch/start_slurm.py",  # the allocation; hands it on to srun
    "compat/",  # what starts after it is to find the name deepspeed
    "supervise/supervisor.py",  # reads the job id, hands the rest on to the ranks
    "script/submit.py",  # env_from
    "script/functions.py",  # CUDA_VISIBLE_DEVICES, which submitit sets
    "cli/",  # hostfile of the job it is called in
    "run_dir.py",  # XDG_STATE_HOME
}

# Who may import a library, and who may name a function: the doors of the house.
DOORS = {
    "jinja2": {"script/render.py"},
    "mpi4py": {"runtime/mpi.py"},
    "submitit": {"cluster/callables.py"},
    "cloudpickle": {"cluster/callables.py"},
    "subprocess": {
        "cluster/shell.py",  # programs that are waited for
        "cluster/local.py",  # the keeper, which outlives us
        "cluster/local_keeper.py",  # the job script
        "launch/local.py",  # the ranks
        "launch/srun.py",  # the step
        "launch/ranks.py",  # the ranks
        "launch/program.py",  # what brings agents to their hosts
        "cluster/hook.py",  # a user's command, beside what follows an attempt
    },
    "pydantic": {"config/"},
    "pydantic_core": {"config/"},
    "torch.distributed.fsdp": {"engine/fully_sharded.py"},
    "typer": {"cli/"},
}


@cache
def trees() -> dict[str, ast.Module]:
    """Path below hpc_ds/ -> syntax tree."""
    return {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_bytes()) for path in PACKAGE.rglob("*.py")}


def in_any(file: str, places: set[str]) -> bool:
    return any(file == place or (place.endswith("/") and file.startswith(place)) for place in places)


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for file, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{file}:{node.lineno} {node.name}", node


def test_files_are_short() -> None:
    lines = {file: (PACKAGE / file).read_bytes().count(b"\n") for file in trees()}
    assert {file: count for file, count in lines.items() if count > LONGEST_FILE} == {}


def test_functions_are_short() -> None:
    lengths = {where: (node.end_lineno or node.lineno) - node.lineno + 1 for where, node in functions()}
    assert {where: length for where, length in lengths.items() if length > LONGEST_FUNCTION} == {}


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    given = node.args
    names = [parameter.arg for parameter in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return len([name for name in names if name not in {"self", "cls"}]) + (given.vararg is not None)


def test_functions_have_few_parameters_but_those_of_deepspeed_and_of_commands() -> None:
    too_many = []
    for where, node in functions():
        file = where.partition(":")[0]
        first_line = (PACKAGE / file).read_text(encoding="utf-8").splitlines()[node.lineno - 1]
        excused = file.startswith("cli/") or re.search(r"# noqa: PLR0913 - DeepSpeed's signature$", first_line)
        if parameters(node) > MOST_PARAMETERS and not excused:
            too_many.append(where)
    assert too_many == []


def test_every_module_says_what_it_is() -> None:
    assert [file for file, tree in trees().items() if not ast.get_docstring(tree)] == []


def undocumented(file: str, body: list[ast.stmt]) -> Iterator[str]:
    """Public classes, functions and methods without a docstring; inside of functions and private classes all is private."""
    for node in body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
            continue
        is_setter = any(isinstance(mark, ast.Attribute) and mark.attr == "setter" for mark in node.decorator_list)
        if not ast.get_docstring(node) and not is_setter:
            yield f"{file}:{node.lineno} {node.name}"
        if isinstance(node, ast.ClassDef):
            yield from undocumented(file, node.body)


def test_every_public_class_and_function_says_what_it_does() -> None:
    assert [where for file, tree in trees().items() for where in undocumented(file, tree.body)] == []


def run_time_imports(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports that run when a module is imported: not those in functions, nor those for type checkers."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
            yield from run_time_imports([*node.body, *node.orelse])
        elif isinstance(node, ast.Try):
            yield from run_time_imports([*node.body, *(line for part in node.handlers for line in part.body)])
        elif isinstance(node, ast.ClassDef):
            yield from run_time_imports(node.body)


def names_imported(node: ast.Import | ast.ImportFrom) -> list[str]:
    """Every dotted name that an import may stand for: ``from a.b import c`` is ``a.b`` and ``a.b.c``."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [f"{node.module}", *(f"{node.module}.{alias.name}" for alias in node.names)]


def test_no_import_goes_round_in_a_circle() -> None:
    modules = {
        "hpc_ds." + file.removesuffix(".py").replace("/", ".").removesuffix(".__init__"): tree
        for file, tree in trees().items()
    }
    needs = {
        module: {name for node in run_time_imports(tree.body) for name in names_imported(node) if name in modules}
        for module, tree in modules.items()
    }
    left = dict(needs)
    while ready := [module for module, needed in left.items() if not needed & left.keys() - {module}]:
        for module in ready:
            del left[module]
    assert left == {}


def test_nothing_is_asserted() -> None:
    """``python -O`` strips asserts."""
    asserts = [
        f"{file}:{node.lineno}"
        for file, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Assert)
    ]
    assert asserts == []


def raises(node: ast.AST, function: str = "", caught: frozenset[str] = frozenset()) -> Iterator[tuple[str, ast.Raise]]:
    """Each raise, with the name of its function; not those that the same function catches."""
    for field, value in ast.iter_fields(node):
        around = caught
        if isinstance(node, ast.Try) and field == "body":
            around = caught | {
                last_name(word) for part in node.handlers if part.type for word in alternatives(part.type)
            }
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.Raise) and last_name(child.exc) not in around:
                yield function, child
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from raises(child, child.name)
            elif isinstance(child, ast.AST):
                yield from raises(child, function, around)


def alternatives(caught: ast.expr) -> list[ast.expr]:
    return caught.elts if isinstance(caught, ast.Tuple) else [caught]


def last_name(raised: ast.expr | None) -> str:
    """``a.B(c)`` and ``B`` -> ``B``; the bare ``raise`` -> nothing."""
    if raised is None:
        return ""
    return ast.unparse(raised.func if isinstance(raised, ast.Call) else raised).rpartition(".")[2]


def errors_made_by_functions() -> set[str]:
    """Functions that return an error of ours for their caller to raise."""
    return {
        node.name
        for _, node in functions()
        if node.returns is not None and ast.unparse(node.returns).strip("'\"") in OURS
    }


def test_every_raise_raises_one_of_ours() -> None:
    foreign = []
    makers = errors_made_by_functions()
    for file, tree in trees().items():
        for function, node in raises(tree):
            name = last_name(node.exc)
            places = BUILTIN_ERRORS.get(name, set())
            allowed = any(file.startswith(place) and of in {"", function} for place, of in places)
            if name not in {""} | OURS | makers and not allowed:
                foreign.append(f"{file}:{node.lineno} {function}: {name}")
    assert foreign == []


def test_only_the_command_line_prints() -> None:
    printing = [
        f"{file}:{node.lineno}"
        for file, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {"print", "typer.echo", "sys.stdout.write"}
    ]
    # DeepSpeed's functions that print, print for the script that calls them.
    assert [where for where in printing if not where.startswith(("cli/", "compat/logs.py"))] == []


def test_the_environment_is_read_where_the_list_says() -> None:
    reading = {
        file
        for file, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node) in {"os.environ", "os.getenv", "os.putenv"}
    }
    assert [file for file in sorted(reading) if not in_any(file, ENVIRONMENT_READERS)] == []


@pytest.mark.parametrize("library", DOORS)
def test_each_library_has_one_door(library: str) -> None:
    entering = {
        file
        for file, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in names_imported(node)
        if name == library or name.startswith(f"{library}.")
    }
    assert [file for file in sorted(entering) if not in_any(file, DOORS[library])] == []
    assert all(any(in_any(file, {place}) for file in trees()) for place in DOORS[library]), "a door to nowhere"


def test_fully_shard_is_named_in_one_file() -> None:
    naming = {
        file
        for file, tree in trees().items()
        for node in ast.walk(tree)
        if (isinstance(node, ast.Name) and node.id == "fully_shard")
        or (isinstance(node, ast.Attribute) and node.attr == "fully_shard")
        or (isinstance(node, ast.alias) and node.name == "fully_shard")
    }
    assert naming == {"engine/fully_sharded.py"}


def test_the_public_names_are_those_of_the_table() -> None:
    assert sorted(hpc_ds.__all__) == sorted({*hpc_ds._HOME, *hpc_ds._MODULES, "__version__"})
    assert set(hpc_ds.__all__) <= set(dir(hpc_ds))


def test_a_public_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'hpc_ds' has no attribute 'initialise'"):
        hpc_ds.initialise  # type: ignore[attr-defined] # noqa: B018


def test_each_public_name_is_in_the_room_that_the_table_says() -> None:
    for name, module in hpc_ds._HOME.items():
        assert getattr(hpc_ds, name) is getattr(importlib.import_module(module), name)
    for name, module in hpc_ds._MODULES.items():
        assert getattr(hpc_ds, name) is importlib.import_module(module)


# Words that must not stand in this file either are put together here.
DEVELOPMENT = re.compile("|".join([r"(?<![\w.~}-])/" + "work/", "/" + "tmp/dev", "sandbox" + " session"]))


def test_no_file_names_the_machines_it_was_written_on() -> None:
    git = ["git", "-C", str(REPOSITORY), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    answer = subprocess.run(git, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        pytest.skip("not a git checkout")
    naming = {}
    for name in answer.stdout.split("\0"):
        path = REPOSITORY / name
        if name and path.is_file():
            text = path.read_text(encoding="utf-8", errors="replace")
            if found := sorted({match.group() for match in DEVELOPMENT.finditer(text)}):
                naming[name] = found
    assert naming == {}


# What a fresh process runs -> what it must do without. No words: `import hpc_ds` alone.
HEAVY = ("torch", "mpi4py", "submitit", "numpy")
LIGHT = (*HEAVY, "hpc_ds.config.model", "jinja2")
WITHOUT = {
    "": (*LIGHT, "pydantic", "typer"),
    "--help": (*LIGHT, "pydantic"),
    "--version": (*LIGHT, "pydantic"),
    # typer 0.29 itself loads pydantic, where it is installed, to parse the words of a verb.
    "submit --help": LIGHT,
    "hostfile n[1-2]": LIGHT,
    "checkpoint ls .": LIGHT,
    "submit --dry-run --site slurm train.py": HEAVY,
    "submit --dry-run --site local train.py": HEAVY,
}

FRESH = """
import json, sys
words = sys.argv[1:]
import hpc_ds
code = 0
if words:
    from hpc_ds.cli.entry import main
    try:
        main()
    except SystemExit as end:
        code = end.code or 0
print(json.dumps([code, sorted(sys.modules)]), file=sys.stderr)
"""


@pytest.mark.parametrize(("words", "unwanted"), WITHOUT.items())
def test_light_verbs_load_no_heavy_library(words: str, unwanted: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("", encoding="utf-8")
    fresh = subprocess.run(
        [sys.executable, "-c", FRESH, *words.split()], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    code, loaded = json.loads(fresh.stderr)
    assert code == 0
    assert [name for name in unwanted if name in loaded] == []


def test_the_rules_see_what_they_look_for() -> None:
    """The rules above pass on an empty list: they must be able to see something."""
    assert len(trees()) > 30
    assert sum(1 for tree in trees().values() for _ in raises(tree)) > 50
    assert "_as_config_error" in errors_made_by_functions()
    assert DEVELOPMENT.search("cd /" + "work/x")
    assert not DEVELOPMENT.search("/scratch/" + "work/x")
    example = ast.parse("try:\n raise A\nexcept (x.A, B):\n raise C(1)\n")
    assert [last_name(node.exc) for _, node in raises(example)] == ["C"]
    example = ast.parse("if TYPE_CHECKING:\n import a\nimport b\ndef f():\n import c\n")
    assert [name for node in run_time_imports(example.body) for name in names_imported(node)] == ["b"]
    assert list(undocumented("f", ast.parse("class A:\n def b(self): pass\n").body)) == ["f:1 A", "f:2 b"]
