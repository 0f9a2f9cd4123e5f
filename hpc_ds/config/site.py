"""What a cluster offers and how it wants to be asked: the shape of ``site_configs/*.json``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from hpc_ds.config.job import Line, check_option_names, check_variable_names
from hpc_ds.config.model import Model


class SiteConfig(Model):
    """One cluster."""

    name: str
    description: str
    scheduler: Literal["slurm", "local"]
    template: str = Field("slurm.sbatch.j2", description="file in templates/ that the job script is made from")
    gpu_request: Literal["gpus_per_node", "gres"] = Field("gpus_per_node", description="how GPUs are asked for")
    sbatch: dict[str, Line] = Field(default_factory=dict, description="options that every job here carries")
    setup: list[Line] = Field(default_factory=list, description="shell lines that every job here starts with")
    env: dict[str, Line] = Field(default_factory=dict, description="variables that every job here gets")
    srun: list[Line] = Field(default_factory=list, description="options that every srun here carries")
    grace_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        20.0, description="local only: seconds between the first signal of a preemption and the last"
    )
    kill_wait_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        30.0, description="local only: seconds between SIGTERM and SIGKILL at the end of a job"
    )

    @field_validator("sbatch")
    @classmethod
    def _options(cls, options: dict[str, str]) -> dict[str, str]:
        check_option_names(options)
        return options

    @field_validator("env")
    @classmethod
    def _variables(cls, env: dict[str, str]) -> dict[str, str]:
        check_variable_names(env)
        return env
