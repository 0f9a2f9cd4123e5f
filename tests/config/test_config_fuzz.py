"""Whatever JSON says: a job or a training config comes out, or an error of ours in one sentence."""

from __future__ import annotations

import base64
import copy
import json
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_ds.config.explain import explain
from hpc_ds.config.job import JobConfig
from hpc_ds.config.known_keys import ACCEPTED, ALIASES, DEPRECATED, REFUSED
from hpc_ds.config.load import build_job, resolved
from hpc_ds.config.model import check
from hpc_ds.config.training import TrainingConfig, load_training, resolve_batch_sizes, sections
from hpc_ds.errors import ConfigError

HERE = Path(__file__).resolve().parent
SCRIPT = Path(__file__).name

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-(10**40), max_value=10**40)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["auto", "", "~", "~x", "a/b", "1", "1:00", "\n", "'", "\x00", "\u2028", "none", "cpu", "venv"])
)
ANYTHING = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)


def keys_of(model: type[Any]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


SECTIONS = {
    name: keys_of(field.annotation) for name, field in JobConfig.model_fields.items() if hasattr(field.annotation, "model_fields")
}  # fmt: skip


# Section of the training config -> the last parts of the keys that stand somewhere below it.
BELOW: dict[str, list[str]] = {}
for _key in sorted(
    {
        *ACCEPTED,
        *REFUSED,
        *ALIASES,
        *DEPRECATED,
        *(f"{at}{name}" for at, model in sections() for name in keys_of(model)),
    }
):
    _section, _, _rest = _key.partition(".")
    if _rest:
        BELOW.setdefault(_section, []).append(_rest.rpartition(".")[2])


NAMES = st.text(max_size=3) | st.sampled_from(["//", "// name", "$schema"])


@st.composite
def jobs(draw: st.DrawFn) -> dict[str, Any]:
    """A job with keys that exist, and anything in them."""
    data = draw(st.dictionaries(st.sampled_from(keys_of(JobConfig)) | NAMES, ANYTHING, max_size=4))
    for section in draw(st.sets(st.sampled_from(sorted(SECTIONS)), max_size=2)):
        data[section] = draw(st.dictionaries(st.sampled_from(SECTIONS[section]), ANYTHING, max_size=3))
    return {"script": SCRIPT, **data}


@st.composite
def trainings(draw: st.DrawFn) -> dict[str, Any]:
    """A training config with keys that exist, and anything in them."""
    known = st.sampled_from(
        sorted({*keys_of(TrainingConfig), *(key.partition(".")[0] for key in (*ACCEPTED, *REFUSED))})
    )
    data = draw(st.dictionaries(known | st.text(max_size=3), ANYTHING, max_size=5))
    if draw(st.booleans()):
        for section in draw(st.sets(st.sampled_from(sorted(BELOW)), max_size=2)):
            data[section] = draw(st.dictionaries(st.sampled_from(BELOW[section]), ANYTHING, max_size=4))
    return data


def said_in_one_sentence(error: ConfigError) -> None:
    assert str(error)
    assert "\n" not in str(error)


@settings(deadline=None, max_examples=100)
@given(
    jobs(), st.lists(st.text(max_size=12) | st.text(max_size=4).map("resources.{}=1".format), max_size=2), st.booleans()
)
def test_any_job_is_taken_or_refused_in_one_sentence(data: dict[str, Any], overrides: list[str], more: bool) -> None:
    before = copy.deepcopy(data)
    try:
        job = build_job(data, overrides, ["--x"] if more else [], file="job.json", base=HERE)
    except ConfigError as error:
        said_in_one_sentence(error)
    else:
        assert repr(check(JobConfig, resolved(job), "config.json")) == repr(job)
    assert repr(data) == repr(before), "the given data were changed"


@settings(deadline=None, max_examples=100)
@given(trainings(), st.integers(1, 16))
def test_any_training_config_is_taken_or_refused_in_one_sentence(data: dict[str, Any], world_size: int) -> None:
    before = copy.deepcopy(data)
    try:
        config, warnings = load_training(data, "ds.json")
        sizes = resolve_batch_sizes(config, world_size)
    except ConfigError as error:
        said_in_one_sentence(error)
    else:
        assert sizes.train == sizes.micro * sizes.accumulation * sizes.world_size
        assert len(set(warnings)) == len(warnings)
    assert repr(data) == repr(before), "the given data were changed"


@settings(deadline=None, max_examples=50)
@given(trainings(), st.integers(1, 16))
def test_any_training_config_is_explained_or_refused_in_one_sentence(data: dict[str, Any], world_size: int) -> None:
    source = base64.urlsafe_b64encode(json.dumps(data).encode()).decode()
    try:
        found = explain(source, world_size, 10**9)
    except ConfigError as error:
        said_in_one_sentence(error)
    else:
        text = json.dumps(found.as_data(), allow_nan=False)
        assert json.loads(text)["world_size"] == world_size


def test_the_fuzz_knows_the_keys() -> None:
    assert "nodes" in SECTIONS["resources"]
    assert "async" in SECTIONS["checkpoint"]
    assert {"parameters", "inputs", "snapshot"} <= set(keys_of(JobConfig))
    assert {"stage", "device", "cpu_offload", "overlap_comm", "max_live_parameters"} <= set(BELOW["zero_optimization"])
