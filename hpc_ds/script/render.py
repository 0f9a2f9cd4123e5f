"""From a job, a site and a run folder to the text of the job script. The only file that knows jinja2.

Every ``{{ value }}`` of a template is quoted for the shell by the environment itself (``finalize``), so no template
can forget to; text that is meant as shell, such as a user's setup lines, is marked ``Raw`` here.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

import jinja2

from hpc_ds.config.job import lead_s, python_of, time_limit_s
from hpc_ds.config.load import own_folder
from hpc_ds.config.site_rules import said
from hpc_ds.errors import ConfigError, SiteError
from hpc_ds.script.options import sbatch_options
from hpc_ds.shipped import shipped

if TYPE_CHECKING:
    from pathlib import Path

    from hpc_ds.config.job import JobConfig
    from hpc_ds.config.site import SiteConfig
    from hpc_ds.run_dir import RunDir


class Raw(str):
    """Text that is shell already."""

    __slots__ = ()


def quoted(value: object) -> str:
    """A value as one shell word; Raw text as it is."""
    return value if isinstance(value, Raw) else shlex.quote(str(value))


def render(job: JobConfig, site: SiteConfig, run: RunDir, templates: Path | None = None) -> str:
    """The text of the job script. It reads templates and nothing else.

    Args:
        job: what is asked for.
        site: where; it names the template.
        run: the run folder, which need not be there yet.
        templates: a folder whose templates come before the user's own and the shipped ones.

    Raises:
        SiteError: the site's template is missing, or asks for a value that there is not; file and line are named.
    """
    environment = _environment(templates)
    try:
        return environment.get_template(site.template).render(_values(job, site, run))
    except jinja2.TemplateError as error:
        raise _as_site_error(error, site) from None


def check_template(site: SiteConfig, templates: Path | None = None) -> None:
    """Read the template of a site.

    Raises:
        SiteError: it is missing, or is no template; file and line are named.
    """
    try:
        _environment(templates).get_template(site.template)
    except jinja2.TemplateError as error:
        raise _as_site_error(error, site) from None


def _environment(templates: Path | None) -> jinja2.Environment:
    folders = [templates, own_folder("templates"), shipped("templates")]
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader([str(folder) for folder in folders if folder is not None]),
        undefined=jinja2.StrictUndefined,
        finalize=quoted,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # noqa: S701 - this is shell, not HTML: finalize quotes it
    )


def _as_site_error(error: jinja2.TemplateError, site: SiteConfig) -> SiteError:
    if isinstance(error, jinja2.TemplateNotFound):
        return SiteError(f"site {site.name!r}: template {error.name!r}: no such file; add it to templates/")
    file, line = _where(error)
    at = f"{site.template!r}" if file is None else f"{file!r}, line {line}"
    return SiteError(f"site {site.name!r}: template {at}: {error.message}; mend the template", file=file)


def _where(error: jinja2.TemplateError) -> tuple[str | None, int]:
    """File and line of a template that an error comes from: of its syntax, or the innermost one that was running."""
    if isinstance(error, jinja2.TemplateSyntaxError):
        return error.filename, error.lineno
    found: tuple[str | None, int] = (None, 0)
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename.endswith(".j2"):
            found = (trace.tb_frame.f_code.co_filename, trace.tb_lineno)
        trace = trace.tb_next
    return found


def environment_file(job: JobConfig, site: SiteConfig, environ: dict[str, str]) -> str:
    """The text of ``env.sh``: the site's variables, the job's, and those taken from the submitting shell.

    Raises:
        ConfigError: a variable of ``env_from`` is not set.
    """
    missing = [name for name in job.env_from if name not in environ]
    if missing:
        raise ConfigError(f"env_from {missing[0]!r}: not set in this shell; set it or leave it out", key="env_from")
    _, interfaces = said(job, site, "interfaces")
    network = {"NCCL_SOCKET_IFNAME": ",".join(interfaces)} if isinstance(interfaces, list) else {}
    variables = {**network, **site.env, **{name: environ[name] for name in job.env_from}, **job.env}
    for name, value in variables.items():
        if not value.isascii() and value.encode(errors="ignore").decode() != value:
            raise ConfigError(
                f"env {name}: its value is not UTF-8 text; set it in the script instead", key=f"env.{name}"
            )
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())


def _values(job: JobConfig, site: SiteConfig, run: RunDir) -> dict[str, Any]:
    limit = job.resources.time
    return {
        "options": sbatch_options(job, site, run),
        "modules": site.modules,
        "setup": [Raw(line) for line in (*site.setup, *job.setup)],
        "run_dir": run.root,
        "env_file": run.env,
        "workdir": job.workdir,
        "python": python_of(job),
        "time_limit_s": None if limit is None else time_limit_s(limit),
        "lead_s": lead_s(job),
        "signal": job.restart.signal,
        "grace_s": site.grace_s,
        "kill_wait_s": site.kill_wait_s,
    }
