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

    # 0 before the first step, as in DeepSpeed, whatever the smallest ratio is
    ratios = [0.0, 0.2, 0.4, 0.6, 0.8, cosine(1 / 4), 0.55, cosine(3 / 4), 0.1, 0.1, 0.1]
    assert rates(made, 10) == pytest.approx([OWN * ratio for ratio in ratios])
    assert made.get_lr() == pytest.approx([0.1 * OWN, 0.2 * OWN])


def test_cosine_defaults() -> None:
    made = schedule("WarmupCosineLR", total_num_steps=1e1, warmup_num_steps=3)
    found = rates(made, 20)
    assert found[:4] == pytest.approx([0.0, 0.0, OWN * math.log(2) / math.log(3), OWN])
    assert found[-1] == pytest.approx(OWN * 1e-4)


def test_a_torch_schedule_by_its_name() -> None:
    made = schedule("StepLR", step_size=2, gamma=0.1)
    assert isinstance(made, torch.optim.lr_scheduler.StepLR)
    assert rates(made, 4) == pytest.approx([OWN, OWN, OWN / 10, OWN / 10, OWN / 100])


def test_range_test_rises_from_construction() -> None:
    made = schedule("LRRangeTest", lr_range_test_min_lr=0.1, lr_range_test_step_size=4, lr_range_test_step_rate=2.0)
    # 0.1 (1 + 2 (i + 1) / 4), and i is -1 at construction
    assert rates(made, 4) == pytest.approx([0.1, 0.15, 0.2, 0.25, 0.3])


def test_range_test_on_stairs() -> None:
    made = schedule("LRRangeTest", lr_range_test_min_lr=0.1, lr_range_test_step_size=3, lr_range_test_staircase=True)
    assert rates(made, 7) == pytest.approx([0.1, 0.1, 0.1, 0.2, 0.2, 0.2, 0.3, 0.3])


CYCLE = {"cycle_min_lr": 0.1, "cycle_max_lr": 0.5, "cycle_first_step_size": 4, "cycle_second_step_size": 2}


def test_one_cycle_then_decay() -> None:
    made = schedule("OneCycle", **CYCLE, decay_step_size=2, decay_lr_rate=1.0)
    # up by 0.1 a step, down by 0.2; then 0.1 / (1 + 1/2), 0.1 / 2, 0.1 / (1 + 3/2)
    wanted = [0.1, 0.2, 0.3, 0.4, 0.5, 0.3, 0.1, 0.1 / 1.5, 0.05, 0.04]
    assert rates(made, 9) == pytest.approx(wanted)


@pytest.mark.parametrize("decay", [{}, {"decay_step_size": 2}, {"decay_lr_rate": 1.0}])
def test_one_cycle_stays_at_its_smallest_rate_without_decay(decay: dict[str, float]) -> None:
    assert rates(schedule("OneCycle", **CYCLE, **decay), 9)[-3:] == pytest.approx([0.1, 0.1, 0.1])


def test_one_cycle_on_stairs() -> None:
    params = {**CYCLE, "cycle_second_step_size": 4, "cycle_first_stair_count": 2, "cycle_second_stair_count": 1}
    # two stairs up: at half and at the whole; one down: only at its end
    wanted = [0.1, 0.1, 0.3, 0.3, 0.5, 0.1, 0.1, 0.1, 0.1]
    assert rates(schedule("OneCycle", **params), 8) == pytest.approx(wanted)


def test_one_cycle_moves_the_first_beta_the_other_way() -> None:
    adam = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])
    params = {**CYCLE, "cycle_min_mom": 0.5, "cycle_max_mom": 0.9, "decay_step_size": 1, "decay_mom_rate": 0.1}
    made = make_schedule(SchedulerConfig(type="OneCycle", params=params), adam)
    found = [adam.param_groups[0]["betas"]]
    for _ in range(7):
        adam.step()
        made.step()
        found.append(adam.param_groups[0]["betas"])
        assert made.get_mom() == [found[-1]]
    assert [beta for beta, _ in found] == pytest.approx([0.5, 0.8, 0.7, 0.6, 0.5, 0.7, 0.9, 0.99])
    assert {beta for _, beta in found} == {0.99}
    restarted = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])
    make_schedule(SchedulerConfig(type="OneCycle", params=params), restarted).load_state_dict(made.state_dict())
    assert restarted.param_groups[0]["betas"] == found[-1]


def test_one_cycle_leaves_the_momentum_of_others_alone(caplog: pytest.LogCaptureFixture) -> None:
    made = schedule("OneCycle", **CYCLE)
    rates(made, 3)
    assert made.get_mom() is None
    assert "betas" not in made.optimizer.param_groups[0]
    assert caplog.messages == ["scheduler.params.cycle_momentum: has no effect, SGD has no betas"]
    caplog.clear()
    schedule("OneCycle", **CYCLE, cycle_momentum=False)
    assert caplog.messages == []


def test_each_group_may_have_a_number_of_its_own() -> None:
    made = schedule("WarmupLR", warmup_min_lr=[0.1, 0.2], warmup_max_lr=[1.0, 2.0], warmup_num_steps=2)
    assert made.get_last_lr() == [0.1, 0.2]
    rates(made, 3)
    assert made.get_last_lr() == [1.0, 2.0]
    made = schedule("OneCycle", **{**CYCLE, "cycle_min_lr": [0.1, 0.2]})
    assert made.get_last_lr() == [0.1, 0.2]
    made = schedule("LRRangeTest", lr_range_test_min_lr=[0.1, 0.2])
    assert made.get_last_lr() == [0.1, 0.2]


def test_a_group_that_is_added_later_is_scheduled_too() -> None:
    made = schedule("WarmupLR", warmup_num_steps=2)
    given = schedule("WarmupLR", warmup_num_steps=2, warmup_max_lr=[1.0, 2.0])
    for one in (made, given):
        one.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 4.0})
        rates(one, 3)
    assert made.get_last_lr() == [OWN, 2 * OWN, 4.0]
    assert given.get_last_lr() == [1.0, 2.0, 2.0]


def test_an_unknown_warmup_is_logarithmic_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    odd = schedule("WarmupLR", warmup_num_steps=8, warmup_type="cubic")
    assert rates(odd, 9) == rates(schedule("WarmupLR", warmup_num_steps=8), 9)
    assert caplog.messages == ["scheduler.params.warmup_type 'cubic': unknown, read as 'log'; use 'log' or 'linear'"]


@pytest.mark.parametrize("kind", ["WarmupDecayLR", "WarmupCosineLR"])
def test_a_warmup_longer_than_the_run_is_told(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    schedule(kind, total_num_steps=3, warmup_num_steps=4)
    assert caplog.messages == ["scheduler.params.total_num_steps 3: fewer than warmup_num_steps 4; the warmup is all"]


@pytest.mark.parametrize(
    ("kind", "params"),
    [
        ("StepLR", {"step_size": 2}),
        ("MultiStepLR", {"milestones": [2, 3]}),
        ("ConstantLR", {}),
        ("LinearLR", {}),
        ("ExponentialLR", {"gamma": 0.5}),
        ("PolynomialLR", {}),
        ("CosineAnnealingLR", {"T_max": 5}),
        ("CosineAnnealingWarmRestarts", {"T_0": 3}),
        ("CyclicLR", {"base_lr": 0.1, "max_lr": 0.2, "cycle_momentum": False}),
        ("OneCycleLR", {"max_lr": 0.5, "total_steps": 20, "cycle_momentum": False}),
    ],
)
def test_torchs_schedules_have_a_rate_from_construction(kind: str, params: dict[str, Any]) -> None:
    made = schedule(kind, **params)
    assert type(made) is getattr(torch.optim.lr_scheduler, kind)
    assert made.get_last_lr() == [group["lr"] for group in made.optimizer.param_groups]
    rates(made, 3)


KINDS: dict[str, dict[str, Any]] = {
    "WarmupLR": {"warmup_num_steps": 5},
    "WarmupDecayLR": {"warmup_num_steps": 5, "total_num_steps": 12, "warmup_max_lr": 0.3},
    "WarmupCosineLR": {"warmup_num_steps": 5, "total_num_steps": 12},
    "LRRangeTest": {"lr_range_test_step_size": 5},
    "OneCycle": {**CYCLE, "decay_step_size": 2, "decay_lr_rate": 0.5, "cycle_momentum": False},
}
WARMUPS = [kind for kind in KINDS if kind.startswith("Warmup")]


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
        ("LRScheduler", {}, "scheduler.type 'LRScheduler': unknown; "),
        ("LambdaLR", {}, "scheduler.type 'LambdaLR': refused, because it takes a function, which JSON cannot hold; "),
        ("ChainedScheduler", {}, "scheduler.type 'ChainedScheduler': refused, because it is made of other schedules; "),
        ("ReduceLROnPlateau", {}, "scheduler.type 'ReduceLROnPlateau': refused, because its steps need a metric"),
        ("WarmupDecayLR", {}, "scheduler.params.total_num_steps: missing; WarmupDecayLR has no default for it"),
        ("OneCycle", {"cycle_max_lr": 1.0}, "scheduler.params.cycle_min_lr: missing; OneCycle has no default"),
        ("StepLR", {"gamma": 0.1}, "scheduler.params.step_size: missing; StepLR has no default for it"),
        (
            "WarmupLR",
            {"warmup_steps": 3},
            r"scheduler.params.warmup_steps: unknown to .*; did you mean 'warmup_num_steps'",
        ),
        *(
            (kind, {**KINDS[kind], "warmup_num_steps": steps}, "warmup_num_steps .* is not a whole number above 0")
            for kind in WARMUPS
            for steps in (0, -1, 2.0, True)
        ),
        ("WarmupCosineLR", {"total_num_steps": 0}, "total_num_steps 0 is not a number above 0"),
        (
            "WarmupLR",
            {"warmup_max_lr": "0.1"},
            "refused by WarmupLR: warmup_max_lr '0.1' is not a number; it takes warmup_min",
        ),
        ("WarmupLR", {"warmup_min_lr": [0.1]}, r"warmup_min_lr \[0.1\] is not one number for each of the 2 groups"),
        ("LRRangeTest", {"lr_range_test_step_size": 0}, "lr_range_test_step_size 0 is not a whole number above 0"),
        ("OneCycle", {**CYCLE, "cycle_first_step_size": 0}, "cycle_first_step_size 0 and .* are no cycle"),
        ("OneCycle", {**CYCLE, "cycle_second_step_size": -1}, "cycle_second_step_size -1 are no cycle"),
        ("OneCycleLR", {"max_lr": 0.1}, "scheduler.params: refused by OneCycleLR: .*total_steps"),
    ],
)
def test_refusals(kind: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        schedule(kind, **params)
    assert (caught.value.key or "").startswith(("scheduler.type", "scheduler.params"))
