"""``initialize``: from a module and a config to an engine, with DeepSpeed's arguments and its four results."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hpc_ds.config.load import read_json
from hpc_ds.config.training import BatchSizes, TrainingConfig, load_training, resolve_batch_sizes
from hpc_ds.engine.data import Position, TrainingLoader, refuse_iterable
from hpc_ds.engine.engine import Engine, compute_dtype
from hpc_ds.engine.loss_scale import LossScale
from hpc_ds.engine.optimizers import make_optimizer
from hpc_ds.engine.piece import Piece
from hpc_ds.engine.schedules import make_schedule
from hpc_ds.engine.sharding import Sharded
from hpc_ds.errors import ConfigError
from hpc_ds.runtime.process_group import init_distributed
from hpc_ds.runtime.run import CurrentRun

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

log = logging.getLogger("hpc_ds")

_REDUCE_DTYPES = {None: torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add ``--deepspeed``, ``--deepspeed_config`` and ``--local_rank`` to a script's options."""
    group = parser.add_argument_group("hpc_ds", "training config")
    group.add_argument("--deepspeed", action="store_true", help="accepted; the engine is always used")
    group.add_argument("--deepspeed_config", type=str, default=None, help="the DeepSpeed JSON config")
    group.add_argument("--local_rank", type=int, default=-1, help="accepted; the environment says it")
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
    if model is None:
        raise ConfigError("initialize: no model; pass model=")
    if mpu is not None or mesh_param is not None:
        raise ConfigError(
            "initialize: mpu and mesh_param are for model parallelism, which is not supported; leave them out"
        )
    run = CurrentRun.from_environment()
    rank = init_distributed(distributed_port=distributed_port, dist_init_required=dist_init_required)
    checked, warnings = load_training(*_config_source(config or config_params, args, run))
    sizes = resolve_batch_sizes(checked, rank.world_size)
    if rank.rank == 0:
        _tell(run, rank.world_size, warnings)
    before = _Before(model, optimizer, model_parameters)
    sharded = _sharded(model, checked)
    chosen = _optimizer(optimizer, before, checked, model)
    engine = Engine(sharded, chosen, LossScale(checked.fp16), checked, sizes, rank, run)
    engine.lr_scheduler = _schedule(lr_scheduler, checked, chosen)
    if training_data is not None:
        engine.training_dataloader = _loader(training_data, checked, sizes, rank.rank, collate_fn)
    return engine, chosen, engine.training_dataloader, engine.lr_scheduler


def _tell(run: CurrentRun | None, world_size: int, warnings: list[str]) -> None:
    for warning in warnings:
        log.warning(warning)
    if run is not None:
        run.record("initialized", world_size=world_size)


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _sharded(model: nn.Module, config: TrainingConfig) -> Sharded:
    reduce_dtype = _REDUCE_DTYPES[config.communication_data_type]
    return Sharded(model, config.zero_optimization.stage, _device(), compute_dtype(config), reduce_dtype)


def _config_source(config: Any, args: Any, run: CurrentRun | None) -> tuple[dict[str, Any], str]:
    from_args = getattr(args, "deepspeed_config", None)
    if config is not None and from_args is not None:
        raise ConfigError("initialize: a config is given, and --deepspeed_config too; give one of them")
    config = config if config is not None else from_args
    if config is None and run is not None and run.training is not None:
        return run.training, str(run.files.config)
    if config is None:
        raise ConfigError(
            'initialize: no config; pass config=, or --deepspeed_config, or name one in the job as "training"'
        )
    if isinstance(config, dict):
        return config, "training config"
    return read_json(Path(os.fspath(config)), "training config"), str(config)


class _Before:
    """The parameters as the caller knows them: sharding puts others in their place, under the same names.

    Attributes:
        asked_for: what the optimizer shall update, as parameters or groups of them; None for all that need gradients.
    """

    def __init__(self, model: nn.Module, optimizer: Any, model_parameters: Any) -> None:
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        if isinstance(optimizer, torch.optim.Optimizer):
            model_parameters = optimizer.param_groups
        self.asked_for = None if model_parameters is None else [self._by_name(item) for item in model_parameters]

    def _by_name(self, item: Any) -> Any:
        if isinstance(item, tuple):  # an entry of named_parameters()
            item = item[1]
        if isinstance(item, dict):
            parameters = [item["params"]] if isinstance(item["params"], torch.Tensor) else item["params"]
            return {**item, "params": [self._by_name(parameter) for parameter in parameters]}
        if item not in self._names:
            raise ConfigError("model_parameters: one of them is not a parameter of the model; pass model.parameters()")
        return self._names[item]

    def sharded(self, model: nn.Module) -> list[Any]:
        """The parameters that the optimizer shall update, now."""
        now = dict(model.named_parameters())
        if self.asked_for is None:
            return [parameter for parameter in now.values() if parameter.requires_grad]
        return [
            {**item, "params": [now[name] for name in item["params"]]} if isinstance(item, dict) else now[item]
            for item in self.asked_for
        ]


def _optimizer(given: Any, before: _Before, config: TrainingConfig, model: nn.Module) -> torch.optim.Optimizer | None:
    """The client's optimizer, moved onto the sharded parameters, or the config's."""
    parameters = before.sharded(model)
    if isinstance(given, torch.optim.Optimizer):
        if given.state:
            raise ConfigError(
                "optimizer: it has taken steps already; hand it over fresh and load its state as a checkpoint"
            )
        for group, sharded in zip(given.param_groups, parameters, strict=True):
            group["params"] = sharded["params"]
        return given
    if given is not None:
        made: torch.optim.Optimizer = given(parameters)
        return made
    if config.optimizer is None:
        return None
    pieces = {one: Piece(name, one.shape, 0, one, shared=False) for name, one in model.named_parameters()}
    plain = [item for item in parameters if not isinstance(item, dict)]
    groups = [item for item in parameters if isinstance(item, dict)]
    return make_optimizer(config.optimizer, groups + ([{"params": plain}] if plain or not groups else []), pieces)


def _schedule(given: Any, config: TrainingConfig, optimizer: torch.optim.Optimizer | None) -> Any:
    if given is not None and not hasattr(given, "step") and callable(given):
        return given(optimizer)
    if given is not None:
        return given
    if config.scheduler is None:
        return None
    if optimizer is None:
        raise ConfigError("scheduler: there is no optimizer to schedule; name one in the config, or pass one")
    return make_schedule(config.scheduler, optimizer)


def _loader(dataset: Any, config: TrainingConfig, sizes: BatchSizes, rank: int, collate_fn: Any) -> TrainingLoader:
    refuse_iterable(dataset)
    position = Position(len(dataset), config.seed, sizes, rank, drop_last=config.dataloader_drop_last)
    return TrainingLoader(dataset, position, collate_fn, _device())
