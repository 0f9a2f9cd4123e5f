"""Site files as whole ones: checked together with the template that they name, and written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpc_ds.config.load import load_site, own_folder
from hpc_ds.config.model import check
from hpc_ds.config.site import SiteConfig
from hpc_ds.errors import ConfigError, SiteError
from hpc_ds.run_dir import write_atomic
from hpc_ds.script.render import check_template

if TYPE_CHECKING:
    from collections.abc import Mapping


def check_site(name: str) -> tuple[SiteConfig, list[str]]:
    """A site by name or file, its template looked at too; returns the site and warnings.

    Raises:
        SiteError: the file or the template is not usable.
    """
    site = load_site(name)
    check_template(site)
    warnings = []
    if name.endswith(".json") and Path(name).stem != site.name:
        warnings.append(f"site file {name!r}: its name is {site.name!r}, but --site finds it by that of the file")
    return site, warnings


def write_site(data: Mapping[str, Any], path: Path | None = None, *, force: bool = False) -> Path:
    """Write a site file, by default among the user's own; returns its path.

    Raises:
        SiteError: it is no site, there is such a file already, or it cannot be written.
    """
    name = str(data.get("name", ""))
    folder = own_folder("sites")
    if path is None and (folder is None or not name or "/" in name or name.startswith(".")):
        raise SiteError(f"site {name!r}: there is no place for its file; give --output and a plain --name")
    path = path or Path(str(folder)) / f"{name}.json"
    try:
        check(SiteConfig, data, str(path))
    except ConfigError as error:
        raise SiteError(str(error), file=str(path), key=error.key, value=error.value) from None
    if path.exists() and not force:
        raise SiteError(f"site file {str(path)!r}: is there already; --force writes over it", file=str(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(data, indent=2) + "\n")
    except OSError as error:
        raise SiteError(
            f"site file {str(path)!r}: cannot be written: {error.strerror}; give --output", file=str(path)
        ) from None
    return path
