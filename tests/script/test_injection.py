"""A rendered script, run by bash with a stand-in for python: what arrives is what was written, byte for byte."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from fakes import fake_program
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpc_ds.config.job import JobConfig
from hpc_ds.config.load import load_site
from hpc_ds.config.model import check
from hpc_ds.config.site import SiteConfig
from hpc_ds.run_dir import RunDir
from hpc_ds.script.render import environment_file, render

if TYPE_CHECKING:
    from pathlib import Path

# Every name here is one that a folder can have.
NAMES = {
    "space": "a b",
    "spaces around": "  a  ",
    "single quote": "it's",
    "double quote": 'say "a"',
    "both quotes": "'\"'\"",
    "dollar": "$HOME ${HOME} $$",
    "backtick": "`touch hacked`",
    "substitution": "$(touch hacked)",
    "separator": "a; touch hacked; b & c | d > hacked",
    "glob": "* ? [a-z] {a,b}",
    "comment": "#a #b",
    "history": "a!b !! !$",
    "backslash": "a\\nb \\ c\\",
    "tilde": "~",
    "dash": "-n -rf --",
    "percent": "100% %j %%",
    "template": "{{ x }} {% y %} {# z #}",
    "unicode": "\u00e9\u6f22\U0001f600 \u2028 \u00a0 \x85",
    "equals": "a=b",
    "assignment": "IFS=x",
    "end of options": "--",
}
VALUES = {
    **NAMES,
    "empty": "",
    "line break": "a\nb\n",
    "return": "a\r\nb",
    "tab": "\ta\t",
    "bell": "\a\x1b[31m",
    "del": "\x7f",
}

# Writes down what it was called with, where, and with which environment, each ended by a NUL.
STAND_IN = r"""printf '%s\0' "$@" > "$RECORD/args"
printf '%s\0' "$PWD" > "$RECORD/cwd"
env -0 > "$RECORD/env"
"""


class Bench:
    """Renders a script into hostile folders and runs it."""

    def __init__(self, root: Path) -> None:
        self.record = root / "record"
        self.record.mkdir(parents=True)
        self._root = root

    def run(self, name: str, site: str | SiteConfig, prelude: str = "", **data: Any) -> None:
        site = load_site(site) if isinstance(site, str) else site
        run = RunDir(self._root / "runs" / name)
        run.root.mkdir(parents=True)
        (self._root / "work" / name).mkdir(parents=True)
        venv = self._root / "venv" / name
        fake_program(venv / "bin", "python", STAND_IN)
        self.workdir, self.run_dir = self._root / "work" / name, run.root
        job: JobConfig = check(
            JobConfig,
            {
                "script": "train.py",
                "workdir": str(self.workdir),
                "runtime": {"kind": "venv", "path": str(venv)},
                **data,
            },
            "job.json",
        )
        run.env.write_bytes(f"{prelude}\n{environment_file(job, site, {})}".encode())
        run.script.write_bytes(render(job, site, run).encode())
        ran = subprocess.run(
            ["/bin/bash", str(run.script)],
            cwd=self._root,
            env={"PATH": os.environ["PATH"], "HOME": str(self._root), "RECORD": str(self.record)},
            capture_output=True,
            timeout=20,
            check=False,
        )
        assert (ran.returncode, ran.stdout, ran.stderr) == (0, b"", b"")
        assert not list(self._root.rglob("hacked"))

    def recorded(self, what: str) -> list[str]:
        return (self.record / what).read_bytes().decode().split("\0")[:-1]

    def environment(self) -> dict[str, str]:
        return dict(line.split("=", 1) for line in self.recorded("env"))


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path / "b")


@pytest.mark.parametrize("site", ["slurm", "local"])
@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_hostile_folders_arrive_as_they_are(name: str, site: str, bench: Bench) -> None:
    bench.run(name, site)
    assert bench.recorded("args") == ["-m", "hpc_ds", "supervise", str(bench.run_dir)]
    assert bench.recorded("cwd") == [str(bench.run_dir)], "the supervisor must not look for modules in the job's folder"


@pytest.mark.parametrize("site", ["slurm", "local"])
def test_hostile_variables_arrive_as_they_are(site: str, bench: Bench) -> None:
    variables = {f"V{index}": value for index, value in enumerate(VALUES.values())}
    bench.run("run", site, env=variables)
    found = bench.environment()
    assert {name: found.get(name) for name in variables} == variables
    assert found.get("SLURM_EXPORT_ENV") == ("ALL" if site == "slurm" else None)


@pytest.mark.parametrize("site", ["slurm", "local"])
def test_hostile_options_stay_on_their_lines(site: str, bench: Bench) -> None:
    hostile = [value for value in NAMES.values() if "\n" not in value]
    options = {f"x{chr(97 + index)}": value for index, value in enumerate(hostile)}
    bench.run(
        "run", site, resources={"partition": "$(touch hacked)", "constraint": "'; touch hacked", "sbatch": options}
    )
    assert bench.recorded("args")[-1] == str(bench.run_dir)


def test_setup_lines_are_run_as_shell_before_the_run(bench: Bench) -> None:
    lines = ['export SEEN="$PWD and $V0"', "f() {", "  export F=1", "}", "f", "export MORE='a\nb'"]
    bench.run("run", "slurm", env={"V0": "first"}, setup=lines)
    found = bench.environment()
    assert (found["SEEN"], found["F"], found["MORE"]) == (f"{bench.workdir} and first", "1", "a\nb")


LINES = {name: value for name, value in NAMES.items() if value.isprintable() or name == "unicode"}


def hostile_site(**data: Any) -> SiteConfig:
    site: SiteConfig = check(SiteConfig, {"name": "s", "description": "d", "scheduler": "slurm", **data}, "site.json")
    return site


def test_hostile_variables_of_a_site_arrive_as_they_are(bench: Bench) -> None:
    variables = {f"V{index}": value for index, value in enumerate(LINES.values())}
    site = hostile_site(env=variables, interfaces=["$(touch hacked)", "b c"])
    bench.run("run", site, env={"V0": "the job's"})
    found = bench.environment()
    assert {name: found.get(name) for name in variables} == {**variables, "V0": "the job's"}
    assert found["NCCL_SOCKET_IFNAME"] == "$(touch hacked),b c"


def test_hostile_modules_are_loaded_as_they_are(bench: Bench) -> None:
    """``module`` is a function of the shell, here one that writes down what it was asked for."""
    bench.run(
        "run",
        hostile_site(modules=[value for value in LINES.values() if value], setup=["export LOADED"]),
        env={"BASH_ENV": ""},
        prelude='module() { printf "%s\\0" "$@" > "$RECORD/modules"; }',
    )
    assert bench.recorded("modules") == ["load", *LINES.values()]


def test_a_module_that_cannot_be_loaded_ends_the_job(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.root.mkdir()
    job: JobConfig = check(JobConfig, {"command": ["true"], "workdir": str(tmp_path)}, "job.json")
    run.env.write_text('module() { echo "no such module" >&2; return 3; }\n')
    run.script.write_text(render(job, hostile_site(modules=["cuda"]), run))
    ran = subprocess.run(["bash", str(run.script)], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (1, "no such module\n")


def test_hostile_options_of_a_site_stay_on_their_lines(bench: Bench) -> None:
    options = {f"x{chr(97 + index)}": value for index, value in enumerate(LINES.values())}
    places = {"constraint": "'; touch hacked", "account": {"form": "$(touch hacked)"}}
    bench.run("run", hostile_site(sbatch=options, notes=list(LINES.values()), **places))
    assert bench.recorded("args")[-1] == str(bench.run_dir)


def test_a_template_of_ones_own_quotes_what_it_prints(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "own.j2").write_text(
        '{% import "parts.sh.j2" as parts with context %}\n#!/bin/bash\n{{ parts.sbatch() -}}\n'
        "{{ parts.environment() -}}\n"
        'printf "%s\\0" {% for value in options.values() if value %}{{ value }} {% endfor %}> "$RECORD/options"\n'
        "{{ parts.prepare() -}}\n{{ parts.supervise() -}}\n"
    )
    hostile = {f"x{chr(97 + index)}": value for index, value in enumerate(LINES.values()) if value}
    bench.run(
        "a b; touch hacked", hostile_site(template="own.j2"), templates=str(tmp_path), resources={"sbatch": hostile}
    )
    assert bench.recorded("options")[-len(hostile) :] == list(hostile.values())
    assert bench.recorded("args")[-1] == str(bench.run_dir)


def test_a_workdir_that_is_gone_ends_the_job_before_it_starts(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.root.mkdir()
    job: JobConfig = check(JobConfig, {"command": ["true"], "workdir": str(tmp_path / "gone")}, "job.json")
    run.env.write_text("")
    run.script.write_text(render(job, load_site("local"), run))
    ran = subprocess.run(["bash", str(run.script)], capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert "gone" in ran.stderr


TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
VARIABLES = st.dictionaries(st.from_regex(r"V_[A-Za-z0-9_]{1,8}", fullmatch=True), TEXT, max_size=5)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(VARIABLES)
def test_any_variable_survives_bash(variables: dict[str, str]) -> None:
    job: JobConfig = check(JobConfig, {"command": ["true"], "env": variables}, "job.json")
    text = environment_file(job, load_site("local"), {}) + "env -0\n"
    ran = subprocess.run(
        ["bash"], input=text.encode(), capture_output=True, env={"PATH": os.environ["PATH"]}, check=True
    )
    found = dict(line.split("=", 1) for line in ran.stdout.decode().split("\0")[:-1])
    assert {name: found.get(name) for name in variables} == variables
