"""Where the files that travel with hpc_ds are: templates and site files.

In a checkout (and an editable install) they stand at its top level, beside the package; in a wheel they are inside it.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def shipped(folder: str) -> Path:
    """The folder ``templates`` or ``site_configs`` that belongs to this copy of hpc_ds."""
    inside = _PACKAGE / "_shipped" / folder
    return inside if inside.is_dir() else _PACKAGE.parent / folder
