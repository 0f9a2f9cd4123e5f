"""Side by side with the real DeepSpeed: schedules, loss scales, batch sizes, Muon, and the loss curves of ZeRO stages 0-3.

One start of the peer, on two ranks, answers everything (peer.py).
"""

from __future__ import annotations

import functools
import random
from pathlib import Path
from typing import Any

import peer
import pytest
import torch.distributed as dist
from deepspeed_peer import run_deepspeed
from ranks import Outcomes, run_cases

import hpc_ds
from hpc_ds.config.training import Fp16Config, OptimizerConfig, SchedulerConfig, load_training, resolve_batch_sizes
from hpc_ds.engine.loss_scale import LossScale
from hpc_ds.engine.optimizers import make_optimizer
from hpc_ds.engine.piece import Piece
from hpc_ds.engine.schedules import make_schedule
from hpc_ds.errors import ConfigError, DivergedError

pytestmark = pytest.mark.ranks

STEPS = 60
CURVE_STEPS = 50
WORLD_SIZE = 2

CYCLE = {"cycle_min_lr": 0.01, "cycle_max_lr": 0.1, "cycle_first_step_size": 10}
SCHEDULES: dict[str, tuple[str, dict[str, Any], str]] = {
    "warmup": ("WarmupLR", {"warmup_num_steps": 20}, "SGD"),
    "warmup, linear": ("WarmupLR", {"warmup_min_lr": 0.01, "warmup_max_lr": 0.5, "warmup_num_steps": 20, "warmup_type": "linear"}, "SGD"),  # noqa: E501
    "warmup, odd type": ("WarmupLR", {"warmup_num_steps": 9, "warmup_type": "cubic"}, "SGD"),
    "warmup, one step": ("WarmupLR", {"warmup_num_steps": 1, "warmup_max_lr": [0.3, 0.4]}, "SGD"),
    "decay": ("WarmupDecayLR", {"warmup_num_steps": 10, "total_num_steps": 50}, "SGD"),
    "decay, linear": ("WarmupDecayLR", {"warmup_num_steps": 10, "total_num_steps": 40, "warmup_min_lr": 0.1, "warmup_max_lr": 1.0, "warmup_type": "linear"}, "SGD"),  # noqa: E501
    "decay, short": ("WarmupDecayLR", {"warmup_num_steps": 30, "total_num_steps": 20, "warmup_max_lr": 1.0}, "SGD"),
    "cosine": ("WarmupCosineLR", {"warmup_num_steps": 10, "total_num_steps": 45}, "SGD"),
    "cosine, ratios": ("WarmupCosineLR", {"warmup_num_steps": 7, "total_num_steps": 55, "warmup_min_ratio": 0.2, "cos_min_ratio": 0.1, "warmup_type": "linear"}, "Adam"),  # noqa: E501
    "cosine, short": ("WarmupCosineLR", {"warmup_num_steps": 30, "total_num_steps": 20}, "SGD"),
    "range": ("LRRangeTest", {"lr_range_test_step_size": 10, "lr_range_test_step_rate": 2.0}, "SGD"),
    "range, stairs": ("LRRangeTest", {"lr_range_test_min_lr": [0.1, 0.2], "lr_range_test_step_size": 7, "lr_range_test_staircase": True}, "SGD"),  # noqa: E501
    "cycle": ("OneCycle", CYCLE, "Adam"),
    "cycle, no betas": ("OneCycle", CYCLE, "SGD"),
    "cycle, decay": ("OneCycle", {**CYCLE, "cycle_second_step_size": 15, "decay_step_size": 5, "decay_lr_rate": 0.3, "decay_mom_rate": 0.01, "cycle_min_mom": 0.7}, "Adam"),  # noqa: E501
    "cycle, stairs": ("OneCycle", {**CYCLE, "cycle_first_stair_count": 3, "cycle_second_stair_count": 4, "cycle_max_lr": [0.1, 0.3]}, "Adam"),  # noqa: E501
    "cycle, up only": ("OneCycle", {**CYCLE, "cycle_second_step_size": 0, "decay_step_size": 3, "decay_lr_rate": 1.0, "cycle_momentum": False}, "Adam"),  # noqa: E501
}  # fmt: skip


@functools.cache
def scale_cases() -> list[tuple[dict[str, Any], str]]:
    """Configs and stories: x is an overflow, anything else a good step."""
    planted = ["x" * 20, "." * 40, "..x....x..xx......x" * 3, "x." * 30, "xx......" * 8, "." * 9 + "xxxxxxxx"]
    seeded = random.Random(1)
    drawn = ["".join("x" if seeded.random() < share else "." for _ in range(150)) for share in (0.02, 0.1, 0.3, 0.6)]
    cases = []
    for story in planted + drawn:
        for _ in range(6):
            config = {
                "initial_scale_power": seeded.choice([0, 3, 8, 16]),
                "loss_scale_window": seeded.choice([1, 2, 3, 10]),
                "hysteresis": seeded.choice([1, 2, 3]),
                "consecutive_hysteresis": seeded.random() < 0.5,
                "min_loss_scale": seeded.choice([1, 4]),
            }
            cases.append((config, story))
    cases.append(({}, planted[2]))
    cases.append(({"loss_scale": 128.0}, planted[2]))
    return [({"enabled": True, **config}, story) for config, story in cases]


MUON: dict[str, dict[str, Any]] = {
    method: {
        "muon": {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1, "ns_method": method},
        "adam": {"lr": 0.01, "betas": [0.8, 0.9], "eps": 1e-8, "weight_decay": 0.1},
        "steps": 5,
    }
    for method in ("gram", "standard")
}


def training_config(stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        # torch_adam: its own Adam would have to be compiled
        "optimizer": {"type": "AdamW", "params": {"lr": 0.004, "weight_decay": 0.1, "torch_adam": True}},
        "scheduler": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 5, "total_num_steps": CURVE_STEPS}},
        "bf16": {"enabled": True},
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage},
    }


STAGES = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def deepspeed() -> list[dict[str, Any]]:
    """The peer's answers, by rank."""
    payload = {
        "steps": STEPS,
        "schedules": list(SCHEDULES.values()),
        "scales": scale_cases(),
        "batches": peer.all_batch_cases(),
        "muon": list(MUON.values()),
        "curves": [training_config(stage) for stage in STAGES],
        "curve_steps": CURVE_STEPS,
    }
    return run_deepspeed(Path(peer.__file__), WORLD_SIZE, payload)


def train(rank: int, stage: int) -> list[float]:
    engine, *_ = hpc_ds.initialize(model=peer.TinyGpt(), config=training_config(stage))
    return peer.losses(engine, rank, dist.get_world_size(), CURVE_STEPS, engine.gradient_accumulation_steps())


@pytest.fixture(scope="module")
def ours() -> Outcomes:
    return run_cases(WORLD_SIZE, {f"stage {stage}": (train, (stage,)) for stage in STAGES})


@pytest.mark.parametrize("name", SCHEDULES)
def test_learning_rates_and_momenta_agree_step_for_step(deepspeed: list[dict[str, Any]], name: str) -> None:
    kind, params, optimizer_name = SCHEDULES[name]
    optimizer = peer.optimizer_for_schedule(optimizer_name)
    found = peer.rates(make_schedule(SchedulerConfig(type=kind, params=params), optimizer), optimizer, STEPS)
    wanted = deepspeed[0]["rates"][list(SCHEDULES).index(name)]
    assert len(found) == len(wanted) == STEPS + 1
    for step, (ours_now, its_now) in enumerate(zip(found, wanted, strict=True)):
        for group, its_group in zip(ours_now, its_now, strict=True):
            assert group == pytest.approx(its_group, rel=1e-12, abs=1e-15), f"step {step}"


def scales(config: dict[str, Any], story: str) -> list[Any]:
    scale = LossScale(Fp16Config(**config))
    found: list[Any] = [scale.value]
    for step in story:
        last = scale.exhausted
        try:
            scale.update(step == "x")
        except DivergedError:
            assert last
            return [*found, "diverged"]
        assert not (last and step == "x")
        found.append(scale.value)
    return found


def test_loss_scales_agree_step_for_step(deepspeed: list[dict[str, Any]]) -> None:
    answers = deepspeed[0]["scales"]
    for (config, story), wanted in zip(scale_cases(), answers, strict=True):
        assert scales(config, story) == wanted, (config, story)
    ends = [answer[-1] for answer in answers]
    assert "diverged" in ends  # the stories have both ends
    assert len(set(ends)) > 5


def test_batch_sizes_agree(deepspeed: list[dict[str, Any]]) -> None:
    different = {}
    cases = peer.all_batch_cases()
    for (sizes, world_size), wanted in zip(cases, deepspeed[0]["batches"], strict=True):
        try:
            found = resolve_batch_sizes(load_training(sizes)[0], world_size)
            told: list[int] | str = [found.train, found.micro, found.accumulation]
        except ConfigError:
            told = "refused"
        if told != wanted:
            different[str(sizes), world_size] = (told, wanted)
    assert different == {}
    assert 50 < sum(answer == "refused" for answer in deepspeed[0]["batches"]) < len(cases) - 50


@pytest.mark.parametrize("method", MUON)
def test_muon_agrees(deepspeed: list[dict[str, Any]], method: str) -> None:
    case, parameters = MUON[method], peer.matrices()
    muon, adam = case["muon"], case["adam"]
    params = {**adam, "muon_lr": muon["lr"], "adam_lr": adam["lr"], "momentum": muon["momentum"], "ns_method": method}
    del params["lr"]
    pieces = {one: Piece(name, one.shape, 0, one, shared=True) for name, one in parameters.items()}
    optimizer = make_optimizer(OptimizerConfig(type="Muon", params=params), [{"params": list(pieces)}], pieces)
    found = peer.moved_by(optimizer, parameters, case["steps"])
    # fp32, but the matrix products are taken in another order
    wanted = deepspeed[0]["muon"][list(MUON).index(method)]
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert found[name] == pytest.approx(values, rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("stage", STAGES)
def test_loss_curves_agree(deepspeed: list[dict[str, Any]], ours: Outcomes, stage: int) -> None:
    by_rank = [answer["curves"][STAGES.index(stage)] for answer in deepspeed]
    wanted = [sum(step) / WORLD_SIZE for step in zip(*by_rank, strict=True)]
    found = [sum(step) / WORLD_SIZE for step in zip(*ours[f"stage {stage}"], strict=True)]
    assert len(wanted) == CURVE_STEPS
    assert wanted[-1] < 0.8 * wanted[0]  # it learns, so agreement says something
    assert found == pytest.approx(wanted, rel=1e-3)
