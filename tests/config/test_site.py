"""Site files: every shipped one is whole, a user's own come first, and what is no site is said to be none."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jinja2
import pytest

from hpc_ds.config.load import load_site, site_files
from hpc_ds.config.site import SiteConfig
from hpc_ds.config.site_table import sites_page
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


@pytest.mark.parametrize("name", [name for name in SITES if name not in {"local", "slurm"}])
def test_every_field_of_a_shipped_site_has_a_source(name: str) -> None:
    site = load_site(name)
    data = json.loads((REPOSITORY / "site_configs" / f"{name}.json").read_text(encoding="utf-8"))
    assert list(data)[:3] == ["name", "description", "scheduler"]
    fields = [
        f"{section}.{key}" if isinstance(value, dict) else section
        for section, value in data.items()
        if section not in {"name", "description", "scheduler", "sources"}
        for key in (value if isinstance(value, dict) else [""])
    ]
    assert [field for field in fields if site.source_of(field) is None] == []
    assert all(source.source for source in site.sources.values())


def test_the_page_of_the_sites_is_current() -> None:
    sites = [load_site(name) for name in SITES]
    assert (REPOSITORY / "docs" / "sites.md").read_text(encoding="utf-8") == sites_page(sites), "make docs"


def test_registry_files_and_docs_name_the_same_sites() -> None:
    page = (REPOSITORY / "docs" / "sites.md").read_text(encoding="utf-8")
    table = page.partition("## The shipped sites")[2].partition("## Adding")[0]
    assert re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE) == SITES == sorted(site_files())


def test_every_field_is_explained() -> None:
    page = (REPOSITORY / "docs" / "sites.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([a-z_]+)` \| [^|]+ \| ([^|]*) \|", page.partition("## Fields")[2], re.MULTILINE))
    assert set(SiteConfig.model_fields) <= set(rows)
    assert [name for name, words in rows.items() if not words.strip()] == []


def test_a_source_counts_for_what_is_below_its_key() -> None:
    site = load_site("delta")
    assert site.source_of("partitions.gpuA40x4.walltime") == ("partitions", site.sources["partitions"])
    assert site.source_of("description") is None
    assert site.source_of("") is None
    assert "partitions" in site.unverified
    assert "account" not in site.unverified
    assert load_site("slurm").unverified == []


def test_a_site_survives_its_run_folder(tmp_path: Path) -> None:
    for name in SITES:
        (tmp_path / "site.json").write_text(json.dumps(load_site(name).model_dump(mode="json")))
        assert load_site(str(tmp_path / "site.json")) == load_site(name)


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
    "perlmutter-x": "site 'perlmutter-x': unknown; did you mean 'perlmutter'?",
    "x": "site 'x': unknown; known: ",
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
    ({"gpu_request": "cores"}, "gpu_request 'cores': not one of the choices"),
    ({"sbtach": {}}, "sbtach: unknown key; did you mean 'sbatch'?"),
    ({"sbatch": {"mem": 0}}, "sbatch.mem 0: not text; put it in quotes"),
    ({"grace_s": 0}, "grace_s 0: out of range; it must be greater than 0"),
    ({"setup": "module load x"}, "setup 'module load x': not a list"),
    # Would end its line in the job script, and the rest of it would be run.
    ({"sbatch": {"comment": "a\ntouch b"}}, "sbatch.comment 'a\\ntouch b': has a line break"),
    ({"sbatch": {"comment\ntouch b": "a"}}, "sbatch"),
    ({"env": {"A B": "1"}}, "env: 'A B' is not a variable name"),
    ({"walltime": "1.5"}, "walltime '1.5': not a time limit"),
    ({"walltime": [{"nodes": 4, "time": "1h"}]}, "walltime[0].time '1h': not a time limit"),
    ({"walltime": [{"nodes": 4, "time": "60"}, {"nodes": 2, "time": "30"}]}, "walltime ["),
    ({"walltime": []}, "walltime []: not a list by rising number of nodes, null last; sort it"),
    ({"partitions": {"p": {"max_nodes": 0}}}, "partitions.p.max_nodes 0: out of range"),
    ({"partitions": {"p": {"maxnodes": 1}}}, "partitions.p.maxnodes: unknown key; did you mean 'max_nodes'?"),
    ({"qos": {"q": {"walltime": 60}}}, "qos.q.walltime 60: not text"),
    ({"account": {"pattern": "("}}, "account.pattern '(': not a regular expression"),
    ({"account": "m42"}, "account 'm42': not a section"),
    ({"port_range": [5, 4]}, "port_range [5, 4]: the first port is above the last; exchange them"),
    ({"port_range": [5]}, "port_range [5]: "),
    ({"port_range": [5, 70000]}, "port_range[1] 70000: out of range"),
    ({"containers": ["docker"]}, "containers[0] 'docker': not one of the choices"),
    ({"memory": 0}, "memory 0: not one of the choices"),
    ({"sources": {"scratch": {"source": "x"}}}, "sources.scratch: this file has no such field; name one that it has"),
    ({"sources": {"name": {"source": "x", "date": "last year"}}}, "sources.name.date 'last year': not a date"),
    ({"sources": {"name": {"verified": True}}}, "sources.name.source: missing"),
    ({"modules": ["a\nb"]}, "modules[0] 'a\\nb': has a line break"),
]


@pytest.mark.parametrize(("changes", "complaint"), BAD, ids=lambda value: str(value)[:50])
def test_a_bad_site_file_is_refused(changes: dict[str, object], complaint: str, tmp_path: Path) -> None:
    path = write(tmp_path / "site.json", **changes)
    with pytest.raises(SiteError) as caught:
        load_site(str(path))
    assert str(caught.value).startswith(f"{path}: {complaint}")
