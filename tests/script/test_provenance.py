"""Where a run comes from, and running it again: with real git checkouts."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from fakes import fake_program

from hpc_ds.config.load import build_job, load_resolved, load_site
from hpc_ds.config.sources import sources_of
from hpc_ds.config.sweep import jobs_of, read_points
from hpc_ds.errors import ConfigError
from hpc_ds.run_dir import read_object
from hpc_ds.script import provenance
from hpc_ds.script.provenance import code_in
from hpc_ds.script.rerun import again
from hpc_ds.script.submit import submit
from hpc_ds.script.sweep import Sweep, submit_sweep

if TYPE_CHECKING:
    from hpc_ds.config.job import JobConfig
    from hpc_ds.run_dir import RunDir

SLURM = load_site("slurm")


def git(folder: Path, *words: str) -> str:
    identity = ("-c", "user.name=Ada", "-c", "user.email=ada@example.org", "-c", "init.defaultBranch=main")
    done = subprocess.run(["git", *identity, *words], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git checkout with one commit: a script in a folder, a link, and a name that wants quotes."""
    fake_program(tmp_path / "bin", "sbatch", '[ "$1" = --test-only ] && exit 0; echo 44')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    top = tmp_path / "my code"
    (top / "src").mkdir(parents=True)
    (top / "src" / "train.py").write_text("print(1)\n")
    (top / "src" / "ünï'code.txt").write_text("x\n")
    (top / "link").symlink_to("src/train.py")
    git(top, "init", "-q")
    git(top, "add", "--all")
    git(top, "commit", "-qm", "first")
    return top


def job_of(top: Path, **data: Any) -> JobConfig:
    return build_job({"name": "gpt", "script": "train.py", **data}, file="job.json", base=top / "src")


def submitted(top: Path, **data: Any) -> RunDir:
    return submit(job_of(top, **data), SLURM, top.parent / "runs").run


def test_the_code_of_a_run_is_its_commit_its_changes_and_the_names_of_new_files(checkout: Path) -> None:
    (checkout / "src" / "train.py").write_text("print(2)\n")
    (checkout / "new.py").write_text("SECRET = 1\n")
    run = submitted(checkout)
    told = read_object(run.provenance)
    assert (told["git_root"], told["git_commit"]) == (str(checkout), git(checkout, "rev-parse", "HEAD"))
    assert (told["git_untracked"], told["git_changed"], told["git_diff_cut"]) == (["new.py"], True, False)
    diff = (run.root / "code.diff").read_text()
    assert "-print(1)\n+print(2)\n" in diff
    assert "SECRET" not in diff
    assert "pydantic" in told["versions"]
    assert told["snapshot"] is None


def test_what_is_long_is_cut(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "LONGEST_DIFF", 50)
    monkeypatch.setattr(provenance, "MOST_UNTRACKED", 2)
    (checkout / "src" / "train.py").write_text("print(2)\n" * 100)
    for name in "abc":
        (checkout / name).touch()
    code = code_in(str(checkout))
    assert (len(code.diff), code.cut, code.untracked) == (50, True, ["a", "b"])


@pytest.mark.parametrize("program", ["exit 1", "echo; exit 0", "printf '\\377'"])
def test_a_git_that_does_not_answer_is_no_error(program: str, checkout: Path) -> None:
    fake_program(checkout.parent / "bin", "git", program)
    assert read_object(submitted(checkout).provenance)["git_commit"] is None


def test_a_checkout_without_a_commit_has_names_only(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "a").touch()
    code = code_in(str(tmp_path))
    assert (code.commit, code.diff, code.untracked) == (None, "", ["a"])


def test_a_snapshot_is_what_git_tracks_as_it_is_now_and_the_run_runs_from_it(checkout: Path) -> None:
    (checkout / "src" / "train.py").write_text("print(2)\n")
    (checkout / "new.py").touch()
    git(checkout, "rm", "-q", "--cached", "link")
    run = submitted(checkout, snapshot=True)
    copied = sorted(str(path.relative_to(run.code)) for path in run.code.rglob("*") if path.is_file())
    assert copied == ["src/train.py", "src/ünï'code.txt"]
    job = load_resolved(run.config)
    assert (job.workdir, job.script) == (str(run.code / "src"), str(run.code / "src" / "train.py"))
    (checkout / "src" / "train.py").write_text("print(3)\n")
    assert (run.code / "src" / "train.py").read_text() == "print(2)\n"
    told = read_object(run.provenance)
    assert told["snapshot"] == {"of": str(checkout), "folder": str(run.code), "files": 2, "bytes": 11}
    assert f"cd '{run.code}/src'" in run.script.read_text() or f"cd {run.code}/src" in run.script.read_text()


def test_links_stay_links(checkout: Path) -> None:
    run = submitted(checkout, snapshot=True)
    assert (run.code / "link").readlink() == Path("src/train.py")


def test_what_cannot_be_snapped_is_refused_and_leaves_nothing(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(checkout, "rm", "-q", "--cached", "src/train.py")
    with pytest.raises(ConfigError, match="is not tracked by git; `git add` it"):
        submitted(checkout, snapshot=True)
    git(checkout, "add", "src/train.py")
    monkeypatch.setattr(provenance, "LARGEST_SNAPSHOT", 5)
    with pytest.raises(ConfigError, match="snapshot: the tracked files of"):
        submitted(checkout, snapshot=True)
    (checkout.parent / "train.py").touch()
    bare = build_job({"script": "train.py", "snapshot": True}, file="job.json", base=checkout.parent)
    with pytest.raises(ConfigError, match="is in no git checkout with tracked files"):
        submit(bare, SLURM, checkout.parent / "runs")
    assert list((checkout.parent / "runs").iterdir()) == []


def test_the_runs_of_a_sweep_share_a_snapshot(checkout: Path) -> None:
    base, points = job_of(checkout, snapshot=True), read_points(["args.--lr=1,2"])
    sweep = submit_sweep(
        Sweep(base, points, jobs_of(base, points, "job.json"), None), SLURM, checkout.parent / "runs"
    ).sweep
    for run in sweep.runs():
        assert load_resolved(run.config).script == str(sweep.root / "code" / "src" / "train.py")
        assert read_object(run.provenance)["git_commit"] is not None
        assert not run.code.exists()


def test_a_run_is_run_again_with_its_own_code_or_what_differs_is_said(checkout: Path) -> None:
    plain, kept = submitted(checkout, args=["--x"]), submitted(checkout, snapshot=True)
    job, site, differences = again(plain)
    assert (job, site, differences) == (load_resolved(plain.config), SLURM, [])
    (checkout / "src" / "train.py").write_text("print(2)\n")
    assert "the code has other changes than then" in again(plain)[2][0]
    git(checkout, "commit", "-qam", "second")
    assert "the code was at commit" in again(plain)[2][0]
    job, site, differences = again(kept, ["steps=7"])
    assert (differences, job.steps) == ([], 7)
    third = submit(job, site, checkout.parent / "runs").run
    assert (third.code / "src" / "train.py").read_text() == "print(1)\n"
    assert load_resolved(third.config).script == str(third.code / "src" / "train.py")
    first, now = read_object(kept.provenance), read_object(third.provenance)
    assert (now["git_commit"], now["snapshot"]["again"]) == (first["git_commit"], str(kept.root))


def test_a_run_is_not_run_again_on_top_of_its_checkpoints(checkout: Path) -> None:
    run = submitted(checkout, checkpoint={"dir": "kept"})
    with pytest.raises(ConfigError, match=r"checkpoint.dir '.*kept': holds the checkpoints of the first run"):
        again(run)
    assert again(run, ["checkpoint.dir=/other"])[0].checkpoint.dir == "/other"


def test_each_value_has_its_source(checkout: Path) -> None:
    data = {"script": "train.py", "resources": {"nodes": 2}, "env": {"A": "1"}, "steps": 3}
    options, overrides = ["resources.time=30", "steps=4"], ["resources.nodes=4", "env.B=2"]
    job = build_job(data, [*options, *overrides], file="job.json", base=checkout / "src")
    found = sources_of(job, data, "job.json", options, overrides)
    assert {key: found[key] for key in ("script", "resources.nodes", "resources.time", "env", "steps", "name")} == {
        "script": "job.json",
        "resources.nodes": "--set",
        "resources.time": "option",
        "env": "--set",
        "steps": "option",
        "name": "default",
    }
    assert json.dumps(found)
