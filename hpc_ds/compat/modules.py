"""The modules of the package ``deepspeed``, made from the tables of ``names.py`` when they are first asked for."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from typing import TYPE_CHECKING

from hpc_ds.compat.names import NAMES, VERSION

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of the table, and says of others that they are not there."""

    def find_spec(
        self, fullname: str, _path: Sequence[str] | None, _target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname in NAMES:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, _spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        furnish(module.__name__)


def furnish(name: str) -> None:
    """Let a module hand out the names of its table, each when it is first asked for."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    module = sys.modules[name]

    def get(attribute: str) -> object:
        home = NAMES[name].get(attribute)
        if home is None and f"{name}.{attribute}" in NAMES:
            return importlib.import_module(f"{name}.{attribute}")
        if home is None:
            raise AttributeError(f"{name}.{attribute}: hpc_ds has no such name")
        where, _, what = home.partition(":")
        value = importlib.import_module(where)
        found = getattr(value, what) if what else value
        setattr(module, attribute, found)
        return found

    module.__getattr__ = get  # type: ignore[method-assign]
    if name == "deepspeed":
        module.__version__ = VERSION  # type: ignore[attr-defined]
