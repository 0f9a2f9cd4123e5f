"""Hugging Face's Trainer on ranks of the tests: the same few steps with DeepSpeed's name for hpc_ds, and plain."""

from __future__ import annotations

import copy
import math
import os
from typing import TYPE_CHECKING, Any

import torch
from hf_models import MODELS, VOCABULARY

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

SAMPLES, PLACES, STEPS, BATCH = 24, 8, 5, 4  # of the data, of a text, of a run, of a step of all ranks

AUTO: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto", "initial_scale_power": 8},
    "zero_optimization": {
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}
# transformers 5 multiplies the loss of these models by the number of processes, however they are trained: they take the
# argument by which others divide it, and do not use it.
OVERCOUNTED = {"bert": {"average_tokens_across_devices": False}, "t5": {"average_tokens_across_devices": False}}
OPTIMIZER = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}}
SCHEDULER = {
    "type": "WarmupDecayLR",
    "params": {
        "warmup_type": "linear",
        "warmup_min_lr": "auto",
        "warmup_max_lr": "auto",
        "warmup_num_steps": "auto",
        "total_num_steps": "auto",
    },
}


class Texts(torch.utils.data.Dataset):
    """Texts of one length, whose labels are themselves."""

    def __init__(self, samples: int = SAMPLES, seed: int = 5) -> None:
        self._texts = torch.randint(VOCABULARY, (samples, PLACES), generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._texts[index], "labels": self._texts[index]}


def config(stage: int, *, optimizer: bool = True, scheduler: bool = True) -> dict[str, Any]:
    """A ``ds_config.json`` that leaves to the Trainer what it can."""
    made = copy.deepcopy(AUTO)
    made["zero_optimization"]["stage"] = stage
    if optimizer:
        made["optimizer"] = copy.deepcopy(OPTIMIZER)
    if scheduler:
        made["scheduler"] = copy.deepcopy(SCHEDULER)
    return made


def make(name: str) -> nn.Module:
    torch.manual_seed(1)
    return MODELS[name]()


def adapted_to(model: nn.Module) -> Any:
    """A model with adapters, the same ones whatever was drawn before."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(2)
    asked = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, task_type="CAUSAL_LM")
    return get_peft_model(model, asked)


def trainer(
    name: str, folder: Path, deepspeed: dict[str, Any] | None, model: nn.Module | None = None, **asked: Any
) -> Any:
    """A Trainer of a model; with ``deepspeed``, on hpc_ds under DeepSpeed's name."""
    if deepspeed is not None or "WORLD_SIZE" in os.environ:  # ranks do both, and accelerate looks once
        from hpc_ds.compat import activate

        activate()
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    from transformers import Trainer, TrainingArguments

    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    accumulation = asked.get("gradient_accumulation_steps", 1)
    settings: dict[str, Any] = {
        "per_device_train_batch_size": BATCH // world_size // accumulation,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "warmup_steps": 2,
        "lr_scheduler_type": "linear",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    } | OVERCOUNTED.get(name, {})
    callbacks = asked.pop("callbacks", None)
    settings |= asked
    arguments = TrainingArguments(output_dir=str(folder), deepspeed=deepspeed, **settings)
    return Trainer(
        model=model or make(name),
        args=arguments,
        train_dataset=Texts(),
        eval_dataset=Texts(8, seed=6),
        callbacks=callbacks,
    )


def told(trained: Any, key: str) -> list[float]:
    """What a Trainer has logged of each step."""
    return [entry[key] for entry in trained.state.log_history if key in entry]


def train(_rank: int, name: str, asked: dict[str, Any], folder: Path, how: dict[str, Any]) -> dict[str, Any]:
    """Train on the ranks by a config, and say what came of it."""
    made = trainer(name, folder, asked, **how)
    made.train()
    return {key: told(made, key) for key in ("loss", "grad_norm", "learning_rate", "eval_loss")}


def plain(name: str, folder: Path, **how: Any) -> dict[str, list[float]]:
    """The same in one process, without DeepSpeed."""
    made = trainer(name, folder, None, **how)
    made.train()
    return {key: told(made, key) for key in ("loss", "grad_norm", "learning_rate", "eval_loss")}


def worst(one: list[float], other: list[float]) -> float:
    """The largest relative distance of two runs."""
    assert len(one) == len(other) > 0
    return max(
        abs(a - b) / max(abs(b), 1e-3) if math.isfinite(a) else math.inf for a, b in zip(one, other, strict=True)
    )
