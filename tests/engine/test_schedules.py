"""Schedules against rates computed by hand from the laws in the module's table."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpc_ds.config.training import SchedulerConfig
from hpc_ds.engine.schedules import make_schedule
from hpc_ds.errors import ConfigError

OWN = 0.5  # of the first group; the second has twice that


def optimizer() -> torch.optim.Optimizer:
    first, second = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    return torch.optim.SGD([{"params": [first]}, {"params": [second], "lr": 2 * OWN}], lr=OWN)


def schedule(kind: str, **params: Any) -> Any:
    return make_schedule(SchedulerConfig(type=kind, params=params), optimizer())


def rates(made: Any, count: int) -> list[float]:
    """The first group's rate at construction and after each of ``count`` steps."""
    found = [made.optimizer.param_groups[0]["lr"]]
    for _ in range(count):
        made.optimizer.step()
        made.step()
        found.append(made.optimizer.param_groups[0]["lr"])
        assert made.get_last_lr()[0] == found[-1]
    return found


def test_linear_warmup() -> None:
    made = schedule("WarmupLR", warmup_min_lr=0.1, warmup_max_lr=0.5, warmup_num_steps=4, warmup_type="linear")
    # i = 0 at construction and after the first step
    assert rates(made, 7) == pytest.approx([0.1, 0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.5])


def test_logarithmic_warmup_is_the_default() -> None:
    made = schedule("WarmupLR", warmup_min_lr=1.0, warmup_max_lr=3.0, warmup_num_steps=8)
    # ln(i + 1) / ln 8 is 0, 1/3, ..., 2/3, ..., 1 at i = 0, 1, 3, 7
    found = rates(made, 10)
    assert [found[i + 1] for i in (0, 1, 3, 7, 8, 9)] == pytest.approx([1.0, 1 + 2 / 3, 1 + 4 / 3, 3.0, 3.0, 3.0])


def test_warmup_ends_at_each_groups_own_rate_unless_told() -> None:
    made = schedule("WarmupLR", warmup_num_steps=2)
    rates(made, 3)
    assert made.get_lr() == [OWN, 2 * OWN]
    assert made.get_last_lr() == [OWN, 2 * OWN]


def test_warmup_in_one_step_takes_two() -> None:
    assert rates(schedule("WarmupLR", warmup_num_steps=1, warmup_type="linear"), 3) == [0.0, 0.0, OWN / 2, OWN]


def test_decay_after_warmup() -> None:
    made = schedule("WarmupDecayLR", total_num_steps=8, warmup_max_lr=1.0, warmup_num_steps=4, warmup_type="linear")
    # (8 - i) / (8 - 4) from i = 4 on, never below 0
    wanted = [0, 0, 0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0]
    assert rates(made, 11) == pytest.approx(wanted)


def test_decay_ends_at_the_smallest_rate() -> None:
    made = schedule("WarmupDecayLR", total_num_steps=4, warmup_min_lr=0.2, warmup_max_lr=1.0, warmup_num_steps=2)
    assert rates(made, 6)[-2:] == pytest.approx([0.2, 0.2])


def test_decay_has_a_largest_rate_of_its_own() -> None:
    assert max(rates(schedule("WarmupDecayLR", total_num_steps=9, warmup_num_steps=3), 12)) == pytest.approx(0.001)


def test_a_run_shorter_than_its_warmup_decays_at_once() -> None:
    made = schedule("WarmupDecayLR", total_num_steps=2, warmup_max_lr=1.0, warmup_num_steps=4, warmup_type="linear")
    assert rates(made, 6) == pytest.approx([0, 0, 0.25, 0.5, 0.75, 0.0, 0.0])


def test_cosine_after_warmup() -> None:
    made = schedule(
        "WarmupCosineLR",
        total_num_steps=8,
        warmup_num_steps=4,
        warmup_min_ratio=0.2,
        cos_min_ratio=0.1,
        warmup_type="linear",
    )

    # progress (i - 3) / 4 from i = 4 on: 1/4, 1/2, 3/4, 1, 1
    def cosine(progress: float) -> float:
        return 0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2

    ratios = [0.2, 0.2, 0.4, 0.6, 0.8, cosine(1 / 4), 0.55, cosine(3 / 4), 0.1, 0.1, 0.1]
    assert rates(made, 10) == pytest.approx([OWN * ratio for ratio in ratios])
    assert made.get_lr() == pytest.approx([0.1 * OWN, 0.2 * OWN])


def test_cosine_defaults() -> None:
    made = schedule("WarmupCosineLR", total_num_steps=10, warmup_num_steps=3)
    found = rates(made, 20)
    assert found[:4] == pytest.approx([0.0, 0.0, OWN * math.log(2) / math.log(3), OWN])
    assert found[-1] == pytest.approx(OWN * 1e-4)


def test_a_torch_schedule_by_its_name() -> None:
    made = schedule("StepLR", step_size=2, gamma=0.1)
    assert isinstance(made, torch.optim.lr_scheduler.StepLR)
    assert rates(made, 4) == pytest.approx([OWN, OWN, OWN / 10, OWN / 10, OWN / 100])


KINDS: dict[str, dict[str, Any]] = {
    "WarmupLR": {"warmup_num_steps": 5},
    "WarmupDecayLR": {"warmup_num_steps": 5, "total_num_steps": 12, "warmup_max_lr": 0.3},
    "WarmupCosineLR": {"warmup_num_steps": 5, "total_num_steps": 12},
}


@given(st.sampled_from(sorted(KINDS)), st.integers(0, 20), st.integers(0, 10))
def test_a_restart_changes_no_rate(kind: str, before: int, after: int) -> None:
    straight = schedule(kind, **KINDS[kind])
    wanted = rates(straight, before + after)
    first, second = schedule(kind, **KINDS[kind]), schedule(kind, **KINDS[kind])
    rates(first, before)
    assert first.state_dict() == {"last_batch_iteration": before - 1}
    second.load_state_dict(first.state_dict())
    assert rates(second, after) == wanted[before:]
    assert second.get_lr() == straight.get_lr()


def test_a_changed_config_takes_effect_at_a_restart() -> None:
    first = schedule("WarmupLR", warmup_num_steps=4, warmup_type="linear")
    rates(first, 3)
    second = schedule("WarmupLR", warmup_num_steps=4, warmup_max_lr=10.0, warmup_type="linear")
    second.load_state_dict(first.state_dict())
    assert second.get_last_lr() == [5.0, 5.0]


def test_step_can_go_to_a_given_index() -> None:
    made = schedule("WarmupLR", warmup_num_steps=4, warmup_type="linear")
    made.step(2)
    assert made.get_last_lr() == [OWN / 2, OWN]
    made.step()
    assert made.get_last_lr() == [0.75 * OWN, 1.5 * OWN]


@pytest.mark.parametrize(
    ("kind", "params", "message"),
    [
        ("WarmupRL", {}, r"scheduler.type 'WarmupRL': unknown; did you mean 'WarmupLR'\?"),
        ("OneCycle", {}, "scheduler.type 'OneCycle': unknown; "),
        (
            "WarmupDecayLR",
            {},
            r"scheduler.params: refused by WarmupDecayLR: .*total_num_steps.*; it takes total_num_steps",
        ),
        ("WarmupLR", {"warmup": 3}, r"scheduler.params: refused by WarmupLR: .*'warmup'; it takes warmup_min_lr, "),
        *(
            (kind, {**KINDS[kind], "warmup_num_steps": steps}, "warmup_num_steps .* is not a whole number above 0")
            for kind in KINDS
            for steps in (0, -1, 2.0, True)
        ),
        *((kind, {**KINDS[kind], "warmup_type": "cubic"}, "warmup_type 'cubic' is neither") for kind in KINDS),
        ("StepLR", {"gamma": 0.1}, "scheduler.params: refused by StepLR: "),
    ],
)
def test_refusals(kind: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        schedule(kind, **params)
    assert caught.value.key in {"scheduler.type", "scheduler.params"}
