"""Whatever stands in a site file, it is a site or one sentence that names the file; and no job breaks its rules badly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_ds.config.job import JobConfig
from hpc_ds.config.load import load_site
from hpc_ds.config.model import check
from hpc_ds.config.site import SiteConfig
from hpc_ds.config.site_rules import check_job, fitted
from hpc_ds.errors import ConfigError, SiteError
from hpc_ds.launch.srun import site_options
from hpc_ds.run_dir import RunDir
from hpc_ds.script.render import environment_file, render
from hpc_ds.shipped import shipped

if TYPE_CHECKING:
    import pytest

LEAST = {"name": "s", "description": "d", "scheduler": "slurm"}
FIELDS = sorted(SiteConfig.model_fields)
SHIPPED = [json.loads(path.read_text()) for path in sorted(shipped("site_configs").glob("*.json"))]

texts = st.text(max_size=20) | st.sampled_from(["", "1h", "\0", "a\nb", "$(x)"])
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | st.sampled_from(FIELDS), inner, max_size=3)
    ),
    max_leaves=8,
)


@st.composite
def spoiled(draw: st.DrawFn) -> dict[str, Any]:
    """A site file in which something, at some depth, was exchanged, taken away or added."""
    data: dict[str, Any] = json.loads(json.dumps(draw(st.sampled_from([LEAST, *SHIPPED]))))
    for _ in range(draw(st.integers(1, 3))):
        holder: Any = data
        while True:
            keys = sorted(holder) if isinstance(holder, dict) else list(range(len(holder)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(holder[key], dict | list) and holder[key] and draw(st.booleans()):
                holder = holder[key]
                continue
            holder[key] = draw(values)
            break
        if draw(st.booleans()):
            data[draw(st.sampled_from(FIELDS) | st.text(max_size=8))] = draw(values)
    return data


def read(data: dict[str, Any], path: Path) -> SiteConfig | None:
    path.write_text(json.dumps(data), encoding="utf-8")
    try:
        return load_site(str(path))
    except SiteError as error:
        words = str(error)
        assert str(path) in words
        assert "\n" not in words
        return None


@settings(max_examples=300)
@given(data=spoiled())
def test_any_site_file_is_a_site_or_one_sentence(
    data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("site")
    site = read(data, folder / "site.json")
    if site is None:
        return
    again = read(site.model_dump(mode="json"), folder / "again.json")
    assert again == site
    assert set(site.unverified) <= set(site.sources)


resources = st.fixed_dictionaries(
    {},
    optional={
        "nodes": st.integers(1, 20_000),
        "gpus_per_node": st.integers(0, 16),
        "tasks_per_node": st.integers(1, 16),
        "cpus_per_task": st.integers(1, 300),
        "mem": st.sampled_from(["0", "4G"]),
        "time": st.sampled_from(["10", "2:00:00", "1-0", "30-0"]),
        "partition": st.sampled_from(["gpu", "batch", "debug,normal", "none", ","]),
        "qos": st.sampled_from(["debug", "gpu-exc", "none"]),
        "account": st.sampled_from(["def-a", "m42_g", "x"]),
        "sbatch": st.sampled_from([{}, {"ntasks": 3}, {"partition": False}, {"account": "def-b"}, {"exclusive": True}]),
    },
)


def checked(job: JobConfig, site: SiteConfig) -> tuple[list[str], ConfigError | None]:
    try:
        return check_job(job, site), None
    except ConfigError as error:
        return [], error


@settings(max_examples=200)
@given(data=st.sampled_from(SHIPPED), asked=resources)
def test_any_job_is_refused_warned_of_or_rendered(data: dict[str, Any], asked: dict[str, Any]) -> None:
    site: SiteConfig = check(SiteConfig, data, "site.json")
    job: JobConfig = check(JobConfig, {"command": ["true"], "workdir": "/", "resources": asked}, "job.json")
    warnings, refusal = checked(job, site)
    if refusal is not None:
        assert str(refusal.key).startswith("resources.")
        assert str(refusal).startswith(str(refusal.key))
        return
    assert all("\n" not in warning for warning in warnings)
    found = fitted(job, site)
    assert (found.nodes, found.gpus_per_node, found.world_size) == (
        job.resources.nodes,
        job.resources.gpus_per_node,
        job.resources.world_size,
    )
    assert render(job, site, RunDir(Path("/runs/r"))).startswith("#!/bin/bash\n")
    environment_file(job, site, {})
    site_options(job, site)
