"""The ``sitecustomize`` of ranks: what it attaches, what it hands on to, and that no start of a Python breaks for its sake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpc_ds.compat.startup.sitecustomize import ATTACHED

REPOSITORY = Path(__file__).resolve().parent.parent.parent
STARTUP = REPOSITORY / "hpc_ds" / "compat" / "startup"

STATE = "accelerate.state"
TELL = """
import json, sys
import accelerate.state as state
import sitecustomize
print(json.dumps({
    "attached": getattr(state, "attached", None), "loader": type(state.__loader__).__name__, "value": state.value,
    "hooks": [type(finder).__name__ for finder in sys.meta_path].count("HpcdsHook"), "sitecustomize": sitecustomize.__file__,
    "path": sys.path,
}))
"""


@pytest.fixture
def libraries(tmp_path: Path) -> Path:
    """A folder with a small accelerate; of hpc_ds only what a test puts there."""
    folder = tmp_path / "libraries"
    (folder / "accelerate").mkdir(parents=True)
    (folder / "accelerate" / "__init__.py").write_text("")
    (folder / "accelerate" / "state.py").write_text("value = 1\n")
    return folder


def ours(folder: Path, text: str) -> None:
    """An hpc_ds whose integration is that text."""
    (folder / "hpc_ds" / "integrations").mkdir(parents=True)
    for name in ("hpc_ds", "hpc_ds/integrations"):
        (folder / name / "__init__.py").write_text("")
    (folder / "hpc_ds" / "integrations" / "accelerate.py").write_text(text)


def python(text: str, *folders: Path) -> subprocess.CompletedProcess[str]:
    """One that finds these folders first, and of the site's packages none."""
    environ = {"PYTHONPATH": os.pathsep.join(map(str, folders)), "PATH": os.environ["PATH"]}
    base = sys._base_executable  # type: ignore[attr-defined] # without the packages of this environment
    return subprocess.run(
        [base, "-s", "-c", text], env=environ, cwd=folders[-1], capture_output=True, text=True, check=False
    )


def told(done: subprocess.CompletedProcess[str]) -> dict[str, object]:
    assert done.returncode == 0, done.stderr
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


def test_ours_sees_a_module_once_it_is_loaded(libraries: Path) -> None:
    ours(libraries, "def attach(module):\n    module.attached = [module.__name__, module.value]\n")
    done = python(TELL, STARTUP, libraries)
    assert (told(done)["attached"], done.stderr) == ([STATE, 1], "")
    assert told(done)["loader"] == "SourceFileLoader"


def test_without_hpc_ds_nothing_happens(libraries: Path) -> None:
    done = python(TELL, STARTUP, libraries)
    assert (told(done)["attached"], done.stderr) == (None, "")


@pytest.mark.parametrize(
    "text", ["def attach(module):\n    raise ValueError('no such thing')\n", "raise ValueError('no such thing')"]
)
def test_an_error_of_ours_is_one_line(text: str, libraries: Path) -> None:
    ours(libraries, text)
    done = python(TELL, STARTUP, libraries)
    assert told(done)["value"] == 1
    assert done.stderr == (
        "hpc_ds: hpc_ds.integrations.accelerate: ValueError: no such thing; accelerate.state is left as it is\n"
    )


def test_it_hands_on_to_the_one_that_it_hides(libraries: Path, tmp_path: Path) -> None:
    """The site's own may be what sets up the machine; two folders of ours, as of nested runs, are one hook."""
    (libraries / "sitecustomize.py").write_text("import sys\nsys.path.append('/of/the/site')\n")
    again = tmp_path / "again"
    again.mkdir()
    (again / "sitecustomize.py").write_bytes((STARTUP / "sitecustomize.py").read_bytes())
    found = told(python(TELL, STARTUP, again, libraries))
    assert found["sitecustomize"] == str(libraries / "sitecustomize.py")
    assert found["hooks"] == 1
    path = found["path"]
    assert isinstance(path, list)
    assert (path[1:4], path[-1]) == ([str(STARTUP), str(again), str(libraries)], "/of/the/site")


def test_an_error_of_the_hidden_one_is_said_as_ever(libraries: Path) -> None:
    (libraries / "sitecustomize.py").write_text("raise ValueError('the site is broken')\n")
    alone, behind = python("", libraries), python("", STARTUP, libraries)
    assert "ValueError: the site is broken" in alone.stderr
    assert (behind.stderr, behind.returncode) == (alone.stderr, 0)


def test_it_loads_nothing(libraries: Path) -> None:
    """Each Python that a rank starts waits for it."""
    text = "import sys; print(*sorted(sys.modules))"
    without, with_it = python(text, libraries), python(text, STARTUP, libraries)
    assert set(with_it.stdout.split()) - set(without.stdout.split()) <= {"sitecustomize"}


def test_a_module_that_is_only_looked_for_is_not_attached(libraries: Path) -> None:
    ours(libraries, "def attach(module):\n    print('attached')\n")
    look = "import importlib.util; print(importlib.util.find_spec('accelerate.state').name)"
    assert python(look, STARTUP, libraries).stdout == f"{STATE}\n"
    again = "import accelerate.state, importlib; importlib.reload(accelerate.state)"
    assert python(again, STARTUP, libraries).stdout == "attached\nattached\n"


def test_the_modules_of_the_table_are_where_the_libraries_have_them() -> None:
    """A library that moves one would leave us unheard."""
    import importlib.util

    missing = [
        name for name in ATTACHED if _is_there(name.partition(".")[0]) and importlib.util.find_spec(name) is None
    ]
    assert missing == []


def _is_there(package: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(package) is not None
