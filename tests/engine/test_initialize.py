"""Every way into ``initialize``, and what a script gets back."""

from __future__ import annotations

import argparse
import base64
import gc
import json
import os
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from ranks import Outcomes, run_cases
from small import RATE, STAGES, Small, config, said, samples
from torch import nn

import hpc_ds

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.ranks


def step(engine: Any, number: int = 0) -> None:
    engine.backward(engine(samples(number)).square().mean())
    engine.step()


def weights(engine: Any) -> torch.Tensor:
    """All masters, whole and flat. Collective."""
    return torch.cat([hpc_ds.zero.safe_get_full_fp32_param(p).flatten() for p in engine.module.parameters()])


def plain_step(*, groups: bool = False, steps: int = 1) -> torch.Tensor:
    """What SGD makes of the weights without an engine."""
    model = Small()
    rates = {id(parameter): RATE for parameter in model.parameters()}
    if groups:
        rates |= {id(parameter): 2 * RATE for parameter in model.down.parameters()}
    for number in range(steps):
        model.zero_grad()
        model(samples(number)).square().mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(rates[id(parameter)] * parameter.grad)
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


# the config


def arguments_of(config: str | None = None) -> argparse.Namespace:
    parser = hpc_ds.add_config_arguments(argparse.ArgumentParser())
    return parser.parse_args(["--deepspeed", *([] if config is None else ["--deepspeed_config", config])])


def ways_of_config(rank: int, folder: Path) -> dict[str, Any]:
    data = config(train_micro_batch_size_per_gpu=3)
    text = json.dumps(data)
    file = folder / "training.json"
    if rank == 0:
        file.write_text(text)
    dist.barrier()
    ways: dict[str, dict[str, Any]] = {
        "dict": {"config": data},
        "path": {"config": file},
        "path as text": {"config": str(file)},
        "base64": {"config": base64.urlsafe_b64encode(text.encode()).decode()},
        "config_params": {"config_params": data},
        "args": {"args": arguments_of(str(file))},
        "base64 in args": {"args": arguments_of(base64.urlsafe_b64encode(text.encode()).decode())},
    }
    return {
        name: hpc_ds.initialize(model=Small(), **way)[0].train_micro_batch_size_per_gpu() for name, way in ways.items()
    }


def wrong_configs(rank: int, folder: Path) -> dict[str, str]:
    ways: dict[str, dict[str, Any]] = {
        "two": {"config": config(), "args": arguments_of("a.json")},
        "alias": {"config": config(), "config_params": config()},
        "none": {},
        "none in args": {"args": arguments_of()},
        "empty": {"config": {}},
        "no file": {"config": folder / "absent.json"},
        "sizes": {"config": config(train_batch_size=7, gradient_accumulation_steps=1)},
    }
    return {name: said(lambda way=way: hpc_ds.initialize(model=Small(), **way)) for name, way in ways.items()}


def test_a_config_is_taken_in_every_form(pair: Outcomes) -> None:
    for by_way in pair["ways_of_config"]:
        assert by_way == dict.fromkeys(by_way, 3)
        assert len(by_way) == 7


def test_a_config_that_is_ambiguous_or_missing_is_refused(pair: Outcomes) -> None:
    for words in pair["wrong_configs"]:
        two = "ConfigError: initialize: a config is given more than once, as config and "
        assert words["two"] == f"{two}--deepspeed_config; give one of them"
        assert words["alias"] == f"{two}config_params; give one of them"
        assert words["none"].startswith("ConfigError: initialize: no config; pass config=, or --deepspeed_config")
        assert words["none in args"] == words["none"]
        assert words["empty"].startswith(
            "ConfigError: train_batch_size, train_micro_batch_size_per_gpu: neither is given"
        )
        assert "no such file" in words["no file"]


def test_the_batch_arithmetic_names_all_numbers_and_where_the_world_size_is_from(pair: Outcomes) -> None:
    for words in pair["wrong_configs"]:
        assert words["sizes"] == (
            "ConfigError: train_batch_size 7: not train_micro_batch_size_per_gpu 2 x gradient_accumulation_steps 1 x "
            "world size 2 (the ranks of the process group) = 4; make them agree, or leave one of the three sizes out"
        )


# optimizers, parameters, schedules


def named(model: Small) -> Any:
    return model.named_parameters()


def two_groups(model: Small) -> list[dict[str, Any]]:
    rest = [*model.up.parameters(), model.gain]
    return [{"params": rest}, {"params": model.down.parameters(), "lr": 2 * RATE}]


# model_parameters, optimizer -> the same update whatever the way
WAYS: dict[str, tuple[Any, Any]] = {
    "config": (None, None),
    "tensors": (lambda model: list(model.parameters()), None),
    "generator": (lambda model: model.parameters(), None),
    "pairs": (named, None),
    "instance": (None, lambda model: torch.optim.SGD(model.parameters(), lr=RATE)),
    "instance of pairs": (None, lambda model: torch.optim.SGD(model.named_parameters(), lr=RATE)),
    "callable": (None, lambda _: lambda parameters: torch.optim.SGD(parameters, lr=RATE)),
    "class": (None, lambda _: NothingToGive),
    "groups": (two_groups, None),
    "generator of groups": (lambda model: iter(two_groups(model)), None),
    "instance of groups": (None, lambda model: torch.optim.SGD(two_groups(model), lr=RATE)),
    "callable, groups": (two_groups, lambda _: lambda groups: torch.optim.SGD(groups, lr=RATE)),
}


class NothingToGive(torch.optim.SGD):
    """A class whose only argument is the parameters."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=RATE)


def one_way(rank: int, stage: int, way: str) -> tuple[torch.Tensor, bool, list[float]]:
    model = Small()
    parameters, optimizer = ((None if make is None else make(model)) for make in WAYS[way])
    made = hpc_ds.initialize(
        model=model,
        optimizer=optimizer,
        model_parameters=parameters,
        config=config(stage, zero_allow_untested_optimizer=way == "class"),
    )
    engine, returned, loader, schedule = made
    step(engine)
    same = not isinstance(optimizer, torch.optim.Optimizer) or returned is optimizer
    kept = returned is engine.optimizer and (loader, schedule) == (None, None)
    return weights(engine), same and kept, engine.get_lr()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("way", WAYS)
def test_optimizer_and_parameters_come_in_every_form(pair: Outcomes, way: str, stage: int) -> None:
    wanted = plain_step(groups="groups" in way)
    for found, returned_as_given, rates in pair[f"{way} {stage}"]:
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
        assert returned_as_given
        assert rates == ([RATE, 2 * RATE] if "groups" in way else [RATE])


def halved(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda number: 0.5**number)


class Constant(torch.optim.lr_scheduler.ConstantLR):
    """A class whose only argument is the optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer, factor=0.5, total_iters=100)


def schedules(rank: int) -> dict[str, Any]:
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    of_config = {"type": "WarmupLR", "params": {"warmup_max_lr": RATE, "warmup_num_steps": 2}}
    ways: dict[str, dict[str, Any]] = {
        "instance": {"model": model, "optimizer": optimizer, "lr_scheduler": halved(optimizer)},
        "callable": {"model": Small(), "lr_scheduler": halved},
        "class": {"model": Small(), "lr_scheduler": Constant},
        "over the config": {"model": Small(), "lr_scheduler": halved, "config": config(scheduler=of_config)},
        "config": {"model": Small(), "config": config(scheduler=of_config)},
    }
    rates = {}
    for name, way in ways.items():
        engine, _, _, schedule = hpc_ds.initialize(**{"config": config(), **way})
        assert schedule is engine.lr_scheduler
        rates[name] = [engine.get_lr()[0]]
        for number in range(2):
            step(engine, number)
            rates[name].append(engine.get_lr()[0])
    strange = torch.optim.SGD(Small().parameters(), lr=RATE)
    no_optimizer = {key: value for key, value in config(scheduler=of_config).items() if key != "optimizer"}
    rates["said"] = [
        said(lambda: hpc_ds.initialize(model=Small(), config=config(), lr_scheduler=halved(strange))),
        hpc_ds.initialize(model=Small(), config=no_optimizer)[3],
    ]
    return rates


def test_a_schedule_comes_as_instance_callable_class_or_config(pair: Outcomes) -> None:
    for rates in pair["schedules"]:
        halves = [RATE, RATE / 2, RATE / 4]
        assert rates["instance"] == rates["callable"] == rates["over the config"] == pytest.approx(halves)
        assert rates["class"] == pytest.approx([RATE / 2] * 3)
        assert rates["config"] == pytest.approx([0.0, 0.0, RATE])
        other, none = rates["said"]
        assert other.startswith("ConfigError: lr_scheduler: it was made for another optimizer than the engine's; ")
        assert none is None  # a model that is only evaluated, by the config of its training


class SignOfSgd(torch.optim.Optimizer):
    """Nobody knows whether it works element by element."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": RATE})

    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data -= group["lr"] * parameter.grad.sign()


def strange_optimizer(rank: int, stage: int) -> tuple[str, str, bool]:
    def start(**overrides: Any) -> Any:
        return hpc_ds.initialize(model=Small(), optimizer=SignOfSgd, config=config(stage, **overrides))[0]

    used = Small()
    tired = torch.optim.SGD(used.parameters(), lr=RATE, momentum=0.9)
    used(samples()).mean().backward()
    tired.step()
    engine = start(zero_allow_untested_optimizer=True)
    before = weights(engine)
    step(engine)
    return (
        "started" if stage == 0 and start() else said(start),
        said(lambda: hpc_ds.initialize(model=used, optimizer=tired, config=config(stage))),
        bool(((weights(engine) - before).abs() - RATE).abs().max() < 1e-6),
    )


@pytest.mark.parametrize("stage", STAGES)
def test_an_optimizer_that_nobody_knows_is_refused_where_it_sees_ranges(pair: Outcomes, stage: int) -> None:
    for strange, tired, works_when_allowed in pair[f"strange_optimizer {stage}"]:
        refused = (
            f"ConfigError: optimizer SignOfSgd: at ZeRO stage {stage} it sees ranges of parameters, which is right only"
        )
        assert strange.startswith("started" if stage == 0 else refused)
        assert tired.startswith("ConfigError: optimizer: it has taken steps already; ")
        assert works_when_allowed


# models


def wrong_models(rank: int) -> dict[str, str]:
    with torch.device("meta"):
        nowhere = Small()
    model, shared = Small(), Small()
    hpc_ds.initialize(model=shared, config=config())
    ways: dict[str, dict[str, Any]] = {
        "none": {"model": None},
        "class": {"model": Small},
        "meta": {"model": nowhere},
        "frozen": {"model": Small().requires_grad_(requires_grad=False)},
        "again": {"model": shared},
        "part of another": {"model": nn.Sequential(shared.up)},
        "foreign": {"model": model, "model_parameters": [nn.Parameter(torch.zeros(2))]},
        "mpu": {"model": model, "mpu": object()},
    }
    return {name: said(lambda way=way: hpc_ds.initialize(config=config(), **way)) for name, way in ways.items()}


def test_a_model_that_cannot_be_trained_is_refused(pair: Outcomes) -> None:
    for words in pair["wrong_models"]:
        assert words["none"] == "ConfigError: initialize: no model; pass model="
        assert words["class"] == "ConfigError: model of type type: not a torch.nn.Module; pass an instance of one"
        assert words["meta"].startswith(
            "ConfigError: model: module 'Small' is on the meta device and has no reset_param"
        )
        assert words["frozen"].startswith(
            "ConfigError: model: no parameter needs a gradient, so there is nothing to train"
        )
        assert words["again"].startswith("ConfigError: model: parameter 'gain' belongs to an engine already; ")
        assert words["part of another"].startswith(
            "ConfigError: model: parameter '0.weight' belongs to an engine already;"
        )
        assert words["foreign"].startswith(
            "ConfigError: model_parameters: one of them is not a parameter of the model; "
        )
        assert words["mpu"].startswith("ConfigError: initialize: mpu and mesh_param are for model parallelism")


def without_optimizer(rank: int, stage: int) -> tuple[Any, ...]:
    """An engine that only computes; its model may be frozen."""
    data = {key: value for key, value in config(stage).items() if key != "optimizer"}
    model = Small().requires_grad_(requires_grad=False)
    engine, optimizer, loader, schedule = hpc_ds.initialize(model=model, config=data)
    return (
        (optimizer, loader, schedule, engine.get_lr(), engine.get_mom(), engine.get_global_grad_norm()),
        (engine(samples()) - Small()(samples())).abs().max().item(),
        said(lambda: engine.backward(engine(samples()).mean())),
        said(engine.step),
    )


@pytest.mark.parametrize("stage", STAGES)
def test_what_there_is_not_is_none(pair: Outcomes, stage: int) -> None:
    for nothing, difference, backward, stepped in pair[f"without_optimizer {stage}"]:
        assert nothing == (None, None, None, [], [], None)
        assert difference < 1e-6
        assert backward == (
            "ConfigError: backward: the engine has no optimizer; give initialize one, or name one in the config"
        )
        assert stepped == "no error, but None"


def attributes(rank: int, stage: int) -> tuple[bool, ...]:
    model = Small()
    engine = hpc_ds.initialize(model=model, config=config(stage))[0]
    try:
        _ = engine.no_such_thing
    except AttributeError as error:
        missing = "no_such_thing" in str(error)
    return (
        engine.up is model.up,
        engine.training is True,
        isinstance(engine, torch.nn.Module),
        [name for name, _ in engine.named_parameters()] == [f"module.{name}" for name, _ in Small().named_parameters()],
        list(engine.state_dict()) == [f"module.{name}" for name in Small().state_dict()],
        missing,
    )


@pytest.mark.parametrize("stage", STAGES)
def test_what_an_engine_has_not_is_the_modules(pair: Outcomes, stage: int) -> None:
    assert pair[f"attributes {stage}"] == [(True,) * 6] * 2


# data


def loader(rank: int) -> tuple[list[Any], int]:
    def together(items: list[int]) -> str:
        return "+".join(map(str, items))

    engine, _, made, _ = hpc_ds.initialize(
        model=Small(), training_data=range(8), collate_fn=together, config=config(seed=3)
    )
    assert made is engine.training_dataloader
    return list(made), len(made)


def endless(rank: int) -> str:
    return said(lambda: hpc_ds.initialize(model=Small(), training_data=Endless(), config=config()))


class Endless(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


def test_training_data_is_dealt_out_in_what_collate_fn_makes(pair: Outcomes) -> None:
    (first, length), (second, _) = pair["loader"]
    dealt = [int(item) for batch in first + second for item in batch.split("+")]
    assert sorted(dealt) == list(range(8))
    assert length == len(first) == len(second) == 2


def test_data_without_positions_is_refused(pair: Outcomes) -> None:
    for words in pair["endless"]:
        assert words.startswith("ConfigError: training_data: an IterableDataset has no positions to resume from; ")


def uneven(rank: int, stage: int) -> torch.Tensor:
    """Batches of a script's own loader: other sizes than the config says, as the last of an epoch."""
    engine = hpc_ds.initialize(model=Small(), config=config(stage))[0]
    for number, count in enumerate((2, 5, 1)):
        engine.backward(engine(samples(number, count)).square().mean())
        engine.step()
    return weights(engine)


@pytest.mark.parametrize("stage", STAGES)
def test_a_batch_of_another_size_counts_as_one_micro_batch(pair: Outcomes, stage: int) -> None:
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for number, count in enumerate((2, 5, 1)):
        optimizer.zero_grad()
        model(samples(number, count)).square().mean().backward()
        optimizer.step()
    wanted = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    for found in pair[f"uneven {stage}"]:
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


# the process


def local_rank(rank: int) -> dict[str, Any]:
    def start(args: argparse.Namespace) -> Any:
        hpc_ds.initialize(args=args, model=Small(), config=config())
        return args.local_rank

    return {
        "wrong": said(lambda: start(argparse.Namespace(local_rank=5))),
        "right": start(argparse.Namespace(local_rank=rank)),
        "not given": start(argparse.Namespace(local_rank=-1)),
        "required": said(lambda: hpc_ds.init_distributed(dist_init_required=False).rank),
    }


def test_a_local_rank_in_the_arguments_agrees_with_the_environment(pair: Outcomes) -> None:
    for rank, of_rank in enumerate(pair["local_rank"]):
        wrong = f"RankError: --local_rank 5: the environment says LOCAL_RANK {rank}; leave the option out"
        assert of_rank["wrong"] == wrong
        assert of_rank["right"] == of_rank["not given"] == rank
        assert of_rank["required"] == f"no error, but {rank}"


def alternating(rank: int, stages: tuple[int, int]) -> list[torch.Tensor]:
    """Two engines in one process, forwards and backwards interleaved; only one of them accumulates."""
    first = hpc_ds.initialize(model=Small(), config=config(stages[0]))[0]
    second = hpc_ds.initialize(model=Small(), config=config(stages[1], gradient_accumulation_steps=2))[0]
    for number in range(4):
        one, other = first(samples(number)).square().mean(), second(samples(number // 2)).square().mean()
        second.backward(other)
        first.backward(one)
        second.step()
        first.step()
    return [weights(first), weights(second)]


@pytest.mark.parametrize("stages", [(0, 0), (1, 2), (2, 2), (3, 3), (3, 1)])
def test_engines_in_one_process_leave_each_other_alone(pair: Outcomes, stages: tuple[int, int]) -> None:
    for first, second in pair[f"alternating {stages}"]:
        torch.testing.assert_close(first, plain_step(steps=4), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(second, plain_step(steps=2), rtol=1e-6, atol=1e-7)


def through_another(rank: int, stage: int) -> torch.Tensor:
    """The loss of one engine reaches the other through its outputs, as between a generator and a critic."""
    first = hpc_ds.initialize(model=Small(), config=config(stage))[0]
    second = hpc_ds.initialize(model=nn.Linear(2, 1), config=config(stage))[0]
    with torch.no_grad():
        for parameter in second.module.parameters():
            hpc_ds.zero.safe_set_full_fp32_param(parameter, torch.ones(parameter.shape))
    first.backward(second(first(samples())).mean())
    first.step()
    second.zero_grad()
    return weights(first)


@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_goes_through_one_engine_into_another(pair: Outcomes, stage: int) -> None:
    model = Small()
    (model(samples()).sum(1) + 1).mean().backward()
    wanted = torch.cat([(p.detach() - RATE * p.grad).flatten() for p in model.parameters()])
    for found in pair[f"through_another {stage}"]:
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


def forgotten(rank: int, stage: int) -> list[bool]:
    engine = hpc_ds.initialize(model=Small(), config=config(stage))[0]
    step(engine)
    engine.destroy()
    watched = [weakref.ref(engine), weakref.ref(engine.module), weakref.ref(engine.optimizer)]
    del engine
    gc.collect()
    return [reference() is None for reference in watched]


@pytest.mark.parametrize("stage", STAGES)
def test_an_engine_that_nobody_holds_is_freed(pair: Outcomes, stage: int) -> None:
    assert pair[f"forgotten {stage}"] == [[True, True, True]] * 2


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    folder = tmp_path_factory.mktemp("initialize")
    cases: dict[str, Any] = {
        "ways_of_config": (ways_of_config, (folder,)),
        "wrong_configs": (wrong_configs, (folder,)),
        **{function.__name__: (function, ()) for function in (schedules, wrong_models, loader, endless, local_rank)},
    }
    for stage in STAGES:
        for way in WAYS:
            cases[f"{way} {stage}"] = (one_way, (stage, way))
        for function in (strange_optimizer, without_optimizer, attributes, uneven, through_another, forgotten):
            cases[f"{function.__name__} {stage}"] = (function, (stage,))
    for stages in ((0, 0), (1, 2), (2, 2), (3, 3), (3, 1)):
        cases[f"alternating {stages}"] = (alternating, (stages,))
    return run_cases(2, cases, worlds=2)


# in this process


def test_the_arguments_of_a_script() -> None:
    parser = argparse.ArgumentParser()
    assert hpc_ds.add_config_arguments(parser) is parser
    assert vars(parser.parse_args([])) == {"deepspeed": False, "deepspeed_config": None}
    parser.add_argument("--local_rank", type=int, help="which scripts declare before or after")
    parsed = parser.parse_args(["--deepspeed", "--deepspeed_config", "a.json", "--local_rank", "3"])
    assert vars(parsed) == {"deepspeed": True, "deepspeed_config": "a.json", "local_rank": 3}


def test_what_a_script_has_declared_itself_stays() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--deepspeed", default="its own.json")
    parsed = hpc_ds.add_config_arguments(parser).parse_args(["--deepspeed_config", "a.json"])
    assert vars(parsed) == {"deepspeed": "its own.json", "deepspeed_config": "a.json"}


def test_initialising_nothing_is_refused_where_it_must_be_there_already() -> None:
    assert "RANK" not in os.environ
    assert not dist.is_initialized()
    words = said(lambda: hpc_ds.initialize(model=Small(), config=config(), dist_init_required=False))
    assert words.startswith("RankError: init_distributed: dist_init_required is False, but no process group")
