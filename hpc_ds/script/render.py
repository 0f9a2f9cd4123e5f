"""From a job, a site and a run folder to the text of the job script. The only file that knows jinja2.

Every ``{{ value }}`` of a template is quoted for the shell by the environment itself (``finalize``), so no template
can forget to, and no filter takes it back. Text that is meant as shell, such as a user's setup lines, is marked ``Raw``
here; so is what a macro or block returns, in which every value was quoted already. Raw text that is joined to other text is
an ordinary value again, and quoted.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2.runtime import BlockReference, Context, Macro

from hpc_ds.config.job import lead_s, python_of, time_limit_s
from hpc_ds.config.load import own_folder
from hpc_ds.config.site_rules import said
from hpc_ds.errors import ConfigError, SiteError
from hpc_ds.launch.container import mounts
from hpc_ds.script.options import sbatch_options
from hpc_ds.shipped import shipped

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hpc_ds.config.job import JobConfig
    from hpc_ds.config.site import SiteConfig
    from hpc_ds.run_dir import RunDir


class Raw(str):
    """Text that is shell already."""

    __slots__ = ()

    def __html__(self) -> str:
        """The text itself: a template that asks for HTML's escapes gets none, which would undo the quotes."""
        return self


_FAILURES = (
    jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError, OSError,
)  # fmt: skip


class _Context(Context):
    """Knows what was quoted already: the text of macros and blocks."""

    def call(self, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: PYI063 - jinja2's own name
        """Call a macro, or anything else that a template calls."""
        said = super().call(__obj, *args, **kwargs)
        return Raw(said) if isinstance(__obj, (Macro, BlockReference)) else said


def quoted(value: object) -> Raw:
    """A value as one shell word; Raw text as it is."""
    return value if isinstance(value, Raw) else Raw(shlex.quote(str(value)))


def render(job: JobConfig, site: SiteConfig, run: RunDir, templates: Path | None = None) -> str:
    """The text of the job script. It reads templates and nothing else.

    Args:
        job: what is asked for.
        site: where; it names the template.
        run: the run folder, which need not be there yet.
        templates: a folder whose templates come before the job's, the user's own and the shipped ones.

    Raises:
        ConfigError: the job does not fit the site, or its folder of templates is not there.
        SiteError: the site's template is missing, or asks for a value that there is not; file and line are named.
    """
    return _render(site.template, _values(job, site, run), job, site, templates)


def render_function(
    job: JobConfig, site: SiteConfig, run: RunDir, command: Sequence[str], devices: str | None = None
) -> str:
    """The text of the script by which a Python function becomes a job.

    Args:
        job: what is asked for.
        site: where.
        run: the folder of the function's job.
        command: what the job script runs; on site local that is in the script's arguments.
        devices: site local: CUDA_VISIBLE_DEVICES, which submitit sets; None: it is not set.

    Raises:
        ConfigError, SiteError: see ``render``.
    """
    template = "function.sbatch.j2" if site.scheduler == "slurm" else "function.sh.j2"
    return _render(template, _values(job, site, run) | {"command": list(command), "devices": devices}, job, site)


def _render(
    template: str, values: dict[str, Any], job: JobConfig, site: SiteConfig, templates: Path | None = None
) -> str:
    environment = _environment(templates, job.templates)
    try:
        return environment.get_template(template).render(values)
    except _FAILURES as error:
        raise _as_site_error(error, site) from None


def check_template(site: SiteConfig, templates: Path | None = None) -> None:
    """Read the template of a site.

    Raises:
        SiteError: it is missing, or is no template; file and line are named.
    """
    try:
        _environment(templates).get_template(site.template)
    except _FAILURES as error:
        raise _as_site_error(error, site) from None


def _environment(templates: Path | None, of_job: str | None = None) -> jinja2.Environment:
    if of_job is not None and not Path(of_job).is_dir():
        raise ConfigError(f"templates {of_job!r}: no such folder; check the path", key="templates", value=of_job)
    folders = [templates, of_job, own_folder("templates"), shipped("templates")]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([str(folder) for folder in folders if folder is not None]),
        undefined=jinja2.StrictUndefined,
        finalize=quoted,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # noqa: S701 - this is shell, not HTML: finalize quotes it
    )
    environment.context_class = _Context
    return environment


def _as_site_error(error: Exception, site: SiteConfig) -> SiteError:
    if isinstance(error, jinja2.TemplateNotFound):
        return SiteError(f"site {site.name!r}: template {error.name!r}: no such file; add it to templates/")
    file, line = _where(error)
    at = f"{site.template!r}" if file is None else f"{file!r}, line {line}"
    words = " ".join(str(getattr(error, "message", None) or error).split()).rstrip(".")
    return SiteError(f"site {site.name!r}: template {at}: {words}; mend the template", file=file)


def _where(error: Exception) -> tuple[str | None, int]:
    """File and line of a template that an error comes from: of its syntax, or the innermost one that was running."""
    if isinstance(error, jinja2.TemplateSyntaxError):
        return error.filename, error.lineno
    found: tuple[str | None, int] = (None, 0)
    trace = error.__traceback__
    while trace is not None:
        if "__jinja_exception__" in trace.tb_frame.f_globals:  # a frame that jinja2 has put there for a template
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
    mounts(job, run)  # refuses now what could not be mounted then
    return {
        "options": sbatch_options(job, site, run),
        "modules": site.modules,
        "setup": [Raw(line) for line in (*site.setup, *job.setup)],
        "run_dir": run.root,
        "env_file": run.env,
        "workdir": job.workdir,
        "conda": job.runtime.path if job.runtime.kind == "conda" else None,
        "python": python_of(job),
        "time_limit_s": None if limit is None else time_limit_s(limit),
        "lead_s": lead_s(job),
        "signal": job.restart.signal,
        "grace_s": site.grace_s,
        "kill_wait_s": site.kill_wait_s,
    }
