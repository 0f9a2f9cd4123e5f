"""``hpcds site``: which clusters are known, what is known of each, and which one this is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hpc_ds.cli.options import JsonOption
from hpc_ds.errors import HpcdsError, SiteError

if TYPE_CHECKING:
    from hpc_ds.config.site import SiteConfig

app = typer.Typer(
    help="Which clusters are known, and which one this is.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def known_sites(incomplete: str) -> list[str]:
    """What a shell may complete a SITE to."""
    from hpc_ds.config.load import site_files

    return sorted(name for name in site_files() if name.startswith(incomplete))


SiteArgument = Annotated[str, typer.Argument(metavar="SITE", help="A site's name or file.", autocompletion=known_sites)]


@app.command("list")
def list_sites(json_output: JsonOption = False) -> None:
    """List every known site."""
    from hpc_ds.config.load import load_site, site_files
    from hpc_ds.shipped import shipped

    found: list[dict[str, Any]] = []
    for name, path in sorted(site_files().items()):
        one: dict[str, Any] = {"name": name, "file": str(path), "shipped": path.parent == shipped("site_configs")}
        try:
            site = load_site(str(path))
        except SiteError as error:
            found.append({**one, "description": None, "unverified": [], "error": str(error)})
        else:
            found.append({**one, "description": site.description, "unverified": site.unverified, "error": None})
    if json_output:
        typer.echo(json.dumps(found))
        return
    width = max(len(one["name"]) for one in found)
    for one in found:
        words = f"not usable: {one['error']}" if one["error"] else one["description"]
        typer.echo(f"{one['name']:{width}}  {words}{'' if one['shipped'] else '  (yours)'}")


@app.command("show")
def show(site: SiteArgument, json_output: JsonOption = False) -> None:
    """Print what is known of a site, where from, and what of it is not verified."""
    from hpc_ds.config.load import load_site

    known = load_site(site)
    if json_output:
        typer.echo(json.dumps({**known.model_dump(mode="json"), "unverified": known.unverified}))
        return
    for line in _lines(known):
        typer.echo(line)


def _lines(site: SiteConfig) -> list[str]:
    data = site.model_dump(mode="json", exclude_unset=True, exclude={"sources", "name", "description"})
    lines = [f"{site.name}: {site.description}"]
    for field, value in _flat(data):
        known = site.source_of(field)
        words = ""
        if known is not None:
            date = f", {known[1].date}" if known[1].date else ""
            words = f"  ({'' if known[1].verified else 'NOT VERIFIED: '}{known[1].source}{date})"
        lines.append(f"  {field}: {value if isinstance(value, str) else json.dumps(value)}{words}")
    return lines


def _flat(data: dict[str, Any], at: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in data.items():
        if isinstance(value, dict) and value:
            found += _flat(value, f"{at}{key}.")
        else:
            found.append((f"{at}{key}", value))
    return found


@app.command("validate")
def validate(
    files: Annotated[list[str], typer.Argument(metavar="SITE...", help="Site files, or names of sites.")],
    json_output: JsonOption = False,
) -> None:
    """Check site files, and name what is wrong in each."""
    found = [_checked(file) for file in files]
    if json_output:
        typer.echo(json.dumps(found))
    else:
        for one in found:
            _tell(one)
    if not all(one["ok"] for one in found):
        raise typer.Exit(SiteError.exit_code)


def _checked(file: str) -> dict[str, Any]:
    from hpc_ds.script.site_file import check_site

    try:
        site, warnings = check_site(file)
    except HpcdsError as error:
        return {"file": file, "name": None, "ok": False, "error": str(error), "warnings": [], "unverified": []}
    good = {"file": file, "name": site.name, "ok": True, "error": None}
    return {**good, "warnings": warnings, "unverified": site.unverified}


def _tell(checked: dict[str, Any]) -> None:
    if not checked["ok"]:
        typer.echo(f"hpcds: {checked['error']}", err=True)
        return
    unverified = f"; not verified: {', '.join(checked['unverified'])}" if checked["unverified"] else ""
    typer.echo(f"{checked['file']}: site {checked['name']!r} is whole{unverified}")
    for warning in checked["warnings"]:
        typer.echo(f"hpcds: warning: {warning}", err=True)


@app.command("detect")
def detect(json_output: JsonOption = False) -> None:
    """Say which known cluster this is: the site of a job that names none."""
    from hpc_ds.cluster.connect import detect as detect_cluster

    found = detect_cluster()
    if json_output:
        typer.echo(json.dumps({"site": found.site, "because": found.because, "cluster": found.cluster}))
    else:
        typer.echo(f"{found.site}: {found.because}")


@app.command("probe")
def probe(
    name: Annotated[str | None, typer.Option("--name", help="The site's name. Default: the cluster's.")] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Default: ~/.config/hpcds/sites/NAME.json."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the site file and write nothing.")] = False,
    json_output: JsonOption = False,
) -> None:
    """Ask the Slurm of this machine what it is, and write a site file."""
    from hpc_ds.cluster.probe import probe as probe_cluster
    from hpc_ds.script.site_file import write_site

    data = probe_cluster(name)
    if dry_run:
        typer.echo(json.dumps(data) if json_output else json.dumps(data, indent=2))
        return
    path = write_site(data, output, force=force)
    if json_output:
        typer.echo(json.dumps({"file": str(path), "site": data}))
        return
    typer.echo(f"site {data['name']!r}: {len(data['partitions'])} partitions, in {path}")
    typer.echo("add what Slurm does not know: account rule, modules, network variables, scratch (docs/sites.md)")
