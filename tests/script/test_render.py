"""Job scripts, compared whole with tests/golden/; a template can bring what it likes, and nothing unquoted.

After a change that is meant: UPDATE_GOLDEN=1 pytest tests/script, and read the difference.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from hpc_ds.config.job import JobConfig
from hpc_ds.config.load import load_site
from hpc_ds.config.model import check
from hpc_ds.config.site import SiteConfig
from hpc_ds.errors import ConfigError, SiteError
from hpc_ds.run_dir import RunDir
from hpc_ds.script.render import Raw, environment_file, quoted, render

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
RUN = RunDir(Path("/scratch/runs/gpt-20260131-120000"))
VENV = {"runtime": {"kind": "venv", "path": "/home/ada/venv"}, "workdir": "/home/ada/gpt"}


def job_of(**data: Any) -> JobConfig:
    job: JobConfig = check(JobConfig, {"script": "/home/ada/gpt/train.py", **VENV, **data}, "job.json")
    return job


def site_of(**data: Any) -> SiteConfig:
    site: SiteConfig = check(SiteConfig, {"name": "s", "description": "d", "scheduler": "slurm", **data}, "site.json")
    return site


FULL = job_of(
    name="gpt-2.xl",
    resources={
        "nodes": 16,
        "gpus_per_node": 4,
        "tasks_per_node": 4,
        "cpus_per_task": 16,
        "mem": "480G",
        "time": "1-12:00:00",
        "partition": "gpu,gpu-preempt",
        "account": "proj_g",
        "qos": "regular",
        "constraint": "gpu&hbm80g",
        "exclude": ["n[003-004]", "n017"],
        "sbatch": {"mail-type": "END,FAIL", "comment": "it's ada's", "nice": 10, "exclusive": True, "hold": None},
    },
    setup=["module load cuda/12", "export NCCL_DEBUG=WARN"],
    restart={"signal": "USR1", "lead": 300},
)
GRES = site_of(
    gpu_request="gres",
    sbatch={"licenses": "scratch", "mem": "0"},
    setup=["module purge"],
    env={"NCCL_SOCKET_IFNAME": "hsn"},
)

GOLDENS: dict[str, tuple[JobConfig, SiteConfig]] = {
    "least": (job_of(), load_site("slurm")),
    "full": (FULL, load_site("slurm")),
    "gres_and_site": (job_of(resources={"nodes": 2, "gpus_per_node": 8, "time": "30"}), GRES),
    "options_taken_back": (
        job_of(resources={"gpus_per_node": 4, "sbatch": {"requeue": False, "gpus-per-node": False, "gpus": "a100:4"}}),
        load_site("slurm"),
    ),
    "local": (job_of(setup=["ulimit -c 0"]), load_site("local")),
    "local_limited": (job_of(resources={"time": "2:00:00"}, restart={"signal": "TERM"}), load_site("local")),
}


@pytest.mark.parametrize("name", GOLDENS)
def test_a_script_is_the_golden_one(name: str) -> None:
    job, site = GOLDENS[name]
    path, text = GOLDEN / f"{name}.sbatch", render(job, site, RUN)
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def test_every_golden_script_is_made_by_a_test() -> None:
    assert sorted(path.stem for path in GOLDEN.glob("*.sbatch")) == sorted(GOLDENS)


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.sbatch")), ids=lambda path: path.stem)
def test_a_golden_script_is_bash(path: Path) -> None:
    checked = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


def options_of(text: str) -> dict[str, str | None]:
    """The #SBATCH options of a script, as Slurm reads them: up to the first command, quotes taken away."""
    options: dict[str, str | None] = {}
    for line in text.splitlines()[1:]:
        if line.startswith("#SBATCH "):
            (word,) = shlex.split(line.removeprefix("#SBATCH "))
            name, equals, value = word.removeprefix("--").partition("=")
            options[name] = value if equals else None
        elif line and not line.startswith("#"):
            break
    return options


def test_slurm_reads_every_option_of_the_full_script() -> None:
    options = options_of(render(FULL, load_site("slurm"), RUN))
    assert options == {
        "job-name": "gpt-2.xl",
        "nodes": "16",
        "ntasks-per-node": "4",
        "gpus-per-node": "4",
        "cpus-per-task": "16",
        "mem": "480G",
        "time": "1-12:00:00",
        "partition": "gpu,gpu-preempt",
        "account": "proj_g",
        "qos": "regular",
        "constraint": "gpu&hbm80g",
        "exclude": "n[003-004],n017",
        "output": f"{RUN.root}/logs/scheduler.log",
        "open-mode": "append",
        "requeue": None,
        "signal": "USR1@300",
        "mail-type": "END,FAIL",
        "comment": "it's ada's",
        "nice": "10",
        "exclusive": None,
        "hold": None,
    }


def test_the_word_of_the_job_comes_after_that_of_the_site() -> None:
    site = site_of(sbatch={"mem": "0", "licenses": "scratch", "partition": "small", "requeue": "x"})
    job = job_of(resources={"partition": "large", "sbatch": {"mem": "4G", "requeue": False}})
    options = options_of(render(job, site, RUN))
    assert (options["mem"], options["licenses"]) == ("4G", "scratch")
    assert "requeue" not in options
    assert options["partition"] == "large"


def test_a_percent_sign_in_a_path_is_no_pattern_of_slurm() -> None:
    options = options_of(render(job_of(), load_site("slurm"), RunDir(Path("/a%j/b%%"))))
    assert options["output"] == "/a%%j/b%%%%/logs/scheduler.log"


def test_a_job_that_ends_before_it_begins_has_no_script() -> None:
    with pytest.raises(ConfigError, match=r"resources.time '0:20': not longer than restart.lead 30 s"):
        render(job_of(resources={"time": "0:20"}), load_site("slurm"), RUN)


BAD_TEMPLATES = {
    "{{ nodes }}": "'nodes' is undefined",
    "{% if x.y %}{% endif %}": "'x' is undefined",
    "{{ options": "unexpected end of template",
    "{% for x in y %}": "",
    "{% include 'none.j2' %}": "template 'none.j2': no such file; add it to templates/",
}


@pytest.mark.parametrize(("text", "complaint"), BAD_TEMPLATES.items())
def test_a_bad_template_is_an_error_of_the_site(text: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "own.j2").write_text(text)
    with pytest.raises(SiteError) as caught:
        render(job_of(), site_of(template="own.j2"), RUN, templates=tmp_path)
    assert str(caught.value).startswith("site 's': template ")
    assert complaint in str(caught.value)


LINES = {
    "one\ntwo {{ nodes }}\n": 2,
    "one\n\n{{ options\n": 3,
    "{% for x in [1] %}\n{{ 1 // 0 }}\n{% endfor %}": 2,
    "one\n{{ options.items(1) }}": 2,
    "{% macro m() %}\n{{ nodes }}\n{% endmacro %}\n\n{{ m() }}": 2,
    "one\n{{ workdir | nofilter }}": 2,
    "one\n{{ workdir.real.x }}": 2,
}


@pytest.mark.parametrize(("text", "line"), LINES.items())
def test_file_and_line_of_a_mistake_are_named(text: str, line: int, tmp_path: Path) -> None:
    (tmp_path / "own").write_text(text)
    with pytest.raises(SiteError) as caught:
        render(job_of(), site_of(template="own"), RUN, templates=tmp_path)
    assert str(caught.value).startswith(f"site 's': template '{tmp_path}/own', line {line}: ")
    assert str(caught.value).endswith("; mend the template")
    assert "\n" not in str(caught.value)


def test_a_mistake_in_an_included_template_is_found_there(tmp_path: Path) -> None:
    (tmp_path / "own.j2").write_text('{% include "inner.j2" %}')
    (tmp_path / "inner.j2").write_text("one\n{{ nodes }}")
    with pytest.raises(SiteError, match=r"template '.*/inner.j2', line 2: 'nodes' is undefined; mend the template"):
        render(job_of(), site_of(template="own.j2"), RUN, templates=tmp_path)


def test_a_template_that_never_ends_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "own.j2").write_text('{% include "own.j2" %}')
    with pytest.raises(SiteError, match="mend the template"):
        render(job_of(), site_of(template="own.j2"), RUN, templates=tmp_path)


def test_a_template_that_is_no_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "own.j2").write_bytes(b"\xff\xfe")
    with pytest.raises(SiteError, match=r"template 'own.j2': .*decode.*; mend the template"):
        render(job_of(), site_of(template="own.j2"), RUN, templates=tmp_path)


def test_the_folder_of_the_job_comes_before_that_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    of_user, of_job = tmp_path / ".config" / "hpcds" / "templates", tmp_path / "of job"
    for folder in (of_user, of_job):
        folder.mkdir(parents=True)
    (of_user / "slurm.sbatch.j2").write_text("user")
    (of_user / "local.sh.j2").write_text("user, local")
    assert render(job_of(), load_site("slurm"), RUN) == "user"
    (of_job / "slurm.sbatch.j2").write_text("job")
    job = job_of(templates=str(of_job))
    assert render(job, load_site("slurm"), RUN) == "job"
    assert render(job, load_site("local"), RUN) == "user, local"
    with pytest.raises(ConfigError, match=r"templates '/nowhere': no such folder; check the path"):
        render(job_of(templates="/nowhere"), load_site("slurm"), RUN)


PARTS = """\
{% import "parts.sh.j2" as parts with context %}
#!/bin/bash
{{ parts.sbatch() -}}
{{ parts.environment() -}}
echo {{ "of my own: " ~ workdir }}
{{ parts.prepare() -}}
{{ parts.supervise() -}}
"""


def test_a_template_of_ones_own_is_made_of_the_parts(tmp_path: Path) -> None:
    (tmp_path / "own.j2").write_text(PARTS)
    text = render(FULL, site_of(template="own.j2", modules=["a b", "c"]), RUN, templates=tmp_path)
    assert options_of(text) == options_of(render(FULL, load_site("slurm"), RUN))
    lines = text.splitlines()
    assert "echo 'of my own: /home/ada/gpt'" in lines
    assert "module load 'a b' c || exit 1" in lines
    assert text.endswith(f"-m hpc_ds supervise {RUN.root}\n")


# Nothing in a template takes the quotes away: text -> what is printed of the workdir "a; b".
ATTEMPTS = {
    "{{ workdir }}": "'a; b'",
    "{{ workdir | safe }}": "'a; b'",
    "{{ workdir ~ '/c' }}": "'a; b/c'",
    "{{ [workdir, 'c'] | join(' ') }}": "'a; b c'",
    "{{ '%s' | format(workdir) }}": "'a; b'",
    "{% autoescape true %}{{ workdir }}{% endautoescape %}": "'a; b'",
    "{% set x = workdir %}{{ x }}": "'a; b'",
    "{% macro m(x) %}{{ x }}{% endmacro %}{{ m(workdir) }}": "'a; b'",
    "{% macro m(x) %}{{ caller() }}{{ x }}{% endmacro %}{% call m('c') %}{{ workdir }}{% endcall %}": "'a; b'c",
    "{% block x %}{{ workdir }}{% endblock %} {{ self.x() }}": "'a; b' 'a; b'",
    "{% macro m() %}-{% endmacro %}{{ m() ~ workdir }}": "'-a; b'",
    "{% set x %}{{ workdir }}{% endset %}{{ x }}": "''\"'\"'a; b'\"'\"''",
}


@pytest.mark.parametrize(("text", "printed"), ATTEMPTS.items())
def test_no_template_can_forget_to_quote(text: str, printed: str, tmp_path: Path) -> None:
    (tmp_path / "own.j2").write_text(text)
    assert render(job_of(workdir="a; b"), site_of(template="own.j2"), RUN, templates=tmp_path) == printed


def test_a_template_that_is_not_there_is_named() -> None:
    with pytest.raises(SiteError, match=r"site 's': template 'none.j2': no such file; add it to templates/"):
        render(job_of(), site_of(template="none.j2"), RUN)
    with pytest.raises(SiteError, match=r"template '\.\./pyproject.toml'"):
        render(job_of(), site_of(template="../pyproject.toml"), RUN)


def test_a_template_of_ones_own_comes_first_and_may_include_the_shipped_ones(tmp_path: Path) -> None:
    (tmp_path / "slurm.sbatch.j2").write_text('#!/bin/bash\necho {{ options["job-name"] }}\n{% include "body.sh.j2" %}')
    text = render(job_of(name="own"), load_site("slurm"), RUN, templates=tmp_path)
    assert text.startswith("#!/bin/bash\necho own\n. /scratch/runs/")
    assert text.endswith(f"-m hpc_ds supervise {RUN.root}\n")


def test_values_are_quoted_and_shell_is_not() -> None:
    assert quoted("a b") == "'a b'"
    assert quoted("") == "''"
    assert quoted(4) == "4"
    assert quoted(Raw("a b; c")) == "a b; c"


def test_text_of_a_value_is_no_template(tmp_path: Path) -> None:
    (tmp_path / "own.j2").write_text("{{ workdir }}")
    job = job_of(workdir="/{{ options }}/{% raw %}")
    assert render(job, site_of(template="own.j2"), RUN, templates=tmp_path) == "'/{{ options }}/{% raw %}'"


def test_variables_of_the_site_the_shell_and_the_job_in_this_order() -> None:
    site = site_of(env={"A": "site", "B": "site", "C": "site"})
    job = job_of(env={"C": "job"}, env_from=["B", "C"])
    text = environment_file(job, site, {"B": "shell", "C": "shell", "D": "shell"})
    assert text == "export A=site\nexport B=shell\nexport C=job\n"


def test_a_variable_that_the_shell_has_not_is_an_error() -> None:
    with pytest.raises(
        ConfigError, match="env_from 'MISSING': not set in this shell; set it or leave it out"
    ) as caught:
        environment_file(job_of(env_from=["A", "MISSING"]), site_of(), {"A": "1"})
    assert caught.value.exit_code == 2


def test_a_variable_that_is_empty_is_set() -> None:
    assert environment_file(job_of(env_from=["A"]), site_of(), {"A": ""}) == "export A=''\n"
