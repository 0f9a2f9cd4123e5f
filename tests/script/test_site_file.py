"""Site files that we write: whole, at their place, and over nothing."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from hpc_ds.config.load import load_site
from hpc_ds.errors import SiteError
from hpc_ds.script.site_file import write_site

if TYPE_CHECKING:
    from pathlib import Path

SITE = {"name": "mine", "description": "d", "scheduler": "slurm"}


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))


def test_a_site_is_written_where_it_is_found(tmp_path: Path) -> None:
    assert write_site(SITE) == tmp_path / ".config" / "hpcds" / "sites" / "mine.json"
    assert load_site("mine").description == "d"
    assert write_site(SITE, tmp_path / "x" / "y.json").read_text() == json.dumps(SITE, indent=2) + "\n"


def test_nothing_is_written_over_unasked() -> None:
    path = write_site(SITE)
    with pytest.raises(SiteError, match="is there already; --force writes over it"):
        write_site({**SITE, "description": "new"})
    write_site({**SITE, "description": "new"}, force=True)
    assert json.loads(path.read_text())["description"] == "new"


@pytest.mark.parametrize("name", ["", "a/b", "../a", ".hidden"])
def test_a_name_that_is_no_file_needs_one(name: str, tmp_path: Path) -> None:
    with pytest.raises(SiteError, match="there is no place for its file; give --output and a plain --name"):
        write_site({**SITE, "name": name})
    assert not (tmp_path / ".config").exists()


def test_what_is_no_site_and_where_nothing_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(SiteError, match="scheduler 'pbs': not one of the choices"):
        write_site({**SITE, "scheduler": "pbs"})
    (tmp_path / "file").write_text("")
    with pytest.raises(SiteError, match=r"cannot be written: .*; give --output"):
        write_site(SITE, tmp_path / "file" / "site.json")
