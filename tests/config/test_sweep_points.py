"""The points of a sweep: what is read, what is refused, and the job of each."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_ds.config.job import JobConfig
from hpc_ds.config.model import check
from hpc_ds.config.sweep import LARGEST, jobs_of, read_points
from hpc_ds.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path


def job_of(**data: Any) -> JobConfig:
    job: JobConfig = check(JobConfig, {"command": ["true"], **data}, "job.json")
    return job


READ: dict[str, tuple[list[str], list[dict[str, Any]]]] = {
    "numbers": (["steps=1,2"], [{"steps": 1}, {"steps": 2}]),
    "a product": (
        ["steps=1,2", "env.A=x,07"],
        [{"steps": step, "env.A": text} for step in (1, 2) for text in ("x", "07")],
    ),
    "an argument": (["args.--lr=1e-3,0.01"], [{"args.--lr": "1e-3"}, {"args.--lr": "0.01"}]),
    "a JSON list": (['args=[["--lr", "1"], []]'], [{"args": ["--lr", "1"]}, {"args": []}]),
    "words": (
        ["training.gradient_clipping=0.5,auto"],
        [{"training.gradient_clipping": value} for value in (0.5, "auto")],
    ),
}


@pytest.mark.parametrize("name", READ)
def test_points_are_read(name: str) -> None:
    texts, points = READ[name]
    assert read_points(texts) == points


def test_points_of_a_file_and_of_values_are_combined(tmp_path: Path) -> None:
    file = tmp_path / "a=points.json"
    file.write_text(json.dumps([{"steps": 1, "env.A": "1"}, {"steps": 2}]))
    assert read_points([str(file), "parameters=5,6"])[1:3] == [
        {"steps": 1, "env.A": "1", "parameters": 6},
        {"steps": 2, "parameters": 5},
    ]


def test_each_point_is_a_job_of_its_own() -> None:
    base = job_of(args=["--x"], env={"A": "0", "B": "0"}, training={"gradient_clipping": 1.0})
    first, second = jobs_of(
        base, read_points(["args.--lr=1e-3,2e-3", "env.A=7", "training.gradient_clipping=0.5"]), "job.json"
    )
    assert first.args == ["--x", "--lr", "1e-3"]
    assert second.args == ["--x", "--lr", "2e-3"]
    assert (first.env, first.training) == ({"A": "7", "B": "0"}, {"gradient_clipping": 0.5})
    assert base.env["A"] == "0"


WRONG = {
    "steps": "--sweep 'steps': neither KEY=VALUE,... nor a file with a JSON list: No such file",
    "=1": "--sweep '=1': not KEY=VALUE,VALUE...;",
    "steps=": "--sweep 'steps=': not KEY=VALUE,VALUE...;",
    "steps=[1": "--sweep 'steps=[1': not a JSON list",
    "steps=[]": "--sweep 'steps=[]': an empty list",
    "resources.nodes=1,2": "--sweep 'resources.nodes': the tasks of an array share their resources; submit a run for each",
    "restart.lead=1": "--sweep 'restart.lead': the tasks of an array share their restart.lead",
    "name=a,b": "--sweep 'name': the tasks of an array share their name",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_no_sweep_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_points([text])
    assert str(caught.value).startswith(WRONG[text])


def test_a_key_given_twice_and_too_many_points_are_refused() -> None:
    with pytest.raises(ConfigError, match="--sweep 'steps': given twice"):
        read_points(["steps=1", "steps=2"])
    many = ",".join(map(str, range(1, 200)))
    with pytest.raises(ConfigError, match=f"more than {LARGEST} runs"):
        read_points([f"steps={many}", f"parameters={many}"])


FILES = ["", "{}", "[]", "[1]", "[{}]", '{"steps": 1}']


@pytest.mark.parametrize("text", FILES)
def test_a_file_that_is_no_list_of_points_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "points.json").write_text(text)
    with pytest.raises(ConfigError, match=r"points.json"):
        read_points([str(tmp_path / "points.json")])


def test_a_point_that_makes_no_job_is_named() -> None:
    with pytest.raises(ConfigError, match=r"job.json, task 2: steps 0: out of range"):
        jobs_of(job_of(), read_points(["steps=1,0"]), "job.json")
    with pytest.raises(ConfigError, match=r"job.json, task 1: stepz: unknown key; did you mean 'steps'"):
        jobs_of(job_of(), read_points(["stepz=1"]), "job.json")


TEXTS = st.text(max_size=12) | st.text(max_size=6).map("steps={}".format) | st.text(max_size=6).map("args.{}=1".format)


@settings(deadline=None, max_examples=100)
@given(st.lists(TEXTS, min_size=1, max_size=2))
def test_any_text_is_a_sweep_or_refused_in_one_sentence(texts: list[str]) -> None:
    said = ""
    try:
        jobs_of(job_of(), read_points(texts), "job.json")
    except ConfigError as error:
        said = str(error)
    assert "\n" not in said
