"""The modules of the package ``deepspeed``, made from the tables when they are first asked for.

Three ways lead to a name, and each that leads nowhere ends with the one sentence that says why (``lacking.py``):

| written                       | Python asks                                  | what is missing becomes                          |
|-------------------------------|----------------------------------------------|--------------------------------------------------|
| ``deepspeed.X``               | the module's ``__getattr__``                 | AttributeError, so ``hasattr`` says False        |
| ``import deepspeed.X``        | the finder                                   | ImportError                                      |
| ``from deepspeed import X``   | ``__getattr__``, and then, since the module  | ImportError; not ModuleNotFoundError, which      |
|                               | is a package, the finder for ``deepspeed.X`` | Python would replace by a sentence of its own    |

``importlib.util.find_spec("deepspeed.X")`` only looks, so it gets None (docs/decisions/019).

The top package itself is found by the path alone: without ``path/`` on it nothing here is ever loaded, and with it every
name below ``deepspeed`` is found here or nowhere, so that a real DeepSpeed further down the path is never mixed in.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from typing import TYPE_CHECKING

from hpc_ds.compat.lacking import reason
from hpc_ds.compat.names import GIT_BRANCH, GIT_HASH, NAMES, VERSION

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import CodeType, ModuleType

TOP = "deepspeed"
_TOLD = {"__version__": VERSION, "__git_hash__": GIT_HASH, "__git_branch__": GIT_BRANCH}
_PARTS = [f"__version_{part}__" for part in ("major", "minor", "patch")]


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of the table, and says of others why they are not there."""

    def find_spec(
        self, fullname: str, _path: Sequence[str] | None, _target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not fullname.startswith(f"{TOP}."):
            return None
        if fullname in NAMES:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        if fullname.endswith(".__main__") and "main" in NAMES.get(fullname.rpartition(".")[0], ()):
            return importlib.machinery.ModuleSpec(fullname, self)
        if _is_import():
            raise ImportError(reason(fullname), name=fullname)
        return None

    def create_module(self, _spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        furnish(module.__name__)

    def get_code(self, fullname: str) -> CodeType:
        """For ``python -m deepspeed.launcher.runner``: what calls the ``main`` of the module."""
        return compile(
            f"import sys\nfrom {fullname.rpartition('.')[0]} import main\nsys.exit(main())", fullname, "exec"
        )


def _is_import() -> bool:
    """Whether a finder was asked by an import, not by ``importlib.util.find_spec``, which only looks.

    Both ask through one function of importlib's, so its caller tells. Where that has another name some day, what is missing
    is still an ImportError, with Python's own words.
    """
    asks = sys._getframe(2).f_back  # noqa: SLF001 - behind this function, find_spec, and importlib's _find_spec
    return asks is not None and asks.f_code.co_name == "_find_and_load_unlocked"


def furnish(name: str) -> None:
    """Let a module hand out the names of its table and its submodules, each when it is first asked for."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    module = sys.modules[name]
    table = NAMES[name]

    def __getattr__(attribute: str) -> object:  # noqa: N807 - what PEP 562 calls it
        dotted = f"{name}.{attribute}"
        if attribute in table:
            value = _fetch(table[attribute])
        elif dotted in NAMES:
            value = importlib.import_module(dotted)
        else:
            said = f"module {name!r} has no attribute {attribute!r}" if attribute.startswith("__") else reason(dotted)
            raise AttributeError(said, name=attribute, obj=module)
        setattr(module, attribute, value)
        return value

    below = [other.rpartition(".")[2] for other in NAMES if other.rpartition(".")[0] == name]
    shown = sorted({*table, *below})
    vars(module).update(__getattr__=__getattr__, __all__=sorted(table), __dir__=lambda: sorted({*shown, *vars(module)}))
    for attribute in table:
        if f"{name}.{attribute}" in NAMES:
            # A name that is a module's too, as utils.z3_leaf_module: loading the module puts it in this place, so now and not
            # later, as the real package does.
            importlib.import_module(f"{name}.{attribute}")
            vars(module).pop(attribute)
    if name == TOP:
        numbers = map(int, VERSION.partition("+")[0].split("."))
        vars(module).update(_TOLD, **dict(zip(_PARTS, numbers, strict=True)))


def _fetch(home: str) -> object:
    """What a home of the table, "module:attribute" or "module", names."""
    where, _, what = home.partition(":")
    value: object = importlib.import_module(where)
    return getattr(value, what) if what else value
