"""Runs when a Python of a rank starts: our integrations get to see modules of other libraries once these are loaded.

It stands before all that a rank runs. So it loads nothing, hands on to the sitecustomize that would have run without it, and
does nothing where hpc_ds is not installed. ``hpc_ds.compat.activate`` puts the same hook into a process that runs already.
"""

import sys

TYPE_CHECKING = False  # that of typing would have to be imported, as would the annotations of __future__
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

ATTACHED = {
    "accelerate.state": "hpc_ds.integrations.accelerate",
    "transformers.trainer_utils": "hpc_ds.integrations.transformers",
    "transformers.trainer": "hpc_ds.integrations.transformers",
}
"""A module of another library -> ours, whose ``attach(module)`` is called when that one has been loaded."""


class HpcdsHook:
    """Finds the modules of the table as the finders behind it do, and sees them loaded."""

    def find_spec(
        self, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        """What another finder finds; None for a module that is not in the table."""
        if name not in ATTACHED:
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = None if find is None else find(name, path, target)
            if spec is not None:
                _watch(spec)
                return spec
        return None


def install() -> None:
    """Put the hook in front, once; what is loaded already is attached at once."""
    if any(type(finder).__name__ == HpcdsHook.__name__ for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, HpcdsHook())
    for name in ATTACHED:
        if name in sys.modules:
            _attach(sys.modules[name])


def _watch(spec: "ModuleSpec") -> None:
    """Let the loader of a module call us after it, this once."""
    loader, run = spec.loader, getattr(spec.loader, "exec_module", None)

    def run_and_attach(module: "ModuleType") -> None:
        vars(loader).pop("exec_module", None)
        run(module)  # type: ignore[misc]
        if module.__name__ == spec.name:  # a loader may be that of others too
            _attach(module)

    if run is not None and hasattr(loader, "__dict__"):
        loader.exec_module = run_and_attach  # type: ignore[union-attr,method-assign]


def _attach(module: "ModuleType") -> None:
    home = ATTACHED[module.__name__]
    try:
        __import__(home)
        sys.modules[home].attach(module)
    except Exception as error:  # noqa: BLE001 - the script is not to end for our sake
        if getattr(error, "name", None) not in {"hpc_ds", "hpc_ds.integrations", home}:
            sys.stderr.write(f"hpc_ds: {home}: {type(error).__name__}: {error}; {module.__name__} is left as it is\n")


def _hand_on() -> None:
    """Run the sitecustomize that this one hides, if there is one. Its errors are its own."""
    folder, ours = __file__.rpartition("/")[0], sys.modules[__name__]
    if folder not in sys.path:
        return
    place = sys.path.index(folder)
    del sys.path[place], sys.modules[__name__]
    try:
        import sitecustomize  # type: ignore[import-not-found] # noqa: F401 - the next of this name
    except ModuleNotFoundError as error:
        if error.name != __name__:
            raise
        sys.modules[__name__] = ours
    finally:
        sys.path.insert(place, folder)


if __name__ == "sitecustomize":
    install()
    _hand_on()
