"""``hpcds doctor``: look at the nodes of a launch as a training would meet them, and say which are unfit."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hpc_ds.errors import ConfigError, LaunchError

if TYPE_CHECKING:
    from hpc_ds.launch.plan import LaunchPlan
    from hpc_ds.runtime.verdict import Finding

_UNFIT = 1
_NOT_OURS = ("module", "no_python", "no_local_rank", "enable_each_rank_log", "prefix", "save_pid", "json")


def doctor(
    context: typer.Context,
    site: Annotated[
        str | None, typer.Option("--site", metavar="SITE", help="A site, whose allreduce_gb_s is expected.")
    ] = None,
    look_at: Annotated[
        list[str] | None,
        typer.Option("--look-at", metavar="FOLDER", help="Must have room on each node; several times."),
    ] = None,
    limit: Annotated[float, typer.Option("--limit", metavar="SECONDS", min=1.0, help="For all of it.")] = 300.0,
    slow: Annotated[
        str, typer.Option("--slow", metavar="warn|fail", help="What a node less than half as fast as the others is.")
    ] = "fail",
    json_output: Annotated[bool, typer.Option("--json", help="All that was found, as JSON.")] = False,
) -> None:
    """Look at nodes as a training would meet them, and say which are unfit.

    Which nodes, and how they are reached, is said by the options of `hpcds run` (--hostfile, --include, --num_nodes, --num_gpus,
    --launcher ...); without them, and in a Slurm job, it is what `hpcds run` would take. Exit code 1 where something failed.
    """
    if slow not in {"warn", "fail"}:
        raise ConfigError(f"--slow {slow!r}: neither warn nor fail; use one of them", key="slow")
    places = [*(look_at or ()), os.getcwd()]  # noqa: PTH109 - as text
    if {"-h", "--help"} & {*context.args[:1]}:
        print(context.get_help())
        return
    plan = _plan(
        context.args,
        [f"--limit={limit:g}", *(f"--look-at={place}" for place in dict.fromkeys(places))],
        json_output=json_output,
    )
    if plan is not None:
        raise typer.Exit(_examine(plan, _expected(site), slow, json_output=json_output))


def _plan(words: list[str], arguments: list[str], *, json_output: bool) -> LaunchPlan | None:
    """How the doctor is started; None where that was only to be printed."""
    from hpc_ds.cli.run import Notes, make_plan
    from hpc_ds.cli.run_options import parse
    from hpc_ds.cli.run_show import as_json, as_text

    line = parse(words)
    if line.script is not None:
        raise ConfigError(f"{line.script!r}: hpcds doctor runs no script; leave it out", key="script")
    given = next((name for name in _NOT_OURS if name in line.values), None)
    if given is not None:
        raise ConfigError(f"--{given}: is for the script of hpcds run; leave it out", key=given)
    values: dict[str, Any] = {**line.values, "module": True, "no_local_rank": True}
    notes = Notes([], [])
    plan = make_plan(values, ["hpc_ds.runtime.doctor", *arguments], os.environ, notes)
    for text in [*notes.notes, *notes.warnings]:
        sys.stderr.write(f"hpcds doctor: {text}\n")
    if values.get("dry_run"):
        print(as_json(plan, notes.notes + notes.warnings) if json_output else as_text(plan), end="")
        return None
    return plan


def _expected(site: str | None) -> float | None:
    if site is None:
        return None
    from hpc_ds.config.load import load_site

    return load_site(site).allreduce_gb_s


def _examine(plan: LaunchPlan, allreduce_gb_s: float | None, slow: str, *, json_output: bool) -> int:
    from hpc_ds.report.doctor import named_by, summary_of
    from hpc_ds.runtime.verdict import Asked, failed, findings_of

    hosts = [host for host in plan.hosts if plan.only_node in {None, host.node_rank}]
    code, told, problem = _records(plan)
    if code > 128 and not told:
        return code  # it was told to end
    records = named_by(told, [(host.name, host.first_rank, host.ranks) for host in plan.hosts])
    ranks = {host.name: host.ranks for host in hosts}
    asked = Asked(sum(ranks.values()), ranks, _gpus(plan), allreduce_gb_s=allreduce_gb_s, slow=slow)
    findings = [*problem, *(findings_of(records, asked) if records or not problem else ())]
    summary = summary_of(records, findings, list(ranks))
    bad = failed(findings)
    if json_output:
        data = {"ok": not bad, "nodes": summary, "findings": [one.as_data() for one in findings], "records": records}
        print(json.dumps(data))
    else:
        _show(records, findings, summary)
    return _UNFIT if bad else 0


def _records(plan: LaunchPlan) -> tuple[int, list[dict[str, Any]], list[Finding]]:
    """How the launch ended, what each rank told last, and what kept the launch from going well."""
    from hpc_ds.launch.conduct import conduct
    from hpc_ds.launch.starters import starter_for
    from hpc_ds.runtime.verdict import MARK, Finding

    problem: list[Finding] = []
    code = 1
    with tempfile.TemporaryFile() as output:
        try:
            code = conduct(plan, starter_for(plan), out=output.fileno())
        except LaunchError as error:
            named = next((host.name for host in plan.hosts if repr(host.name) in str(error)), "")
            problem = [Finding(named, "start", "fail", str(error))]
        output.seek(0)
        lines = output.read().decode(errors="replace").splitlines()
    last: dict[int, dict[str, Any]] = {}
    for line in lines:
        if line.startswith(MARK):
            with contextlib.suppress(ValueError):  # cut short, when its rank was killed
                record = json.loads(line.removeprefix(MARK))
                last[record["rank"]] = record
        else:
            sys.stderr.write(f"{line}\n")
    return code, [last[rank] for rank in sorted(last)], problem


def _gpus(plan: LaunchPlan) -> int | None:
    """GPUs of each host, where the plan names as many for all."""
    counts = {len(host.devices) if host.devices is not None else 0 for host in plan.hosts}
    return counts.pop() or None if len(counts) == 1 else None


def _show(records: list[dict[str, Any]], findings: list[Finding], summary: list[dict[str, Any]]) -> None:
    from rich.text import Text

    from hpc_ds.cli.show import console, styled, table
    from hpc_ds.report.doctor import TITLES, TO_THE_RIGHT, closing_lines, rows_of

    rows = [[node, styled(str(level)), *rest] for node, level, *rest in rows_of(summary)]
    to = console()
    to.print(table(TITLES, rows, right=TO_THE_RIGHT))
    for line in closing_lines(records, findings, summary):
        to.print(Text(line), soft_wrap=True)
