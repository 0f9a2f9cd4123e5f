"""``hpcds site``: what people and programs read of the known clusters."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from hpc_ds.cli.main import app
from hpc_ds.cli.site import known_sites
from hpc_ds.config.load import site_files

if TYPE_CHECKING:
    from pathlib import Path

RUNNER = CliRunner()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def hpcds(*words: str, code: int = 0) -> str:
    done = RUNNER.invoke(app, ["site", *words])
    assert done.exit_code == code, done.output
    return done.output


def own_site(home: Path, file: str, **changes: Any) -> Path:
    path = home / ".config" / "hpcds" / "sites" / f"{file}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"name": file, "description": "of our group", "scheduler": "slurm", **changes}))
    return path


def test_every_site_is_listed_and_a_broken_one_said_to_be_so(home: Path) -> None:
    own_site(home, "mine")
    own_site(home, "broken", sbtach={})
    lines = hpcds("list").splitlines()
    assert [line.split()[0] for line in lines] == sorted(site_files())
    assert next(line for line in lines if line.startswith("mine ")).endswith("of our group  (yours)")
    assert "not usable: " in next(line for line in lines if line.startswith("broken "))
    found = {one["name"]: one for one in json.loads(hpcds("list", "--json"))}
    assert (found["mine"]["shipped"], found["frontier"]["shipped"]) == (False, True)
    assert "sbtach: unknown key" in found["broken"]["error"]
    assert "account" in found["lumi-g"]["unverified"]


def test_a_site_is_shown_with_its_sources(home: Path) -> None:
    text = hpcds("show", "frontier")
    assert "  gpus_per_node: 8  (olcf-user-docs, frontier_user_guide, 2026-07)\n" in text
    assert '"time": "2:00:00"' in text
    assert "NOT VERIFIED: lumi-userguide, a snapshot, 2024-10" in hpcds("show", "lumi-g")
    shown = json.loads(hpcds("show", "lumi-g", "--json"))
    assert (shown["name"], shown["cpus_per_node"]) == ("lumi-g", 56)
    assert "env" in shown["unverified"]
    assert "description" not in hpcds("show", str(own_site(home, "mine")))


def test_files_are_checked_with_their_templates(home: Path) -> None:
    good = own_site(home, "mine")
    bad = own_site(home, "bad", walltime="1h")
    lost = own_site(home, "lost", template="none.sbatch.j2")
    renamed = own_site(home, "other", name="this")
    assert f"{good}: site 'mine' is whole\n" in hpcds("validate", str(good), "frontier")
    assert "site 'delta' is whole; not verified: default_partition, " in hpcds("validate", "delta")
    text = hpcds("validate", str(bad), str(good), str(lost), code=2)
    assert "walltime '1h': not a time limit; use minutes" in text
    assert "template 'none.sbatch.j2': no such file" in text
    assert "site 'mine' is whole" in text
    assert "its name is 'this', but --site finds it by that of the file" in hpcds("validate", str(renamed))
    found = json.loads(hpcds("validate", str(bad), "slurm", "--json", code=2))
    assert [(one["ok"], one["name"]) for one in found] == [(False, None), (True, "slurm")]


def test_a_template_that_is_none_is_found_before_a_job_is(home: Path) -> None:
    folder = home / ".config" / "hpcds" / "templates"
    folder.mkdir(parents=True)
    (folder / "own.sbatch.j2").write_text("#!/bin/bash\n{% for x %}\n")
    text = hpcds("validate", str(own_site(home, "mine", template="own.sbatch.j2")), code=2)
    assert f"template '{folder}/own.sbatch.j2', line 2: " in text


def test_a_machine_without_slurm_cannot_be_probed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(home))
    assert json.loads(hpcds("detect", "--json")) == {
        "site": "local",
        "because": "there is no sbatch here",
        "cluster": None,
    }
    done = RUNNER.invoke(app, ["site", "probe"])
    assert "scontrol: no such program on PATH" in str(done.exception)


def test_a_shell_completes_the_names_of_sites() -> None:
    assert known_sites("al") == ["alliance-canada", "alps-clariden"]
