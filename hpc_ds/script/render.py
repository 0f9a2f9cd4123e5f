"""From a job, a site and a run folder to the text of the job script. The only file that knows jinja2.

Every ``{{ value }}`` of a template is quoted for the shell by the environment itself (``finalize``), so no template
can forget to; text that is meant as shell, such as a user's setup lines, is marked ``Raw`` here.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

import jinja2

from hpc_ds.config.job import lead_s, python_of, time_limit_s
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
    """The text of the job script. Pure: it reads templates and nothing else.

    Raises:
        SiteError: the site's template is missing, or asks for a value that there is not.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([str(folder) for folder in (templates, shipped("templates")) if folder]),
        undefined=jinja2.StrictUndefined,
        finalize=quoted,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # noqa: S701 - this is shell, not HTML: finalize quotes it
    )
    try:
        return environment.get_template(site.template).render(_values(job, site, run))
    except jinja2.TemplateNotFound as error:
        raise SiteError(f"site {site.name!r}: template {error.name!r}: no such file; add it to templates/") from None
    except jinja2.TemplateError as error:
        raise SiteError(f"site {site.name!r}: template {site.template!r}: {error}; mend the template") from None


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
