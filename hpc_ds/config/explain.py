"""What a training config means: effective values and where each comes from, batch arithmetic, bytes a rank needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hpc_ds.config.batch import BatchSizes, fitting_world_size, resolve_batch_sizes
from hpc_ds.config.load import in_words, read_training_config, read_training_of_job
from hpc_ds.config.memory import STAGES, memory_of
from hpc_ds.config.training import read_training

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hpc_ds.config.job import Resources
    from hpc_ds.config.memory import Memory
    from hpc_ds.config.training import TrainingConfig

_JOB_KEYS = {"script", "command", "training"}


@dataclass(frozen=True, slots=True)
class Explanation:
    """A training config in effect.

    Attributes:
        file: where it stands.
        values: dotted key, value, and source (``file``, ``auto``, ``default`` or a deprecated spelling).
        world_size: ranks that the arithmetic below is for.
        because: why so many.
        batch: the batch arithmetic; None where the config has no batch size.
        warnings: what it does not do, or what should be written in another way.
        stage: the config's own.
        parameters: how many the memory is for; 1 stands for "a parameter".
        memory: what a rank would hold at each stage.
        compute: the type of forward and backward.
        optimizer: whose state is counted.
    """

    file: str
    values: list[tuple[str, Any, str]]
    world_size: int
    because: str
    batch: BatchSizes | None
    warnings: list[str]
    stage: int
    parameters: int
    memory: dict[int, Memory]
    compute: str
    optimizer: str

    def as_data(self) -> dict[str, Any]:
        """The same as plain data."""
        batch = self.batch
        return {
            "file": self.file,
            "values": {key: {"value": value, "source": source} for key, value, source in self.values},
            "world_size": self.world_size,
            "world_size_because": self.because,
            "batch": None
            if batch is None
            else {
                "train_batch_size": batch.train,
                "train_micro_batch_size_per_gpu": batch.micro,
                "gradient_accumulation_steps": batch.accumulation,
            },
            "warnings": self.warnings,
            "stage": self.stage,
            "memory": {
                "parameters": self.parameters,
                "compute": self.compute,
                "optimizer": self.optimizer,
                "bytes_per_rank": {
                    str(stage): {
                        "parameters": held.parameters,
                        "masters": held.masters,
                        "gradients": held.gradients,
                        "optimizer": held.optimizer,
                        "total": held.total,
                        "on_host": held.on_host,
                    }
                    for stage, held in self.memory.items()
                },
            },
        }


def explain(source: str, world_size: int | None = None, parameters: int | None = None) -> Explanation:
    """Explain a training config, or that of a job file.

    Args:
        source: a training config, a job file, or base64 of JSON.
        world_size: ranks; None: those of the job, else those that the batch sizes leave, else 1.
        parameters: trainable ones; None: bytes are those of one parameter.

    Raises:
        ConfigError: it cannot be read, or says something that no engine does.
    """
    data, file, resources = _find(source)
    reading = read_training(data, file)
    config = reading.config
    ranks, because = _world(config, world_size, resources)
    asked = config.train_batch_size is not None or config.train_micro_batch_size_per_gpu is not None
    return Explanation(
        file=file,
        values=[(key, value, reading.source(key)) for key, value in _flat(config.model_dump(mode="json"))],
        world_size=ranks,
        because=because,
        batch=resolve_batch_sizes(config, ranks, because) if asked else None,
        warnings=reading.warnings,
        stage=config.zero_optimization.stage,
        parameters=1 if parameters is None else parameters,
        memory={stage: memory_of(config, stage, ranks, 1 if parameters is None else parameters) for stage in STAGES},
        compute=config.compute,
        optimizer="the script's, taken for Adam" if config.optimizer is None else config.optimizer.type,
    )


def _find(source: str) -> tuple[dict[str, Any], str, Resources | None]:
    """The training config that is meant, what to call it, and the resources of its job if it has one."""
    data, file = read_training_config(source)
    return read_training_of_job(data, file) if _JOB_KEYS & data.keys() else (data, file, None)


def _world(config: TrainingConfig, asked: int | None, resources: Resources | None) -> tuple[int, str]:
    if asked is not None:
        return asked, "--world-size"
    if resources is not None:
        return resources.world_size, in_words(resources)
    fitting = fitting_world_size(config)
    if fitting is not None:
        return fitting, "what the batch sizes leave; --world-size asks for another"
    return 1, "assumed; --world-size asks for another"


def _flat(data: dict[str, Any], at: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{at}{key}.")
        else:
            yield f"{at}{key}", value
