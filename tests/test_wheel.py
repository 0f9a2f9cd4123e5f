"""The wheel, installed where no checkout is: templates and site files come with it, and jobs can be submitted."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.local

REPOSITORY = Path(__file__).resolve().parent.parent
SHIPPED = {
    f"{folder}/{path.name}" for folder in ("templates", "site_configs") for path in (REPOSITORY / folder).iterdir()
}


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={"PATH": os.environ["PATH"], "HOME": str(cwd), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # Without hatchling at hand it is fetched into an environment of the build's own.
    isolation = ["--no-isolation"] if importlib.util.find_spec("hatchling") else []
    run(sys.executable, "-m", "build", "--wheel", *isolation, "--outdir", folder, REPOSITORY, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """The folder of an environment that has the wheel, and this interpreter's other packages by their path alone.

    A path file inside such a path is not read: an editable install of the checkout stays behind.
    """
    home = wheel.parent / "installed"
    run(sys.executable, "-m", "venv", home, cwd=wheel.parent)
    run(home / "bin" / "pip", "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=wheel.parent)
    (packages,) = home.glob("lib/python*/site-packages")
    (packages / "neighbours.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home


def test_the_wheel_holds_the_package_and_what_travels_with_it(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"hpc_ds/_shipped/{name}" for name in SHIPPED} == {name for name in names if "_shipped" in name}
    assert "hpc_ds/py.typed" in names
    modules = {path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "hpc_ds").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    assert not [name for name in names if name.startswith(("tests", "docs", "examples", "templates", "site_configs"))]


def test_the_name_deepspeed_comes_with_its_metadata(wheel: Path, installed: Path, tmp_path: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    here = REPOSITORY / "hpc_ds" / "compat"
    files = {path.relative_to(REPOSITORY).as_posix() for path in here.rglob("*") if path.is_file()}
    assert {name for name in files if "__pycache__" not in name} == {name for name in names if "hpc_ds/compat/" in name}
    ask = "import deepspeed, importlib.metadata as m; print(deepspeed.__file__, m.version('deepspeed'), deepspeed.__version__)"
    python = installed / "bin" / "python"
    file, in_metadata, version = run(python, "-m", "hpc_ds.compat", python, "-c", ask, cwd=tmp_path).split()
    assert Path(file).is_relative_to(installed)
    assert in_metadata == version == "0.19.8+hpcds"
    shown = run(python, "-c", "import importlib.metadata as m; print([*m.packages_distributions()])", cwd=tmp_path)
    assert "'deepspeed'" not in shown  # not where it is not asked for


def test_the_checkout_is_not_there(installed: Path, tmp_path: Path) -> None:
    where = (
        "import hpc_ds, hpc_ds.shipped as s; print(hpc_ds.__file__, s.shipped('templates'), s.shipped('site_configs'))"
    )
    paths = [Path(word) for word in run(installed / "bin" / "python", "-c", where, cwd=tmp_path).split()]
    assert all(path.is_relative_to(installed) for path in paths)
    found = {f"{folder.name}/{path.name}" for folder in paths[1:] for path in folder.iterdir()}
    assert found == SHIPPED


@pytest.mark.parametrize("site", ["slurm", "local"])
def test_a_job_script_is_made_without_the_checkout(site: str, installed: Path, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("")
    told = json.loads(
        run(installed / "bin" / "hpcds", "submit", "train.py", "--site", site, "--dry-run", "--json", cwd=tmp_path)
    )
    assert told["site"] == site
    assert told["script"].splitlines()[1].startswith("#SBATCH --job-name=train" if site == "slurm" else "#LOCAL")
    last = told["script"].splitlines()[-1]
    assert last.startswith(f"exec {installed}/bin/python")
    assert f" -m hpc_ds supervise {tmp_path}/runs/train-" in last
    assert str(REPOSITORY) not in told["script"]


def test_the_command_and_the_module_are_the_same(installed: Path, tmp_path: Path) -> None:
    command = run(installed / "bin" / "hpcds", "--version", cwd=tmp_path)
    assert command == run(installed / "bin" / "python", "-m", "hpc_ds", "--version", cwd=tmp_path)
    assert run(installed / "bin" / "hpcds", "hostfile", "n[1-2]", cwd=tmp_path) == "n1 slots=1\nn2 slots=1\n"


def test_the_name_deepspeed_comes_with_it(installed: Path, tmp_path: Path) -> None:
    """With its commands, which must still be programs, and run with the interpreter that has the wheel."""
    (tmp_path / "train.py").write_text("import deepspeed, sys; print(deepspeed.__file__, sys.executable)")
    for command in ("deepspeed", "ds"):
        wrapped = [installed / "bin" / "python", "-m", "hpc_ds.compat", command, "--num_gpus=1", "train.py"]
        package, interpreter = run(*wrapped, cwd=tmp_path).split()
        assert Path(package).is_relative_to(installed)
        assert Path(interpreter) == installed / "bin" / "python"


def test_a_whole_job_runs_without_the_checkout(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("import hpc_ds; print(hpc_ds.__file__)")
    told = run(installed / "bin" / "hpcds", "submit", "train.py", "--site", "local", "--follow", cwd=tmp_path)
    assert "finished" in told
    printed = run(installed / "bin" / "hpcds", "logs", "train", cwd=tmp_path)
    assert Path(printed.strip()).is_relative_to(installed)
