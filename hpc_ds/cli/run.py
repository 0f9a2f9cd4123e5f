"""``hpcds run``: start ranks on this machine, on hosts, or in a Slurm allocation, as DeepSpeed's launcher is called."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hpc_ds.cli.run_options import help_text, parse, swallowed
from hpc_ds.cli.run_rank import become, notes_of, own_rank, shown
from hpc_ds.compat.environment import variables_of_the_rank
from hpc_ds.errors import ConfigError
from hpc_ds.launch.environment import chosen, exported, is_file, with_folder, with_the_name
from hpc_ds.launch.gres import with_gpus
from hpc_ds.launch.plan import LaunchPlan
from hpc_ds.launch.resources import Wish, choose
from hpc_ds.runtime.descent import is_below_a_rank, leave_the_run

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from hpc_ds.launch.plan import HostPlan
    from hpc_ds.runtime.rank import Rank

_LEVELS = ("debug", "info", "warning", "error", "critical")
_DEFAULT_PORT = 29500  # what hosts that do not hear of each other agree on
_REFUSED = {
    "autotuning": "DeepSpeed's autotuner is not here; try micro-batch sizes and stages with hpcds submit --sweep",
    "elastic_training": "DeepSpeed has removed it; a run of hpcds submit resumes at any number of ranks",
}


class Notes(NamedTuple):
    """What a person should know besides: ``warnings`` also with ``--log_level warning``."""

    notes: list[str]
    warnings: list[str]


def run(words: Sequence[str]) -> int:
    """Run a command line, ``run`` itself left out, and return its exit code."""
    line = parse(words)
    values: dict[str, Any] = dict(line.values)
    if values.get("help"):
        print(help_text(), end="")
        return 0
    notes = Notes([], [])
    script = [line.script or "", *line.args]
    me = own_rank(values, os.environ)
    if me is not None:
        return _be_rank(values, script, me, notes)
    if is_below_a_rank(os.environ):  # its ranks are a world of their own, on every host
        leave_the_run(os.environ)
    plan = make_plan(values, script, os.environ, notes)
    _say(notes, values)
    if values.get("dry_run"):
        from hpc_ds.cli.run_show import as_json, as_text

        print(as_json(plan, notes.notes + notes.warnings) if values.get("json") else as_text(plan), end="")
        return 0
    return _conduct(plan, save_pid=bool(values.get("save_pid")))


def make_plan(values: dict[str, Any], script: list[str], environ: Mapping[str, str], notes: Notes) -> LaunchPlan:
    """What a command line asks for.

    Args:
        values: of the options.
        script: the script and its arguments.
        environ: of this process.
        notes: gets what a person should know.

    Raises:
        ConfigError: it cannot be done.
    """
    _check(values, script)
    cwd = _folder()
    of_user = _of_user(values, environ, notes)
    variables = _ours(environ, cwd) | of_user
    wish = _wish(values)
    known = environ if wish.hostfile is not None or wish.launcher == "local" else with_gpus(environ)
    resources = choose(wish, {**known, **variables})
    notes.notes.extend(resources.notes)
    notes.warnings.extend(_warnings(values, script, resources.launcher))
    env = variables | resources.env
    if resources.launcher != "local":
        env = exported(environ) | env
    command, local_rank_at = _command(values, script)
    only_node = values["node_rank"] if values.get("no_ssh") else None
    plan = LaunchPlan(
        hosts=resources.hosts,
        command=command,
        cwd=cwd,
        launcher=resources.launcher,
        local_rank_at=local_rank_at,
        env=env,
        launcher_args=_split(values.get("launcher_args", "")),
        master_addr=values.get("master_addr") or (_meeting_host(resources.hosts[0]) if only_node is not None else None),
        master_port=_port(values, only_node),
        ssh_port=values.get("ssh_port"),
        grace_s=values.get("grace", 30.0),
        prefix=values.get("prefix", False),
        log_dir=_log_dir(values.get("enable_each_rank_log", "None"), cwd),
        bind_cores=values.get("bind_cores_to_rank", False),
        core_list=values.get("bind_core_list") if values.get("bind_cores_to_rank") else None,
        venv_script=values.get("venv_script"),
        only_node=only_node,
    )
    _check_here(plan, values, script[0], environ)
    return plan


def _be_rank(values: dict[str, Any], script: list[str], me: Rank, notes: Notes) -> int:
    """Become the script as the rank that this process is; returns only after ``--dry-run``."""
    _check(values, script)
    cwd = _folder()
    variables = _ours(os.environ, cwd) | variables_of_the_rank(os.environ) | _of_user(values, os.environ, notes)
    command, local_rank_at = _command(values, script)
    plan = LaunchPlan(
        hosts=(),
        command=command,
        cwd=cwd,
        local_rank_at=local_rank_at if me.placed else None,
        env=variables,
        venv_script=values.get("venv_script"),
    )
    _check_files(plan, values, script[0])
    told = notes_of(values, script[0], me, os.environ)
    notes = Notes(told, notes.warnings) if me.rank == 0 else Notes([], [])
    _say(notes, values)
    if not values.get("dry_run"):
        become(plan, me)
    print(shown(plan, me, notes.notes + notes.warnings, as_json=bool(values.get("json"))), end="")
    return 0


def _conduct(plan: LaunchPlan, *, save_pid: bool) -> int:
    from hpc_ds.launch.conduct import conduct
    from hpc_ds.launch.starters import starter_for

    starter = starter_for(plan)
    if not save_pid:
        return conduct(plan, starter)
    file = _write_pid()
    try:
        return conduct(plan, starter)
    finally:
        file.unlink(missing_ok=True)


def _write_pid() -> Path:
    """A file that says which process this is; one that is there was left by a process that is no more."""
    import tempfile

    file = Path(tempfile.gettempdir(), f"{os.getpid()}.deepspeed")
    try:
        file.unlink(missing_ok=True)
        with file.open("x", encoding="ascii") as opened:
            opened.write(str(os.getpid()))
    except OSError as error:
        raise ConfigError(f"--save_pid: {str(file)!r}: {error.strerror}; free that name, or set TMPDIR") from None
    return file


def _check(values: dict[str, Any], script: list[str]) -> None:
    """What is wrong whatever the resources are."""
    for name, reason in _REFUSED.items():
        if values.get(name):
            raise ConfigError(f"--{name}: not supported; {reason}", key=name)
    if not script[0]:
        raise ConfigError("script: missing; write hpcds run [OPTIONS] SCRIPT [ARGS]", key="script")
    if values.get("module") and values.get("no_python"):
        raise ConfigError("--module and --no_python: both are given; use one of them", key="module")
    if values.get("json") and not values.get("dry_run"):
        raise ConfigError("--json: is for --dry-run; add that, or leave it out", key="json")
    _check_values(values)


def _check_values(values: dict[str, Any]) -> None:
    if values.get("log_level", "info") not in _LEVELS:
        level = values["log_level"]
        raise ConfigError(f"--log_level {level!r}: not a level; use {', '.join(_LEVELS)}", key="log_level")
    if values.get("no_ssh") and values.get("node_rank", -1) < 0:
        raise ConfigError("--no_ssh: which of the hosts is this; add --node_rank N, counted from 0", key="node_rank")
    for name in ("master_port", "ssh_port"):
        lowest = 0 if name == "master_port" else 1
        if not lowest <= values.get(name, 1) <= 65535:
            raise ConfigError(f"--{name} {values[name]}: not a port; give {lowest} to 65535", key=name)


def _wish(values: dict[str, Any]) -> Wish:
    def number(name: str) -> int | None:
        value: int | None = values.get(name)
        return None if value == -1 else value  # DeepSpeed's word for nothing said

    launcher = values.get("launcher")
    return Wish(
        hostfile=values.get("hostfile"),
        include=values.get("include", ""),
        exclude=values.get("exclude", ""),
        num_nodes=number("num_nodes"),
        num_gpus=number("num_gpus"),
        launcher=launcher.lower() if launcher else None,
        force_multi=values.get("force_multi", False),
        only_node=values["node_rank"] if values.get("no_ssh") else None,
    )


def _folder() -> str:
    try:
        return os.getcwd()  # noqa: PTH109 - as text, and only once
    except OSError as error:
        raise ConfigError(f"current folder: {error.strerror}; go to one that is there") from None


def _of_user(values: dict[str, Any], environ: Mapping[str, str], notes: Notes) -> dict[str, str]:
    passed_over: list[str] | None = [] if values.get("as_deepspeed") else None
    found = chosen(environ, values.get("env_file", ()), values.get("env", ()), passed_over)
    notes.warnings.extend(f"{name} is set by the launcher itself; passed over" for name in passed_over or ())
    return found


def _ours(environ: Mapping[str, str], cwd: str) -> dict[str, str]:
    """What the launcher itself adds: the current folder is where modules are looked for, as with DeepSpeed."""
    return {"PYTHONPATH": with_folder(environ.get("PYTHONPATH"), cwd)}


def _command(values: dict[str, Any], script: list[str]) -> tuple[tuple[str, ...], int | None]:
    """What ranks run, and where in it the local rank goes."""
    front = with_the_name(sys.executable) if values.get("as_deepspeed") else []
    if not values.get("no_python"):
        front += [sys.executable, "-u"]
    if values.get("module"):
        front.append("-m")
    return (*front, *script), None if values.get("no_local_rank") else len(front) + 1


def _split(text: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        problem = str(error).lower()
        raise ConfigError(
            f"--launcher_args {text!r}: {problem}; quote it as a shell does", key="launcher_args"
        ) from None


def _port(values: dict[str, Any], only_node: int | None) -> int:
    port: int = values.get("master_port", 0 if only_node is None else _DEFAULT_PORT)
    if only_node is not None and port == 0:
        raise ConfigError(
            "--master_port 0: hosts with --no_ssh cannot agree on a free one; give a port", key="master_port"
        )
    return port


def _meeting_host(host: HostPlan) -> str:
    name = host.name.rpartition("@")[2]
    return "127.0.0.1" if name == "localhost" else name


def _log_dir(folder: str, cwd: str) -> str | None:
    if folder in {"None", ""}:  # DeepSpeed's word for no logs
        return None
    path = Path(cwd, folder)
    if os.path.exists(path) and not path.is_dir():  # noqa: PTH110 - Path.exists raises for a name that is too long
        raise ConfigError(f"--enable_each_rank_log {folder!r}: not a folder; name one", key="enable_each_rank_log")
    return str(path)


def _check_here(plan: LaunchPlan, values: dict[str, Any], script: str, environ: Mapping[str, str]) -> None:
    """What can be known before anything is started."""
    if plan.launcher == "local":
        _check_files(plan, values, script)
    if not plan.bind_cores:
        return
    if "KMP_AFFINITY" in {**environ, **plan.env}:
        raise ConfigError("--bind_cores_to_rank: KMP_AFFINITY binds threads too; unset it, or do not bind ranks")
    from hpc_ds.launch.cores import parse_core_list, slices

    if plan.launcher == "local":
        here = plan.hosts[plan.only_node or 0]
        slices(os.sched_getaffinity(0), here.ranks, plan.core_list)
    elif plan.core_list is not None:
        number, ranks = len(parse_core_list(plan.core_list)), max(host.ranks for host in plan.hosts)
        if number < ranks:
            raise ConfigError(
                f"--bind_core_list {plan.core_list!r}: {number} cores for {ranks} ranks of a host; name more cores",
                key="bind_core_list",
            )


def _check_files(plan: LaunchPlan, values: dict[str, Any], script: str) -> None:
    """Of ranks on this machine."""
    python = not values.get("module") and not values.get("no_python")
    if python and not os.path.exists(script):  # noqa: PTH110 - see _log_dir
        raise ConfigError(f"script {script!r}: no such file; name one, or use --module or --no_python", key="script")
    if plan.venv_script is not None and not is_file(plan.venv_script):
        raise ConfigError(f"--venv_script {plan.venv_script!r}: no such file; name one", key="venv_script")


def _warnings(values: dict[str, Any], script: list[str], launcher: str) -> list[str]:
    found = []
    if behind := swallowed(script[1:]):
        names = ", ".join(behind)
        found.append(
            f"{names}: stands behind {script[0]!r} and goes to it; hpcds run takes its options before the script"
        )
    if "node_rank" in values and not values.get("no_ssh"):
        found.append("--node_rank: counts only with --no_ssh; ignored")
    if values.get("bind_core_list") and not values.get("bind_cores_to_rank"):
        found.append("--bind_core_list: counts only with --bind_cores_to_rank; ignored")
    if values.get("launcher_args") and launcher == "local":
        found.append("--launcher_args: ranks are started here, without a launcher; ignored")
    return found


def _say(notes: Notes, values: dict[str, Any]) -> None:
    level = "error" if values.get("quiet") else values.get("log_level", "info")
    said = notes.notes if _LEVELS.index(level) <= _LEVELS.index("info") else []
    warned = notes.warnings if _LEVELS.index(level) <= _LEVELS.index("warning") else []
    for text in [*said, *warned]:
        sys.stderr.write(f"hpcds run: {text}\n")
