"""Site files: every shipped one is whole, a user's own come first, and what is no site is said to be none."""

from __future__ import annotations

import json
from pathlib import Path

import jinja2
import pytest

from hpc_ds.config.load import load_site, site_files
from hpc_ds.errors import SiteError
from hpc_ds.shipped import shipped

REPOSITORY = Path(__file__).resolve().parent.parent.parent
SITES = sorted(path.stem for path in (REPOSITORY / "site_configs").glob("*.json"))
LOCAL = {"name": "mine", "description": "d", "scheduler": "local", "template": "local.sh.j2"}


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))


def write(path: Path, **changes: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {key: value for key, value in {**LOCAL, **changes}.items() if value != "nothing"}
    path.write_text(json.dumps(data))
    return path


def test_the_known_sites_are_the_files() -> None:
    assert shipped("site_configs") == REPOSITORY / "site_configs"
    assert sorted(site_files()) == SITES
    assert {"local", "slurm"} <= set(SITES)


@pytest.mark.parametrize("name", SITES)
def test_a_shipped_site_is_whole(name: str) -> None:
    site = load_site(name)
    assert site.name == name
    assert site.description
    assert site.scheduler == ("local" if name == "local" else "slurm")
    source = (shipped("templates") / site.template).read_text(encoding="utf-8")
    jinja2.Environment(autoescape=True).parse(source)


def test_a_site_of_the_user_comes_first(tmp_path: Path) -> None:
    write(tmp_path / ".config" / "hpcds" / "sites" / "slurm.json", description="ours")
    write(tmp_path / ".config" / "hpcds" / "sites" / "new.json")
    assert load_site("slurm").description == "ours"
    assert load_site("new").name == "mine"
    assert set(site_files()) == {*SITES, "new"}


def test_without_a_home_the_shipped_sites_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_uid: int) -> None:
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.delenv("HOME")
    assert load_site("slurm").name == "slurm"


def test_a_site_is_taken_from_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a b" / "site.json", grace_s=1, kill_wait_s=0.5)
    monkeypatch.chdir(tmp_path / "a b")
    for name in ("site.json", "./site.json", str(tmp_path / "a b" / "site.json")):
        assert (load_site(name).grace_s, load_site(name).kill_wait_s) == (1, 0.5)


UNKNOWN = {
    "slrum": "site 'slrum': unknown; did you mean 'slurm'?",
    "perlmutter-x": "site 'perlmutter-x': unknown; known: ",
    "": "site '': unknown; known: ",
    "auto": "site 'auto': unknown; known: ",
    "../slurm": "site file '../slurm': no such file; check the path",
    "none.json": "site file 'none.json': no such file",
}


@pytest.mark.parametrize(("name", "complaint"), UNKNOWN.items())
def test_an_unknown_site_is_refused_and_the_known_ones_named(name: str, complaint: str) -> None:
    with pytest.raises(SiteError) as caught:
        load_site(name)
    assert str(caught.value).startswith(complaint)
    assert caught.value.exit_code == 2


BAD: list[tuple[dict[str, object], str]] = [
    ({"name": "nothing"}, "name: missing; it has no default"),
    ({"scheduler": "pbs"}, "scheduler 'pbs': not one of the choices; use 'slurm' or 'local'"),
    ({"gpu_request": "gpus"}, "gpu_request 'gpus': not one of the choices"),
    ({"sbtach": {}}, "sbtach: unknown key; did you mean 'sbatch'?"),
    ({"sbatch": {"mem": 0}}, "sbatch.mem 0: not text; put it in quotes"),
    ({"grace_s": 0}, "grace_s 0: out of range; it must be greater than 0"),
    ({"setup": "module load x"}, "setup 'module load x': not a list"),
    # Would end its line in the job script, and the rest of it would be run.
    ({"sbatch": {"comment": "a\ntouch b"}}, "sbatch.comment 'a\\ntouch b': has a line break"),
    ({"sbatch": {"comment\ntouch b": "a"}}, "sbatch"),
    ({"env": {"A B": "1"}}, "env: 'A B' is not a variable name"),
]


@pytest.mark.parametrize(("changes", "complaint"), BAD, ids=lambda value: str(value)[:50])
def test_a_bad_site_file_is_refused(changes: dict[str, object], complaint: str, tmp_path: Path) -> None:
    path = write(tmp_path / "site.json", **changes)
    with pytest.raises(SiteError) as caught:
        load_site(str(path))
    assert str(caught.value).startswith(f"{path}: {complaint}")
