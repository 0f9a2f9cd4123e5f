"""``initialize``: from a module and a config to an engine, with DeepSpeed's arguments and its four results."""

from __future__ import annotations

import contextlib
import logging
from argparse import ArgumentError
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hpc_ds.config.batch import BatchSizes, resolve_batch_sizes
from hpc_ds.config.load import read_training_config
from hpc_ds.config.training import TrainingConfig, read_training
from hpc_ds.engine import activation_checkpointing
from hpc_ds.engine.client_optimizer import Asked, choose_optimizer
from hpc_ds.engine.data import Position, TrainingLoader, refuse_iterable
from hpc_ds.engine.early import current_device
from hpc_ds.engine.engine import Engine
from hpc_ds.engine.make_sharding import make_sharding
from hpc_ds.engine.schedules import make_schedule
from hpc_ds.engine.zero import refuse_owned, register
from hpc_ds.errors import ConfigError, RankError
from hpc_ds.runtime.process_group import init_distributed
from hpc_ds.runtime.progress import process_age_s
from hpc_ds.runtime.run import CurrentRun
from hpc_ds.runtime.show_log import show_log

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable
    from pathlib import Path

    from hpc_ds.runtime.rank import Rank

log = logging.getLogger("hpc_ds")


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add ``--deepspeed`` and ``--deepspeed_config`` to a script's options, where it has not declared them itself."""
    group = parser.add_argument_group("hpc_ds", "training config")
    with contextlib.suppress(ArgumentError):
        group.add_argument("--deepspeed", action="store_true", help="accepted; the engine is always used")
    with contextlib.suppress(ArgumentError):
        group.add_argument("--deepspeed_config", type=str, default=None, help="the DeepSpeed JSON config")
    return parser


def initialize(  # noqa: PLR0913 - DeepSpeed's signature
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: Any = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int | None = None,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Callable[..., Any] | None = None,
    config: dict[str, Any] | str | Path | None = None,
    mesh_param: Any = None,
    config_params: dict[str, Any] | str | Path | None = None,
) -> tuple[Engine, torch.optim.Optimizer | None, TrainingLoader | None, Any]:
    """Wrap a module for training. Collective.

    Args:
        args: a namespace; ``args.deepspeed_config`` is read when no config is given.
        model: any module; it is sharded in place, from rank 0's weights.
        optimizer: an instance over the module's parameters, or a callable from parameters to one; else the config's.
        model_parameters: parameters, or groups of them; default: all that need gradients.
        training_data: a map-style dataset; a loader with an exact position is made for it.
        lr_scheduler: an instance, or a callable from the optimizer to one; else the config's.
        distributed_port: where rank 0 listens; default: a free port.
        mpu: must be None: there is no model parallelism.
        dist_init_required: see ``init_distributed``.
        collate_fn: of the loader.
        config: the DeepSpeed config, as a dict or a file; else that of ``args``, else that of the run's job.
        mesh_param: must be None.
        config_params: another name of ``config``.

    Returns:
        Engine, optimizer, data loader and schedule; None for what there is not.

    Raises:
        ConfigError: the config, or an argument, is not usable.
        RankError: see ``init_distributed``.
    """
    _refuse_model_parallelism(mpu, mesh_param)
    run = CurrentRun.from_environment()
    rank = init_distributed(distributed_port=distributed_port, dist_init_required=dist_init_required)
    _check_local_rank(args, rank)
    reading = read_training(*_config_source(config, config_params, args, run))
    checked = reading.config
    sizes = resolve_batch_sizes(checked, rank.world_size, _WHO_SAYS.get(rank.source, rank.source))
    _tell(run, rank, reading.warnings, checked)
    model = _usable(model, trains=optimizer is not None or checked.optimizer is not None)
    asked = Asked(model, optimizer, model_parameters)
    activation_checkpointing.use(checked.activation_checkpointing)
    sharding = make_sharding(model, checked, current_device())
    chosen = choose_optimizer(optimizer, asked, checked, sharding)
    engine = Engine(sharding, chosen, checked, sizes, rank, run)
    register(engine)
    engine.written, engine.collate_fn, engine.training_data = reading.spelled.data, collate_fn, training_data
    engine.client_optimizer, engine.client_lr_scheduler = optimizer, lr_scheduler
    engine.lr_scheduler = _schedule(lr_scheduler, checked, chosen)
    engine.training_dataloader = _loader(training_data, checked, sizes, rank.rank, collate_fn)
    return engine, chosen, engine.training_dataloader, engine.lr_scheduler


def _refuse_model_parallelism(mpu: object, mesh_param: object) -> None:
    if mpu is not None or mesh_param is not None:
        raise ConfigError(
            "initialize: mpu and mesh_param are for model parallelism, which is not supported; leave them out"
        )


# Where the world size comes from, by what ``Rank.source`` says.
_WHO_SAYS = {
    "env": "as WORLD_SIZE says",
    "slurm": "srun started so many tasks",
    "openmpi": "mpirun started so many",
    "pmi": "mpirun started so many",
    "single": "no launcher started more",
    "initialised": "the ranks of the process group",
}


def _check_local_rank(args: Any, rank: Rank) -> None:
    asked = getattr(args, "local_rank", None)
    if asked is None:
        return
    if isinstance(asked, int) and asked >= 0 and asked != rank.local_rank:
        raise RankError(
            f"--local_rank {asked}: the environment says LOCAL_RANK {rank.local_rank}; leave the option out",
            {"LOCAL_RANK": str(rank.local_rank)},
        )
    args.local_rank = rank.local_rank  # scripts choose their device by it


def _usable(model: object, *, trains: bool) -> nn.Module:
    if model is None:
        raise ConfigError("initialize: no model; pass model=")
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model of type {type(model).__name__}: not a torch.nn.Module; pass an instance of one")
    refuse_owned(model)
    if trains and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            "model: no parameter needs a gradient, so there is nothing to train; set requires_grad, or leave the optimizer out"
        )
    return model


def _tell(run: CurrentRun | None, rank: Rank, warnings: list[str], config: TrainingConfig) -> None:
    show_log(rank.rank, config.log_level)
    if rank.rank != 0:
        return
    for warning in warnings:
        log.warning(warning)
    if config.dump_state:
        log.info("training config: %s", config.model_dump_json())
    if run is not None:
        age_s = process_age_s()
        run.record("initialized", world_size=rank.world_size, seconds=None if age_s is None else round(age_s, 3))


def _config_source(config: Any, config_params: Any, args: Any, run: CurrentRun | None) -> tuple[dict[str, Any], str]:
    asked = {
        "config": config,
        "config_params": config_params,
        "--deepspeed_config": getattr(args, "deepspeed_config", None),
    }
    given = [name for name, value in asked.items() if value is not None]
    if len(given) > 1:
        raise ConfigError(f"initialize: a config is given more than once, as {' and '.join(given)}; give one of them")
    config = asked[given[0]] if given else None
    if config is None and run is not None and run.training is not None:
        return run.training, str(run.files.config)
    if config is None:
        raise ConfigError(
            'initialize: no config; pass config=, or --deepspeed_config, or name one in the job as "training"'
        )
    return read_training_config(config)


def _schedule(given: Any, config: TrainingConfig, optimizer: torch.optim.Optimizer | None) -> Any:
    if callable(given) and (isinstance(given, type) or not hasattr(given, "step")):
        return given(optimizer)
    if given is not None:
        if getattr(given, "optimizer", optimizer) is not optimizer:
            raise ConfigError(
                "lr_scheduler: it was made for another optimizer than the engine's; pass that optimizer too, or a function "
                "from the optimizer to a schedule"
            )
        return given
    if config.scheduler is None:
        return None
    if optimizer is None:
        # Trainer leaves it in the config of a model that it only evaluates.
        log.warning("training config: scheduler: has no effect, because there is no optimizer to schedule")
        return None
    return make_schedule(config.scheduler, optimizer)


def _loader(
    dataset: Any, config: TrainingConfig, sizes: BatchSizes, rank: int, collate_fn: Any
) -> TrainingLoader | None:
    if dataset is None:
        return None
    refuse_iterable(dataset)
    position = Position(len(dataset), config.seed, sizes, rank, drop_last=config.dataloader_drop_last)
    return TrainingLoader(dataset, position, collate_fn, current_device())
